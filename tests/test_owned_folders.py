"""Each command that writes a folder leaves it to the one that is writing it."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from data_tools.core.errors import UsageError
from data_tools.core.ownership import owned
from data_tools.demo.digits import write_digits
from data_tools.demo.emoji import EmojiOptions, write_emoji
from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.examine.repair import repair_shards
from data_tools.make.options import MakeOptions
from data_tools.make.run import make_shards
from data_tools.select.dedup import dedup_shards
from data_tools.select.filter import filter_samples
from data_tools.select.reshard import reshard
from data_tools.select.write import OutputOptions
from data_tools.tar.writer import ShardWriter
from mmvit.eval.encoder import Encoder
from mmvit.interop.convert import import_model
from mmvit.quickstart.run import run_quickstart
from mmvit.retrieval.sources import open_source
from mmvit.retrieval.store import embed_source


def embed(shards: list[Path], out: Path) -> None:
    encoder = object.__new__(Encoder)  # nothing is encoded
    encoder.fingerprint = ""
    embed_source(encoder, out, open_source(str(shards[0])), out)


# By command: its function, of the shards and the folder; and whether the folder appears as a whole.
WRITERS: dict[str, tuple[Callable[[list[Path], Path], object], bool]] = {
    "make": (lambda shards, out: make_shards(shards[0].with_name("images"), out, MakeOptions()), False),
    "reshard": (lambda shards, out: reshard(shards, OutputOptions(out)), False),
    "filter": (lambda shards, out: filter_samples(shards, "width > 1", output=OutputOptions(out)), False),
    "dedup": (lambda shards, out: dedup_shards(shards, output=OutputOptions(out)), False),
    "repair": (repair_shards, True),
    "digits": (lambda shards, out: write_digits(out), False),
    "synthetic": (lambda shards, out: write_synthetic(out, SyntheticPhotos(9, 9), num_shards=1, num_samples=1), False),
    "emoji": (lambda shards, out: write_emoji(out, EmojiOptions()), True),
    "embed": (embed, False),
    "import": (lambda shards, out: import_model("timm:resnet18", out), True),
    "quickstart": (lambda shards, out: run_quickstart(out, 1.0, 0), False),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "images").mkdir()
    with ShardWriter(folder) as writer:
        writer.write("a", {"txt": "a caption"})
    return writer.shards


@contextlib.contextmanager
def owned_by_another(folder: Path, replaced: bool) -> Iterator[None]:
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        pool.submit(stack.enter_context, owned(folder, replaced=replaced)).result()
        yield
        pool.submit(stack.close).result()


@pytest.mark.parametrize("command", WRITERS)
def test_folder_that_is_being_written_is_left_alone(
    command: str, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    datasets = ModuleType("sklearn.datasets")  # the package itself takes seconds to import
    datasets.load_digits = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    write, replaced = WRITERS[command]
    for how in {replaced, True}:  # and one that another command lets appear as a whole
        out = tmp_path / f"out-{how}"
        with owned_by_another(out, how):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(UsageError, match=f"being written by process {os.getpid()}") as error:
                write(shards, out)
            assert error.value.exit_code == 2
            assert sorted(tmp_path.rglob("*")) == before
