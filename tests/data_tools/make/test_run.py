"""`mmvit-data make`: every row is a sample or a line of rejected.jsonl, the same whatever happens on the way."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cli.app import app
from data_tools.core.errors import DataError, UsageError
from data_tools.core.names import restore_name
from data_tools.core.program import run_program
from data_tools.make.options import MakeOptions
from data_tools.make.run import MakeReport, check_rejected, describe, make_shards
from data_tools.make.shard import WORK, group_shards, order_rows, plan_shards
from data_tools.sample.content import read_content
from data_tools.sample.decode import decode_image
from data_tools.tar.index import open_indexes
from data_tools.tar.reader import ShardReader
from tests.support.image_files import chunk, jpeg_with, png_with, segment, turned

Make = Callable[..., MakeReport]


def photo(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
    rng = np.random.default_rng(seed)
    waves = np.sin(np.arange(size[0])[None, :, None] / rng.uniform(9, 30, 3) + np.arange(size[1])[:, None, None] / 17)
    pixels = (127 + 90 * waves + rng.normal(0, 6, (size[1], size[0], 1))).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pairs(folder: Path, count: int, size: tuple[int, int] = (64, 48)) -> Path:
    for i in range(count):
        photo(folder / f"{i % 3}" / f"p{i:03d}.{('jpg', 'png', 'webp')[i % 3]}", i, size)
        (folder / f"{i % 3}" / f"p{i:03d}.txt").write_text(f"photo {i}\n")
    return folder


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    """Return key -> fields of all samples, texts decoded."""
    reader = ShardReader(open_indexes(sorted(folder.glob("*.tar"))), verify=True)
    found = {}
    for number, index in enumerate(reader.indexes):
        for i in range(len(index)):
            fields = reader.fields(number, i)
            assert read_content(fields, usual=index.fields, decode=True).fault is None
            found[index.key(i)] = {
                name: json.loads(data) if name in ("json", "cls") else data.decode() if name == "txt" else data
                for name, data in fields.items()
            }
    return found


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="ascii").splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files but the indexes, which record the time of their tar."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".idx"}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `mmvit-data make` in this process, which saves its start; returns exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_program(app, "mmvit-data", ["make", *map(str, arguments)])
        output = capfd.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return call


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def call(source: Path, out: str = "out", **options: Any) -> MakeReport:
        return make_shards(source, tmp_path / out, MakeOptions(**options), num_workers=1)

    return call


def test_original_bytes_with_captions_and_metadata(tmp_path: Path, make: Make):
    source = pairs(tmp_path / "in", 6)
    (source / "0" / "p003.json").write_text(json.dumps({"license": "by", "url": "http://x/3", "score": 0.5}))
    (source / "readme.md").write_text("not a sample")
    (source / "alone.txt").write_text("no image")
    (source / ".hidden.jpg").write_bytes(b"")
    (source / "loop").symlink_to(source)
    report = make(source, shard_size=4)
    found = samples(tmp_path / "out")
    assert list(found) == [f"{i:09d}" for i in range(6)]
    names = ["0/p000.jpg", "0/p003.jpg", "1/p001.png", "1/p004.png", "2/p002.webp", "2/p005.webp"]
    for name, sample in zip(names, found.values(), strict=True):
        assert sample[name.rpartition(".")[2]] == (source / name).read_bytes()
        assert sample["txt"] == f"photo {int(name[3:6])}"
        assert sample["json"]["source"] == name
    assert found["000000001"]["json"] == {"license": "by", "url": "http://x/3", "score": 0.5, "source": "0/p003.jpg"}
    assert (report.num_rows, report.num_samples, report.num_shards, report.rejected) == (6, 6, 2, {})
    assert report.left_aside == {".md": 1, ".txt without an image": 1, "hidden": 1, "link to a folder": 1}
    assert rejected(tmp_path / "out") == []


def test_class_folders_are_shuffled_and_numbered(tmp_path: Path, make: Make):
    for i in range(30):
        photo(tmp_path / "in" / ("cat", "dog bed", "ant")[i // 10] / "deep" / f"{i}.png", i, (16, 16))
    report = make(tmp_path / "in", template="a photo of a {}")
    found = samples(tmp_path / "out")
    assert (tmp_path / "out" / "classnames.txt").read_text() == "ant\ncat\ndog bed\n"
    names = ["ant", "cat", "dog bed"]
    for sample in found.values():
        name = names[sample["cls"]]
        assert sample["txt"] == f"a photo of a {name}"
        assert sample["json"]["source"].startswith(f"{name}/deep/")
        assert sample["png"] == (tmp_path / "in" / sample["json"]["source"]).read_bytes()
    labels = [sample["cls"] for sample in found.values()]
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 10  # 2 in the order of the folders
    assert (report.kind, report.num_classes) == ("classes", 3)

    make(tmp_path / "in", "in-order", in_order=True)
    in_order = [sample["cls"] for sample in samples(tmp_path / "in-order").values()]
    assert in_order == sorted(in_order)
    assert {sample["txt"] for sample in samples(tmp_path / "in-order").values()} == set(names)

    make(tmp_path / "in", "bare", captions=False, shuffle=7)
    bare = samples(tmp_path / "bare")
    assert all(set(sample) == {"cls", "json", "png"} for sample in bare.values())
    assert [sample["cls"] for sample in bare.values()] != labels


def test_classes_of_another_split_keep_their_numbers(tmp_path: Path, make: Make):
    for i, name in enumerate(("dog", "zebra", "elk")):
        photo(tmp_path / "in" / name / "p.png", i, (8, 8))
    (tmp_path / "names.txt").write_text("ant\ndog\nelk\n")
    make(tmp_path / "in", classnames=tmp_path / "names.txt")
    found = [(sample["txt"], sample["cls"]) for sample in samples(tmp_path / "out").values()]
    assert sorted(found) == [("dog", 1), ("elk", 2)]
    (entry,) = rejected(tmp_path / "out")
    assert (entry["cause"], entry["source"]) == ("bad-label", "zebra/p.png")
    assert (tmp_path / "out" / "classnames.txt").read_text() == "ant\ndog\nelk\n"


def test_each_bad_row_is_told_with_its_cause(tmp_path: Path, make: Make):
    source = pairs(tmp_path / "in", 3) / "0"
    whole = photo(tmp_path / "whole.jpg", 1, (320, 240)).read_bytes()
    bad = {
        "a_cut.jpg": (whole[: len(whole) // 2], b"x", "bad-image"),
        "b_html.jpg": (b"<!DOCTYPE html><p>404", b"x", "bad-image"),
        "c_empty.jpg": (b"", b"x", "no-image"),
        "d_blank.jpg": (whole, b" \n", "empty-caption"),
        "e_latin.jpg": (whole, "caf\u00e9".encode("latin-1"), "not-utf8"),
        "f_nul.jpg": (whole, b"a\0b", "not-utf8"),
        "g_none.jpg": (whole, None, "no-caption"),
        "h_anim.gif": (b"GIF89a", b"x", "bad-image"),
    }
    for name, (data, text, _) in bad.items():
        (source / name).write_bytes(data)
        if text is not None:
            (source / name).with_suffix(".txt").write_bytes(text)
    (source / "i_json.jpg").write_bytes(whole)
    (source / "i_json.txt").write_text("x")
    (source / "i_json.json").write_text("[1]")
    (source / "k_deep.jpg").write_bytes(whole)
    (source / "k_deep.txt").write_text("x")
    (source / "k_deep.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    (source / "j_huge.png").write_bytes(huge_png())
    (source / "j_huge.txt").write_text("x")
    report = make(tmp_path / "in", shard_size=5)
    entries = {Path(entry["source"]).name: entry for entry in rejected(tmp_path / "out")}
    causes = {name: cause for name, (_, _, cause) in bad.items()} | {
        "i_json.jpg": "bad-json",
        "j_huge.png": "too-large",
        "k_deep.jpg": "bad-json",
    }
    assert {name: entry["cause"] for name, entry in entries.items()} == causes
    assert "HTML" in entries["b_html.jpg"]["what"]
    assert "--allow-formats gif" in entries["h_anim.gif"]["what"]
    assert report.num_rows == len(causes) + 3 == report.num_rejected + report.num_samples
    found = samples(tmp_path / "out")
    assert set(found).isdisjoint(entry["key"] for entry in entries.values())
    rows = {entry["row"] for entry in entries.values()} | {int(key) for key in found}
    assert rows == set(range(report.num_rows))
    assert not (tmp_path / "out" / "shard-00001.tar").exists()  # all its rows were rejected
    with pytest.raises(DataError, match="11 of 14 rows") as error:
        check_rejected(report, 0.01)
    assert "a_cut.jpg" in str(error.value)
    assert "--max-bad 0.786" in str(error.value)
    check_rejected(report, 0.786)


def huge_png() -> bytes:
    """A PNG of 10,000 x 10,000 px in 12 KB, which would unfold to 300 MB."""
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


def test_paths_do_not_leave_the_folder(tmp_path: Path, make: Make):
    secret = photo(tmp_path / "secret.png", 1)
    inside = photo(tmp_path / "in" / "a.png", 2)
    (tmp_path / "in" / "link.png").symlink_to(secret)
    (tmp_path / "in" / "near.png").symlink_to("a.png")
    os.mkfifo(tmp_path / "in" / "fifo.png")
    names = ["a.png", str(inside), "near.png"]
    bad = ["../secret.png", str(secret), "link.png", "x/../../secret.png", "fifo.png", "a\0.png"]
    table = tmp_path / "in" / "t.jsonl"
    table.write_text("".join(json.dumps({"image": name, "text": "x"}) + "\n" for name in [*names, *bad]))
    report = make(table)
    assert [sample["json"]["source"] for sample in samples(tmp_path / "out").values()] == names
    assert [entry["cause"] for entry in rejected(tmp_path / "out")] == ["no-image"] * 6
    assert sum("outside of" in entry["what"] for entry in rejected(tmp_path / "out")) == 4
    assert report.num_rejected == 6
    make(table, "root", image_root=tmp_path)
    names = [sample["json"]["source"] for sample in samples(tmp_path / "root").values()]
    assert names == [str(inside), str(secret)]

    make(tmp_path / "in", "folder", captions=False)
    assert [sample["json"]["source"] for sample in samples(tmp_path / "folder").values()] == ["a.png", "near.png"]
    make(tmp_path / "in", "allowed", captions=False, image_root=tmp_path)
    assert len(samples(tmp_path / "allowed")) == 3


def test_resized_and_encoded_only_where_asked(tmp_path: Path, make: Make):
    sizes = {"large.jpg": (640, 320), "small.jpg": (80, 60), "large.png": (100, 200), "square.webp": (300, 300)}
    for i, (name, size) in enumerate(sizes.items()):
        photo(tmp_path / "in" / name, i, size)
    (tmp_path / "in" / "large.json").write_text('{"width": 640, "height": 320, "caption": "x"}')
    make(tmp_path / "in", "kept", resize=100, captions=False)
    kept = {sample["json"]["source"]: sample for sample in samples(tmp_path / "kept").values()}
    assert kept["large.jpg"]["json"]["width"] == 200
    assert kept["square.webp"]["json"] == {"source": "square.webp"}
    for name in ("small.jpg", "large.png"):
        assert kept[name][name[-3:]] == (tmp_path / "in" / name).read_bytes()
    assert size_of(kept["large.jpg"]["jpg"]) == ("JPEG", 200, 100)
    assert size_of(kept["square.webp"]["webp"]) == ("WEBP", 100, 100)
    with Image.open(tmp_path / "in" / "large.jpg") as image:
        wanted = np.asarray(image.resize((200, 100), Image.Resampling.BICUBIC), float)
    assert np.abs(pixels(kept["large.jpg"]["jpg"]) - wanted).mean() < 3

    make(tmp_path / "in", "small", resize=50, captions=False)
    small = next(sample["png"] for sample in samples(tmp_path / "small").values() if "png" in sample)
    with Image.open(tmp_path / "in" / "large.png") as image:
        wanted = np.asarray(image.resize((50, 100), Image.Resampling.BICUBIC), float)
    assert np.array_equal(pixels(small), wanted)

    Image.new("RGB", (9, 9), "red").save(tmp_path / "in" / "z.gif")
    Image.new("RGBA", (9, 9)).save(tmp_path / "in" / "z_clear.png")
    make(tmp_path / "in", "jpg", image_format="jpg", allow_formats=("gif",), captions=False)
    encoded = {sample["json"]["source"]: sample["jpg"] for sample in samples(tmp_path / "jpg").values()}
    assert set(encoded) == {*sizes, "z.gif", "z_clear.png"}
    assert encoded["small.jpg"] == (tmp_path / "in" / "small.jpg").read_bytes()
    assert size_of(encoded["square.webp"]) == ("JPEG", 300, 300)
    assert pixels(encoded["z.gif"]).mean(axis=(0, 1)) == pytest.approx([254, 0, 0], abs=2)
    assert pixels(encoded["z_clear.png"]).mean() == 255  # transparency is laid on white
    photo(tmp_path / "wide" / "a.png", 1, (16_400, 8))
    report = make(tmp_path / "wide", "webp", image_format="webp", captions=False)
    assert report.rejected == {"too-large": 1}
    with pytest.raises(DataError, match="none of 1 rows could be converted to a sample"):
        check_rejected(report, 1.0)  # nothing is left
    with pytest.raises(UsageError, match="re-encoded"):
        make(tmp_path / "in", "x", allow_formats=("gif",))


def test_resized_images_are_stored_upright(tmp_path: Path, make: Make):
    for orientation in range(1, 9):
        for name, data in (
            (f"{orientation}.jpg", jpeg_with(segment(0xE1, b"Exif\0\0" + turned(orientation)))),
            (f"{orientation}.png", png_with(after=chunk(b"eXIf", turned(orientation)))),
        ):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / name).write_bytes(data)
    make(tmp_path / "in", "kept", captions=False)
    make(tmp_path / "in", "small", resize=8, captions=False)
    originals = {sample["json"]["source"]: sample for sample in samples(tmp_path / "kept").values()}
    small = {sample["json"]["source"]: sample for sample in samples(tmp_path / "small").values()}
    assert len(originals) == len(small) == 16
    for name, sample in small.items():
        assert originals[name][name[2:]] == (tmp_path / "in" / name).read_bytes()
        upright = decode_image(originals[name][name[2:]])
        assert Image.open(io.BytesIO(sample[name[2:]])).getexif() == {}
        wanted = np.asarray(upright.resize((12, 8) if int(name[0]) < 5 else (8, 12), Image.Resampling.BICUBIC), float)
        assert np.abs(pixels(sample[name[2:]]) - wanted).mean() < 6


def size_of(data: bytes) -> tuple[str | None, int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.format, *image.size


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), float)


def test_the_same_bytes_for_any_number_of_workers(tmp_path: Path):
    source = pairs(tmp_path / "in", 20)
    (source / "0" / "p000.jpg").write_bytes(b"broken")
    made = {}
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        make_shards(source, out, MakeOptions(shard_size=3, shuffle=5), num_workers=workers)
        made[workers] = files(out)
    assert made[1] == made[2]
    assert len(made[1]) == 7 + 2
    order = [sample["json"]["source"] for sample in samples(out).values()]
    assert sorted(order) != order


def test_killed_and_run_again_it_goes_on(tmp_path: Path):
    source = pairs(tmp_path / "in", 50)
    (source / "2" / "p002.webp").write_bytes(b"broken")
    options = MakeOptions(shard_size=1)
    make_shards(source, tmp_path / "whole", options, num_workers=1)
    for attempt in range(5):  # on a busy machine a kill may come too late
        out = tmp_path / f"out{attempt}"
        start_and_kill(source, out)
        if len(list(out.glob("*.tar"))) < 49:
            break
    recorded = [out / f"{path.stem}.tar" for path in (out / WORK).glob("shard-*.json")]
    finished = {path: path.stat().st_mtime_ns for path in recorded if path.exists()}
    assert 0 < len(finished) < 49
    assert not (out / "rejected.jsonl").exists()

    (out / ".shard-00049.tar.tmp-1").write_bytes(b"left by the kill")
    report = make_shards(source, out, options, num_workers=1)
    assert 0 < report.num_made < report.num_samples == 49
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files(out) == files(tmp_path / "whole")

    again = make_shards(source, out, options, num_workers=1)
    assert (again.num_made, again.num_samples, again.rejected) == (0, 49, {"bad-image": 1})
    assert "there already" in describe(again)


def start_and_kill(source: Path, out: Path) -> None:
    command = [sys.executable, "-m", "data_tools", "make", str(source), str(out), "--shard-size", "1", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list((out / WORK).glob("shard-*.json"))) >= 3 or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # none waits for ever


def wait_until(true: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_unrecorded_shard_is_made_again(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch):
    source = pairs(tmp_path / "in", 6)
    make(source, "whole", shard_size=2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.make.run._finish", stop)
    with pytest.raises(KeyboardInterrupt):
        make(source, shard_size=2)
    monkeypatch.undo()
    out = tmp_path / "out"
    (out / WORK / "shard-00001.json").unlink()  # as killed between the shard and its record
    (out / "shard-00002.tar").write_bytes(b"cut")
    assert make(source, shard_size=2).num_made == 4
    assert files(out) == files(tmp_path / "whole")


def test_the_folder_of_other_work_is_left_alone(tmp_path: Path, make: Make):
    source = pairs(tmp_path / "in", 3)
    make(source)
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="differs in: quality, shard_size"):
        make(source, shard_size=7, quality=50)
    photo(source / "new.jpg", 9)
    with pytest.raises(UsageError, match="source_content"):
        make(source)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(UsageError, match="contains other files"):
        make(source, "other")
    with pytest.raises(UsageError, match="is inside the source"):
        make(source, "in/out")
    assert files(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "other"}


def test_two_processes_do_not_make_one_folder(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch):
    source = pairs(tmp_path / "in", 3)

    def second(*_: object) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(make, source).result()

    monkeypatch.setattr("data_tools.make.run._finish", second)
    with pytest.raises(UsageError, match=f"written by process {os.getpid()}"):
        make(source)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "folders"}, "did you mean 'folder'"),
        ({"image_format": "gif"}, "keep|jpg|png|webp"),
        ({"image_format": "jpg", "allow_formats": ("svg",)}, "gif,bmp,tiff"),
        ({"shard_size": 0}, "at least 1"),
        ({"quality": 101}, "1 to 100"),
        ({"shuffle": 1, "in_order": True}, "contradict"),
        ({"template": "a photo"}, "no place for the name"),
        ({"template": "a {}"}, "need labels"),
        ({"template": "a {}", "captions": False}, "contradicts"),
        ({"caption_column": "text"}, "only tables have columns"),
        ({"image_root": Path("nowhere")}, "--image-root nowhere is not a folder"),
    ],
)
def test_bad_options_start_nothing(tmp_path: Path, make: Make, options: dict[str, Any], told: str):
    source = pairs(tmp_path / "in", 2)
    with pytest.raises(UsageError) as error:
        make(source, **options)
    assert told in str(error.value)
    assert not (tmp_path / "out").exists()


def test_neighbouring_shards_of_large_parquet_groups_are_read_together():
    jobs = plan_shards(order_rows(10, None), 2)
    assert [len(run) for run in group_shards(jobs, None, 2)] == [1] * 5
    assert [[job.number for job in run] for run in group_shards(jobs, 40, 2)] == [[0, 1, 2], [3, 4]]
    assert [[job.number for job in run] for run in group_shards(jobs[:1] + jobs[2:], 40, 2)] == [[0], [2, 3, 4]]
    assert sorted(order_rows(1000, 3).tolist()) == list(range(1000))
    assert order_rows(5, 0).tolist() == [3, 2, 1, 0, 4]  # the same for ever


def test_the_program(tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    source = pairs(tmp_path / "in", 9)
    (source / "1" / "p001.png").write_bytes(b"broken")
    code, out, err = run(source, tmp_path / "out", "--workers", 1, "--json")
    document = json.loads(out)
    assert code == 3
    assert (document["num_samples"], document["num_rows"], document["rejected"]) == (8, 9, {"bad-image": 1})
    assert "1 of 9 rows were rejected" in err
    assert "the shards contain the other 8 samples, but are not marked as finished" in err
    code, out, err = run(source, tmp_path / "out", "--max-bad", 0.2)
    assert code == 0, err
    assert "made 0 samples" in out  # what was written before is accepted
    code, out, err = run(source, tmp_path / "out", "--max-bad", 0.2)
    for part in ("8 samples in 1 shards", "there already", "p001.png", f"mmvit-data stats {tmp_path / 'out'}"):
        assert part in out
    code, out, err = run(tmp_path / "none", tmp_path / "new")
    assert (code, out, "does not exist" in err, (tmp_path / "new").exists()) == (3, "", True, False)
    code, _, err = run(source, tmp_path / "new", "--label-column", "x", "--template", "{}")
    assert (code, "only tables have columns" in err) == (2, True)


def test_a_failed_make_is_not_finished_work(tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    source = pairs(tmp_path / "in", 9)
    broken = [source / "1" / "p001.png", source / "0" / "p000.jpg"]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"broken")
    command = (source, tmp_path / "out", "--shard-size", 3, "--workers", 1)
    assert run(*command)[0] == 3
    kept = (tmp_path / "out" / "shard-00002.tar").stat().st_mtime_ns
    assert run(*command)[0] == 3
    for path, data in zip(broken, whole, strict=True):
        path.write_bytes(data)
    code, out, err = run(*command)
    assert (code, "9 samples in 3 shards" in out) == (0, True), err
    assert (tmp_path / "out" / "shard-00002.tar").stat().st_mtime_ns == kept  # it had no rejected row
    make_shards(source, tmp_path / "new", MakeOptions(shard_size=3), num_workers=1)
    assert {k: v for k, v in files(tmp_path / "out").items() if k.endswith("tar")} == {
        k: v for k, v in files(tmp_path / "new").items() if k.endswith("tar")
    }


def test_a_refused_make_leaves_nothing_behind(tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    photo(tmp_path / "in" / "Images" / "a.png", 1)
    assert run(tmp_path / "in", tmp_path / "out")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert run(tmp_path / "in", tmp_path / "out", "--kind", "classes")[0] == 0


def test_odd_files_cost_their_own_rows(tmp_path: Path, run: Callable[..., tuple[int, str, str]]):
    source = pairs(tmp_path / "in", 3)
    latin = os.fsdecode(b"caf\xe9.png")
    photo(source / "1" / "p.png", 5).rename(source / "1" / latin)
    (source / "1" / latin).with_suffix(".txt").write_text("coffee")
    (source / "1" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(source / "1" / "pipe.jpg")
    (source / "0" / os.fsdecode(b"\xff.jpg")).write_bytes(b"broken")
    (source / "1" / "loop").symlink_to(source / "1" / "loop")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="strict")
    code, out, err = run(source, tmp_path / "out", "--max-bad", 0.5, "--workers", 1)
    assert code == 0, err
    assert r"\udcff.jpg" in out
    found = {sample["txt"]: sample["json"]["source"] for sample in samples(tmp_path / "out").values()}
    assert os.fsencode(restore_name(found["coffee"])) == b"1/caf\xe9.png"
    told = {entry["source"]: entry["what"] for entry in rejected(tmp_path / "out")}
    assert "No such file" in told["1/gone.jpg"]
    assert told["1/pipe.jpg"] == "it is not a file but a pipe, socket or device"
    assert len(told) == 3


def test_texts_are_found_in_any_case_and_after_the_whole_name(tmp_path: Path, make: Make):
    source = tmp_path / "in"
    for i, name in enumerate(("1.JPG", "2.jpg", "3.jpg", "4.png", "5.jpg")):
        photo(source / name, i, (8, 8))
    texts = {"1.TXT": "one", "2.jpg.txt": "two", "3.txt": "x", "3.jpg.Txt": "y", "4.png.JSON": '{"text": "four"}'}
    for name, text in {**texts, "5.txt": "five", "5.json": '{"a": 1}', "6.jpg.txt": "alone"}.items():
        (source / name).write_text(text)
    report = make(source)
    found = {sample["json"]["source"]: sample["txt"] for sample in samples(tmp_path / "out").values()}
    assert found == {"1.JPG": "one", "2.jpg": "two", "4.png": "four", "5.jpg": "five"}
    (entry,) = rejected(tmp_path / "out")
    assert (entry["source"], entry["cause"]) == ("3.jpg", "double-field")
    assert "3.jpg.Txt or 3.txt" in entry["what"]
    assert report.left_aside == {".txt without an image": 1}
