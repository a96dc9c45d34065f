"""Embedding folders: the promised layout, a row for each item that can be read, and no two things in one folder."""

import contextlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import mmvit
import mmvit.retrieval.store as store
from data_tools.core.errors import CheckpointError, DataError, UsageError
from data_tools.core.names import restore_name
from data_tools.sample.decode import decode_image
from data_tools.tar.writer import ShardWriter
from mmvit.eval.encoder import Encoder
from mmvit.retrieval.search import Searcher
from mmvit.retrieval.sources import Item, ShardSource, open_source
from mmvit.retrieval.store import embed_source, open_embeddings

RunCli = Callable[..., tuple[int, str, str]]
NUM_ITEMS = 300


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Path:
    return finished_run / "model"


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return mmvit.load(model)


@pytest.fixture
def source(tiny_data: Path) -> ShardSource:
    found = open_source(f"{tiny_data}/train-*.tar")
    assert isinstance(found, ShardSource)
    return found


def picture(shade: int = 0) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (40, 40), (shade, 0, 255 - shade)).save(sink, "PNG")
    return sink.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout(encoder: Encoder, model: Path, source: ShardSource, tmp_path: Path):
    summary = embed_source(encoder, model, source, tmp_path / "e")
    assert summary == (NUM_ITEMS, 0)
    files = [
        "img_emb/img_emb_0.npy",
        "job.json",
        "manifest.json",
        "metadata/metadata_0.parquet",
        "text_emb/text_emb_0.npy",
    ]
    assert sorted(contents(tmp_path / "e")) == files
    table = pq.read_table(tmp_path / "e" / "metadata" / "metadata_0.parquet")
    assert table.column_names == ["image_path", "caption", "meta"]
    samples = [source.shards.read(i) for i in range(NUM_ITEMS)]
    assert table["image_path"].to_pylist() == [sample.key for sample in samples]
    assert table["caption"].to_pylist() == [sample.caption for sample in samples]
    assert [json.loads(meta) for meta in table["meta"].to_pylist()] == [sample.meta for sample in samples]
    for kind in ("img", "text"):
        rows = np.load(tmp_path / "e" / f"{kind}_emb" / f"{kind}_emb_0.npy", allow_pickle=False)
        assert rows.dtype == np.float16
        assert rows.shape == (NUM_ITEMS, 32)
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=2e-3)
        expected = encoder.encode_image([Image.open(io.BytesIO(samples[7].image))])
        if kind == "text":
            expected = encoder.encode_text([samples[7].caption])
        np.testing.assert_allclose(rows[7], expected[0].numpy(), atol=2e-3)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["model_sha256"] == encoder.fingerprint
    assert (manifest["num_rows"], manifest["dim"], manifest["dtype"]) == (NUM_ITEMS, 32, "float16")
    assert (tmp_path / "e" / manifest["model"]).resolve() == model.resolve()


def bad_source(folder: Path, num_good: int) -> ShardSource:
    """Good samples with four bad ones among them."""
    bad = {
        50: {"png": picture()[:60], "txt": "cut"},
        51: {"png": b"GIF89a", "txt": "no image"},
        52: {"png": picture()},
        53: {"txt": "no image"},
    }
    with ShardWriter(folder, max_samples=1000) as writer:
        for i in range(num_good + len(bad)):
            writer.write(f"{i:04d}", bad.get(i) or {"png": picture(i % 256), "txt": f"shade {i}"})
    return ShardSource(sorted(folder.glob("*.tar")))


