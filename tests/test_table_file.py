"""Rows as CSV, JSON lines and Parquet."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.core.errors import UsageError
from data_tools.core.mapped import read_parquet
from mmvit.table_file import write_table

ROWS = [
    {"image": 'a "b",\n\uac15.png', "class_1": "x", "probability_1": 0.25},
    {"image": "c", "class_1": "y", "probability_1": 1.0},
]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.PARQUET"])
def test_rows_are_read_back(tmp_path: Path, name: str):
    path = tmp_path / "new" / name
    write_table(ROWS, path)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            found = [{**row, "probability_1": float(row["probability_1"])} for row in csv.DictReader(file)]
    elif path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        found = read_parquet(path).to_pylist()
    assert found == ROWS
    assert [each.name for each in path.parent.iterdir()] == [name]


def test_other_suffixes_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"cannot write a table to t\.txt") as caught:
        write_table(ROWS, tmp_path / "t.txt")
    assert caught.value.hint == "use .csv, .jsonl, .parquet"


def test_folders_and_shards_are_classified_into_a_table(
    run_cli: Callable[..., tuple[int, str, str]], finished_run: Path, tiny_data: Path, tmp_path: Path
):
    out = tmp_path / "labels.jsonl"
    line = ("zero-shot", finished_run, f"{tiny_data}/val-00000.tar", "--classes", "a,b,c", "--top", 2, "--out", out)
    code, printed, err = run_cli(*line)
    assert (code, printed) == (0, f"{out}: 40 images\n"), err
    rows = [json.loads(row) for row in out.read_text("utf-8").splitlines()]
    assert len(rows) == 40
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert all(row["probability_1"] >= row["probability_2"] for row in rows)
    assert rows[0]["image"].startswith("val-00000.tar/")
    code, printed, err = run_cli(*line[:-1], tmp_path / "labels.txt")
    assert (code, printed, "use .csv, .jsonl, .parquet" in err) == (2, "", True)
