"""Parquet files are read without threads, which would abort the program at its end."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_tools.core.mapped import open_mapped, read_batches, read_parquet

ROOT = Path(__file__).parents[3]
READ = "import sys; from data_tools.core.mapped import read_parquet; read_parquet(sys.argv[1]); sys.exit(4)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    parquet.write_table(pa.table({"key": ["a", "b", "c"], "n": [1, 2, 3]}), tmp_path / "t.parquet", row_group_size=1)
    return tmp_path / "t.parquet"


def test_tables_and_batches(file: Path):
    assert read_parquet(file).to_pydict() == {"key": ["a", "b", "c"], "n": [1, 2, 3]}
    assert read_parquet(file, ["n"]).column_names == ["n"]
    batches = list(read_batches(parquet.ParquetFile(open_mapped(file)), columns=["n"], row_groups=[1, 2]))
    assert pa.Table.from_batches(batches).to_pydict() == {"n": [2, 3]}


def test_nothing_else_reads_with_threads():
    readers = ("read_table(", ".iter_batches(", "ParquetDataset", "pyarrow.dataset")
    sources = [path for room in ("data_tools", "mmvit") for path in (ROOT / room).rglob("*.py")]
    found = {path.name for path in sources if any(reader in path.read_text() for reader in readers)}
    assert found - {"sources.py"} == {"mapped.py"}, "use read_parquet or read_batches of data_tools.core.mapped"


@pytest.mark.slow
def test_programs_that_end_at_once_keep_their_exit_code(file: Path):
    """With threads 1 to 6 of 10 end with 134."""
    command = [sys.executable, "-c", READ, str(file)]
    codes = [subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode for _ in range(30)]
    assert codes == [4] * 30