def test_bad_items_are_listed_and_counted(encoder: Encoder, model: Path, tmp_path: Path):
    source = bad_source(tmp_path / "data", num_good=500)
    summary = embed_source(encoder, model, source, tmp_path / "e")
    assert summary == (500, 4)
    listed = [json.loads(line) for line in (tmp_path / "e/rejected/rejected_0.jsonl").read_text().splitlines()]
    assert [row["key"] for row in listed] == [f"shard-00000.tar/{i:04d}" for i in (50, 51, 52, 53)]
    assert [row["cause"] for row in listed] == ["bad-image", "bad-image", "no-caption", "no-image"]
    assert all("cannot be decoded" in row["what"] for row in listed[:2])
    assert [row["what"] for row in listed[2:]] == ["no caption", "the sample has no image: its fields are: txt"]
    folder = open_embeddings(tmp_path / "e")
    keys = folder.metadata["image_path"].to_pylist()
    assert len(keys) == 500
    assert not {row["key"] for row in listed} & set(keys)
    row = keys.index("shard-00000.tar/0060")  # rows after the bad ones still belong to their metadata
    expected = encoder.encode_image([Image.open(io.BytesIO(picture(60)))])[0].numpy()
    np.testing.assert_allclose(folder.vectors["img"][0][row], expected, atol=2e-3)

    # An image without caption is good enough where only images are wanted.
    assert embed_source(encoder, model, source, tmp_path / "images", "image") == (501, 3)
    assert Searcher(tmp_path / "images", model).search(image=save_picture(tmp_path), k=1)


def save_picture(folder: Path) -> Path:
    (folder / "query.png").write_bytes(picture(9))
    return folder / "query.png"


def test_too_many_bad_items_stop_it(encoder: Encoder, model: Path, tmp_path: Path):
    source = bad_source(tmp_path / "data", num_good=100)
    with pytest.raises(DataError, match="4 of 104 items cannot be embedded") as error:
        embed_source(encoder, model, source, tmp_path / "e")
    assert error.value.where == str(tmp_path / "e" / "rejected")
    with pytest.raises(CheckpointError, match="not finished"):
        open_embeddings(tmp_path / "e")


