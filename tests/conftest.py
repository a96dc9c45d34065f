"""What holds for every test, and the small real things that several of them share: data, a config, a finished run.

Shapes in signatures are checked, nothing leaves this machine, no window opens.
"""

import fcntl
import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# Before the first import of torch; programs that the tests start inherit these. Each worker of pytest computes on one
# thread, and so does each program: threads that wait for each other's cores cost more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Before the hook: under it, whatever a module of mmvit imports first is compiled from source, 5 s for all of these.
TORCH = ("torch._dynamo", "torch.distributed.fsdp", "torchvision", "accelerate")
for name in (
    *TORCH,
    "beartype.door",
    "omegaconf",
    "pyarrow.parquet",
    "pydantic.type_adapter",
    "rich.progress",
    "typer",
):
    importlib.import_module(name)

# Before the first import of mmvit: from here on each call checks its annotations (dtype and shape of tensors too).
jaxtyping.install_import_hook("mmvit", "beartype.beartype")

NUM_TRAIN, NUM_VAL = 300, 40
TINY_CONFIG = (Path(__file__).parent / "tiny.yaml").read_text()

Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to anything but this machine itself."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and str(address[0]) not in {"127.0.0.1", "::1", "localhost"}:
            raise RuntimeError(f"a test connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture
def fp32_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without bf16 units, also for the programs that are started: what is exact is tested in fp32."""
    monkeypatch.setenv("MMVIT_BF16_UNITS", "0")


@pytest.fixture
def bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with bf16 units, which are emulated where there are none."""
    monkeypatch.setenv("MMVIT_BF16_UNITS", "1")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Have the first worker of pytest that asks build a folder, and return it to all."""

    def build_once(name: str, build: Callable[[Path], object]) -> Path:
        root = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            root = root.parent
        folder, done = root / f"{name}-once", root / f"{name}-once.done"
        with (root / f"{name}-once.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return build_once


@pytest.fixture(scope="session")
def mmvit() -> Program:
    """Run the program `mmvit` to its end, in a process of its own."""

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mmvit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    return run


@pytest.fixture(scope="session", autouse=True)
def flops_counted_once() -> Iterator[None]:
    """Counting a model's operations takes 0.4 s, and hundreds of runs here are of a few models."""
    from mmvit.train.device.flops import FlopCounter

    count = FlopCounter._count
    known: dict[str, float] = {}

    def counted(self: FlopCounter, images: Any, ids: Any, keep: Any) -> float:
        weights = [(name, each.shape, each.requires_grad) for name, each in self.model.named_parameters()]
        pixels = getattr(images, "pixels", images)  # of patches
        key = repr(
            (self.model, weights, type(images), [each is not None and each.shape for each in (pixels, ids, keep)])
        )
        if key not in known:
            known[key] = count(self, images, ids, keep)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlopCounter, "_count", counted)
        yield


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the program `mmvit` in this process, which saves its start; returns exit code, output and errors."""
    from data_tools.core.program import run_program
    from mmvit.cli import app

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_program(app, "mmvit", [str(argument) for argument in arguments])
        output = capfd.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run


@pytest.fixture(scope="session")
def emoji_folder(built_once: Callable[..., Path]) -> Path:
    """The drawings of two vendors to train on and of one that is held out, with English and Korean names."""
    from data_tools.demo.emoji import EmojiOptions, write_emoji

    options = EmojiOptions(vendors=("Goog", "Twtr", "Sams"), languages=("en", "ko"))
    return built_once("emoji", lambda folder: write_emoji(folder / "data", options)) / "data"


@pytest.fixture(scope="session")
def cut_emoji(emoji_folder: Path) -> Callable[[Path, list[int] | None, int, int], None]:
    """Write a part of the drawings as a data set of its own: some classes, or the first samples of each split."""
    from data_tools.make.tokenizer import train_tokenizer
    from data_tools.tar.expand import expand_shards
    from data_tools.tar.writer import ShardWriter
    from mmvit.data.shards import IndexedShards

    def cut(folder: Path, labels: list[int] | None, num_train: int, num_val: int) -> None:
        names: dict[str, list[str]] = {}
        for language in ("en", "ko"):
            lines = (emoji_folder / f"names.{language}.txt").read_text(encoding="utf-8").splitlines()
            names[language] = lines if labels is None else [lines[label] for label in labels]
        for split, most in (("train", num_train), ("val", num_val)):
            shards = IndexedShards(expand_shards(str(emoji_folder / f"{split}-*.tar")))
            with ShardWriter(folder, split, max_samples=100) as writer:
                for i in range(len(shards)):
                    label = shards.label(i)
                    if writer.num_samples < most and (labels is None or label in labels):
                        sample = shards.read(i)
                        new = label if labels is None else labels.index(label)
                        fields: dict[str, Any] = {"png": sample.image, "txt": sample.caption, "json": sample.meta}
                        writer.write(sample.key.split("/")[1], fields | {"cls": new})
        for language, lines in names.items():
            (folder / f"names.{language}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        train_tokenizer([*names["en"], *names["ko"], "an emoji of"], folder / "tokenizer.json", vocab_size=800)

    return cut


@pytest.fixture(scope="session")
def tiny_data(request: pytest.FixtureRequest, built_once: Callable[..., Path]) -> Path:
    """A few hundred drawings: train-*.tar, val-*.tar, names and a tokenizer, with the config `tiny.yaml`."""

    def build(folder: Path) -> None:
        request.getfixturevalue("cut_emoji")(folder, None, NUM_TRAIN, NUM_VAL)
        _write_tiny_config(folder)

    return built_once("tiny", build)


@pytest.fixture(scope="session")
def spoiled_data(tiny_data: Path) -> Callable[..., Path]:
    """Write the training drawings into a folder of their own, with the images of the samples `broken` cut."""
    from data_tools.tar.expand import expand_shards
    from data_tools.tar.writer import ShardWriter
    from mmvit.data.shards import IndexedShards

    def write(folder: Path, broken: Container[int], max_samples: int = 100) -> Path:
        shards = IndexedShards(expand_shards(f"{tiny_data}/train-*.tar"))
        with ShardWriter(folder, "train", max_samples=max_samples) as writer:
            for i in range(len(shards)):
                fields = shards.fields(i)
                if i in broken:
                    fields["png"] = fields["png"][: len(fields["png"]) // 2]
                writer.copy(shards.key(i).split("/")[1], fields)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path) -> Path:
    """A run of seconds with all that a run can have: a stem, Muon and AdamW, two captions, augmentation."""
    return tiny_data / "tiny.yaml"


def _write_tiny_config(folder: Path) -> None:
    from mmvit.data.tokenizers import TokenizerConfig, build_tokenizer

    tokenizer = build_tokenizer(TokenizerConfig("file", str(folder / "tokenizer.json")), 24)
    sizes = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    (folder / "tiny.yaml").write_text(TINY_CONFIG.format(folder=folder, **sizes))


@pytest.fixture(scope="session")
def finished_run(mmvit: Program, tiny_config: Path, built_once: Callable[..., Path]) -> Path:
    """The folder of a finished run of the tiny config; its data are never changed."""

    def build(folder: Path) -> None:
        done = mmvit("pretrain", tiny_config, f"out={folder / 'run'}")
        assert done.returncode == 0, done.stderr

    return built_once("finished", build) / "run"