def test_one_bad_picture_of_a_few_stops_nothing(encoder: Encoder, model: Path, tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(26):
        (folder / f"{i:02d}.png").write_bytes(b"no picture" if i == 7 else picture(i))
    assert embed_source(encoder, model, open_source(str(folder)), tmp_path / "e") == (25, 1)
    assert open_embeddings(tmp_path / "e").manifest["num_rejected"] == 1
    (folder / "08.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="2 of 26 items"):
        embed_source(encoder, model, open_source(str(folder)), tmp_path / "two")
    with pytest.raises(DataError, match="1 of 1 items"):
        embed_source(encoder, model, open_source(str(folder / "07.png")), tmp_path / "none")


def test_originals_are_not_held_together(
    encoder: Encoder, model: Path, source: ShardSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    preprocess = encoder.preprocess
    monkeypatch.setattr(store, "decode_image", lambda *a, **k: done.append("decode") or decode_image(*a, **k))
    monkeypatch.setattr(encoder, "preprocess", lambda image: done.append("preprocess") or preprocess(image))
    embed_source(encoder, model, source, tmp_path / "e", "image")
    assert done == ["decode", "preprocess"] * NUM_ITEMS


def test_a_linked_output_folder_finds_its_model(
    encoder: Encoder, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The path in the manifest holds from where the folder really is, and from any working directory."""
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    embed_source(encoder, Path("model"), open_source(str(save_picture(tmp_path))), Path("link/e"))
    manifest = open_embeddings(tmp_path / "link" / "e").manifest
    assert (tmp_path / "disk" / "deep" / "e" / manifest["model"]).resolve() == model.resolve()
    monkeypatch.chdir("/")
    assert Searcher(tmp_path / "link" / "e").search(text="x", k=1)


class Interrupted(BaseException):
    """Stands for the end of the process."""


def test_interrupted_job_goes_on_with_the_unfinished_part(
    encoder: Encoder, model: Path, source: ShardSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "PART_SIZE", 25)
    embed_source(encoder, model, source, tmp_path / "whole")
    assert (tmp_path / "whole/img_emb/img_emb_11.npy").exists()

    read, was_read = source.read, []
    monkeypatch.setattr(source, "read", lambda i: was_read.append(i) or read(i))
    with monkeypatch.context() as patch:
        patch.setattr(source, "read", lambda i: read(i) if i < 30 else interrupt())
        with pytest.raises(Interrupted):
            embed_source(encoder, model, source, tmp_path / "e")
    with pytest.raises(CheckpointError, match="not finished"):
        open_embeddings(tmp_path / "e")
    embed_source(encoder, model, source, tmp_path / "e")
    assert was_read == list(range(25, NUM_ITEMS))
    assert contents(tmp_path / "e") == contents(tmp_path / "whole")
    embed_source(encoder, model, source, tmp_path / "e")  # finished: nothing is read again
    assert len(was_read) == NUM_ITEMS - 25
    folder = open_embeddings(tmp_path / "e")
    assert sum(map(len, folder.vectors["img"])) == len(folder.metadata) == NUM_ITEMS


def interrupt() -> Item:
    raise Interrupted


def test_folder_of_other_embeddings_is_refused(
    run_cli: RunCli, encoder: Encoder, model: Path, source: ShardSource, tiny_data: Path, tmp_path: Path
):
    embed_source(encoder, model, source, tmp_path / "e", "image")
    before = contents(tmp_path / "e")
    other = Encoder(encoder.model, encoder.tokenizer, image_size=32, fingerprint="0" * 64)
    for change in (
        lambda: embed_source(other, model, source, tmp_path / "e", "image"),
        lambda: embed_source(encoder, model, source, tmp_path / "e", "both"),
        lambda: embed_source(encoder, model, open_source(f"{tiny_data}/val-*.tar"), tmp_path / "e", "image"),
    ):
        with pytest.raises(UsageError, match="other embeddings"):
            change()
    assert contents(tmp_path / "e") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("precious")
    code, _, err = run_cli("embed", model, tiny_data, "--out", tmp_path / "full")
    assert code == 2
    assert "contains other files" in err


def test_start_killed_while_it_claimed_its_folder_does_not_lock_it(
    encoder: Encoder, model: Path, source: ShardSource, tmp_path: Path
):
    (tmp_path / ".job.json.tmp-4711").write_text("half a jo")
    assert embed_source(encoder, model, source, tmp_path).num_rows == NUM_ITEMS


def test_pictures_and_lines(run_cli: RunCli, model: Path, tmp_path: Path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for i in range(3):
        (folder / "deep" / f"{i}.png").write_bytes(picture(i))
    code, out, err = run_cli("embed", model, folder, "--out", tmp_path / "images", "--modality", "image")
    assert code == 0, err
    assert out.strip() == f"{tmp_path / 'images'}: 3 rows, 0 rejected"
    assert open_embeddings(tmp_path / "images").metadata["image_path"].to_pylist() == [
        str(folder / "deep" / f"{i}.png") for i in range(3)
    ]
    (tmp_path / "lines.txt").write_text("a dog\n\na cat\n")
    assert run_cli("embed", model, tmp_path / "lines.txt", "--out", tmp_path / "texts", "--modality", "text")[0] == 0
    texts = open_embeddings(tmp_path / "texts")
    assert texts.metadata["caption"].to_pylist() == ["a dog", "a cat"]
    assert texts.metadata["image_path"].to_pylist() == ["lines.txt:1", "lines.txt:3"]
    assert set(texts.vectors) == {"text"}
    assert [hit.caption for hit in Searcher(tmp_path / "texts").search(text="a cat", k=1)] == ["a cat"]


def test_odd_files_of_a_folder_cost_themselves_alone(
    run_cli: RunCli, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "pictures"
    (folder / ".git").mkdir(parents=True)
    latin = os.fsdecode(b"caf\xe9.png")
    for name in ("0.png", "1.JFIF", ".git/2.png", "._3.png", "notes.txt", "scan.tif", latin):
        (folder / name).write_bytes(picture(5))
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")  # a longer path may be too long for a socket
    code, _, err = run_cli("embed", model, folder, "--out", tmp_path / "e")
    assert (code, "--max-bad 0.572" in err) == (3, True), err
    assert "skipped: 2 x hidden, 1 x .txt, 1 x .tif" in caplog.text
    code, out, err = run_cli("embed", model, folder, "--out", tmp_path / "e", "--max-bad", 0.572)
    assert (code, out.strip()) == (0, f"{tmp_path / 'e'}: 3 rows, 4 rejected"), err
    keys = open_embeddings(tmp_path / "e").metadata["image_path"].to_pylist()
    assert [restore_name(key) for key in keys] == [str(folder / name) for name in ("0.png", "1.JFIF", latin)]
    listed = [json.loads(line) for line in (tmp_path / "e/rejected/rejected_0.jsonl").read_text().splitlines()]
    assert {row["cause"] for row in listed} == {"no-image"}
    causes = {Path(row["key"]).name: row["what"] for row in listed}
    assert "No such file" in causes["gone.jpg"]
    assert "symbolic links" in causes["loop.jpg"]
    assert all("a pipe, socket or device" in causes[name] for name in ("pipe.jpg", "socket.png"))
    code, out, err = run_cli("search", tmp_path / "e", "--image", folder / latin, "-k", 3, "--json")
    assert str(folder / "caf") + r"\\xe9.png" in out
    for name, what in (("pipe.jpg", "a pipe, socket"), ("gone.jpg", "No such file")):
        code, _, err = run_cli("search", tmp_path / "e", "--image", folder / name)
        assert (code, what in err) == (3, True), err
    assert run_cli("embed", model, folder / "pipe.jpg", "--out", tmp_path / "f")[0] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modality", "pictures"], "choose from image, text, both"),
        (["--modality", "text"], "--modality image"),
        (["--modality", "both"], "--modality image"),
    ],
)
def test_what_the_source_cannot_have_is_refused(
    run_cli: RunCli, model: Path, tmp_path: Path, arguments: list[str], message: str
):
    code, _, err = run_cli("embed", model, save_picture(tmp_path), "--out", tmp_path / "e", *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "e").exists()


def test_source_that_is_none_is_refused(run_cli: RunCli, model: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, message in {
        "empty.txt": "the file contains no text",
        "latin.txt": "not UTF-8",
        "folder": "neither shards nor images",
    }.items():
        code, _, err = run_cli("embed", model, tmp_path / name, "--out", tmp_path / "e")
        assert (code, message in err) == (2, True), err
    for name, message in {"none.tar": "no shards found", "a.JPG": "is missing", "b.txt": "is missing"}.items():
        code, _, err = run_cli("embed", model, tmp_path / name, "--out", tmp_path / "e")
        assert (code, message in err) == (3, True), err


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut vectors": lambda folder: (folder / "img_emb/img_emb_0.npy").write_bytes(b"\x93NUMPY"),
    "no vectors": lambda folder: (folder / "img_emb/img_emb_0.npy").unlink(),
    "no metadata": lambda folder: (folder / "metadata/metadata_0.parquet").unlink(),
    "cut metadata": lambda folder: (folder / "metadata/metadata_0.parquet").write_bytes(b"PAR1"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "other shape": lambda folder: np.save(folder / "img_emb/img_emb_0.npy", np.zeros((5, 5), np.float16)),
    "objects": lambda folder: np.save(folder / "img_emb/img_emb_0.npy", np.array([{}]), allow_pickle=True),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_told(
    run_cli: RunCli, encoder: Encoder, model: Path, source: ShardSource, tmp_path: Path, damage: str
):
    embed_source(encoder, model, source, tmp_path / "e", "image")
    DAMAGES[damage](tmp_path / "e")
    code, _, err = run_cli("search", tmp_path / "e", "--text", "dog")
    assert code == (2 if damage == "all gone" else 4), err  # a path that does not exist is a mistyped one
    assert str(tmp_path / "e") in err
    assert "hint:" in err
    assert "Traceback" not in err


def test_torch_is_not_left_in_training_mode(encoder: Encoder):
    assert not encoder.model.training
    assert not encoder.encode_text(["x"]).requires_grad
    assert torch.equal(encoder.encode_text(["x"]), encoder.encode_text(["x"]))
