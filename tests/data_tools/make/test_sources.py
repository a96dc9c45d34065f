"""Each kind of source is recognised, read lazily and in full; what is missing of it is told."""

import csv
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from data_tools.core.errors import DataError, UsageError
from data_tools.make.guess import find_kind
from data_tools.make.options import KINDS, MakeOptions
from data_tools.make.run import MakeReport, make_shards
from data_tools.make.tables import Columns, open_parquet, pack
from data_tools.tar.index import open_indexes
from data_tools.tar.reader import ShardReader

Make = Callable[..., MakeReport]


def photo_bytes(seed: int, kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 200, 40)[:, None, None] + rng.normal(20, 8, (40, 48, 3))
    buffer = io.BytesIO()
    Image.fromarray(rows.clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


PHOTOS = [photo_bytes(i) for i in range(6)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with the images p0.jpg .. p5.jpg in `images/`, for tables beside it."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    for i, data in enumerate(PHOTOS):
        (tmp_path / "in" / "images" / f"p{i}.jpg").write_bytes(data)
    return tmp_path / "in"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def call(source: Path, out: str = "out", workers: int = 1, **options: Any) -> MakeReport:
        return make_shards(source, tmp_path / out, MakeOptions(**options), num_workers=workers)

    return call


def samples(folder: Path) -> list[dict[str, Any]]:
    reader = ShardReader(open_indexes(sorted(folder.glob("*.tar"))), verify=True)
    found = []
    for number, index in enumerate(reader.indexes):
        for i in range(len(index)):
            fields = reader.fields(number, i)
            sample: dict[str, Any] = {"key": index.key(i), **fields, "json": json.loads(fields["json"])}
            found.append(sample | {name: fields[name].decode() for name in ("txt", "cls") if name in fields})
    return found


def rejected(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="ascii").splitlines()]


def write_csv(path: Path, rows: list[list[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_csv(tmp_path: Path, pictures: Path, make: Make, suffix: str, delimiter: str):
    rows: list[list[object]] = [["FilePath", "Title", "license", "n"]]
    rows += [[f"images/p{i}.jpg", f'caf\u00e9, "{i}";\ttwo\nlines', "by", i] for i in range(6)]
    table = write_csv(pictures / f"t{suffix}", rows, delimiter)
    report = make(table)
    found = samples(tmp_path / "out")
    assert [sample["jpg"] for sample in found] == PHOTOS
    assert found[3]["txt"] == 'caf\u00e9, "3";\ttwo\nlines'
    assert found[3]["json"] == {"license": "by", "n": "3", "source": "images/p3.jpg"}
    assert (report.num_samples, report.rejected) == (6, {})
    assert report.notes == ["columns: images 'FilePath', captions 'Title', labels none; kept as metadata: license, n"]


def test_csv_rows_that_are_broken(tmp_path: Path, pictures: Path, make: Make):
    table = pictures / "t.csv"
    lines = [
        b"image,caption",
        b"images/p0.jpg,fine",
        b"images/p1.jpg,a,b",
        b"images/p2.jpg,caf\xe9",
        b"",
        b"images/none.jpg,x",
        b"https://example.org/p.jpg,x",
        b",x",
        b"images/p3.jpg,",
        b"images/p4.jpg,fine",
    ]
    table.write_bytes(b"\n".join(lines))
    make(table)
    assert [sample["jpg"] for sample in samples(tmp_path / "out")] == [PHOTOS[0], PHOTOS[4]]
    entries = rejected(tmp_path / "out")
    causes = [(1, "damaged"), (2, "not-utf8"), *((row, "no-image") for row in (3, 4, 5)), (6, "empty-caption")]
    assert [(entry["row"], entry["cause"]) for entry in entries] == causes
    assert entries[0]["what"] == "line 3 has 3 columns, the first line 2"
    assert "URL" in entries[3]["what"]


def test_a_stray_quote_costs_its_own_row_only(tmp_path: Path, pictures: Path, make: Make):
    table = pictures / "t.csv"
    captions = ["one", '"a 5 inch nail', "three", '"two\nlines, ""quoted"""', 'she said "hi" twice', "six"]
    table.write_text("image,caption\n" + "".join(f"images/p{i}.jpg,{text}\n" for i, text in enumerate(captions)))
    for last in ("", 'images/p0.jpg,"open at the end'):
        table.write_text(table.read_text() + last)
        make(table, f"out{len(last)}")
        found = [sample["txt"] for sample in samples(tmp_path / f"out{len(last)}")]
        assert found == ["one", "three", 'two\nlines, "quoted"', 'she said "hi" twice', "six"]
        told = [(entry["cause"], entry["what"][:7]) for entry in rejected(tmp_path / f"out{len(last)}")]
        assert told == [("damaged", "line 3:"), ("damaged", "line 9:")][: 1 + bool(last)]


def test_jsonl_with_several_captions_and_labels(tmp_path: Path, pictures: Path, make: Make):
    names = ["dog", "ant", "dog", "cat", "", "ant"]
    rows: list[Any] = [
        {"path": f"images/p{i}.jpg", "captions": [f"one {i}", "two", " ", f"one {i}"], "class": name}
        for i, name in enumerate(names)
    ]
    rows[1] |= {"captions": "only", "nested": {"a": [1, float("nan")], "half": "\ud800"}}
    rows[2] |= {"captions": 7}
    table = pictures / "t.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in [*rows, [1]]) + '{"path": \n{"path": ' + "[" * 100_000 + "\n"
    table.write_text("\ufeff" + text, encoding="utf-8")
    report = make(table, in_order=True)
    found = samples(tmp_path / "out")
    assert [(sample["txt"], sample["cls"]) for sample in found] == [
        *(("one 0", "2"), ("only", "0"), ("7", "2"), ("one 3", "1"), ("one 5", "0"))
    ]
    assert found[0]["json"] == {"captions": ["one 0", "two"], "source": "images/p0.jpg"}
    assert found[1]["json"]["nested"] == {"a": [1, None], "half": "?"}
    assert (tmp_path / "out" / "classnames.txt").read_text() == "ant\ncat\ndog\n"
    assert [(entry["row"], entry["cause"]) for entry in rejected(tmp_path / "out")] == [
        *((4, "bad-label"), (6, "bad-json"), (7, "bad-json"), (8, "bad-json"))
    ]
    assert report.num_rows == 9

    make(table, "chosen", caption_column="class,path", label_column="")
    chosen = samples(tmp_path / "chosen")
    assert chosen[0]["json"]["captions"] == ["dog", "images/p0.jpg"]
    assert all("cls" not in sample for sample in chosen)


def test_labels_that_are_numbers(tmp_path: Path, pictures: Path, make: Make):
    labels = [3, "1", 2.0, -1, None, 0, float("nan")]
    table = pictures / "t.jsonl"
    rows = [{"image": f"images/p{i % 6}.jpg", "label": label} for i, label in enumerate(labels)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make(table, in_order=True)
    found = samples(tmp_path / "out")
    assert [sample["cls"] for sample in found] == ["3", "1", "2", "0"]
    assert all("txt" not in sample for sample in found)
    assert {entry["cause"] for entry in rejected(tmp_path / "out")} == {"bad-label"}
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    make(table, "named", in_order=True, classnames=tmp_path / "names.txt", template="a photo of {}")
    assert [sample["txt"] for sample in samples(tmp_path / "named")] == [f"a photo of {name}" for name in "bca"]
    with pytest.raises(UsageError, match="no names for the template"):
        make(table, "x", template="a photo of {}")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "packed", "arrow"])
def test_labels_that_are_numbers_as_text(tmp_path: Path, pictures: Path, make: Make, form: str):
    labels = ["10", "2", "007", "-2", "3.0", "0"]
    table = pa.table({"image": [f"images/p{i}.jpg" for i in range(6)], "label": labels})
    source = pictures / f"t.{form}"
    if form == "csv":
        write_csv(source, [["image", "label"], *([row["image"], row["label"]] for row in table.to_pylist())])
    elif form == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif form == "parquet":
        parquet.write_table(table, source)
    else:
        table = pa.table({"image": [{"bytes": data, "path": None} for data in PHOTOS], "label": labels})
        source = pictures / "t.parquet"
        if form == "arrow":
            source = save_to_disk(tmp_path / "saved", table, {})
        else:
            parquet.write_table(table, source)
    report = make(source, in_order=True, classnames=None)
    assert [sample["cls"] for sample in samples(tmp_path / "out")] == ["10", "2", "7", "3", "0"]
    assert report.num_classes == 0
    (entry,) = rejected(tmp_path / "out")
    assert entry["what"] == "'-2' is not a class number, which starts at 0"
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in ["2", "10", *range(20, 29)]))
    make(source, "named", in_order=True, classnames=tmp_path / "names.txt")  # a name wins over a number
    assert [sample["cls"] for sample in samples(tmp_path / "named")] == ["1", "0", "7", "3", "0"]


def test_numbers_among_other_class_names_are_reported(tmp_path: Path, pictures: Path, make: Make):
    rows: list[list[object]] = [["image", "label"], *([f"images/p{i}.jpg", i if i else "cat"] for i in range(3))]
    report = make(write_csv(pictures / "t.csv", rows), in_order=True)
    assert [sample["cls"] for sample in samples(tmp_path / "out")] == ["2", "0", "1"]
    assert any(note.startswith("renumbered: '1' is class 0, '2' is class 1;") for note in report.notes)


def test_columns_that_are_not_known(pictures: Path, make: Make):
    table = write_csv(pictures / "t.csv", [["bild", "worte"], ["images/p0.jpg", "x"]])
    with pytest.raises(UsageError) as error:
        make(table)
    assert "columns found: bild, worte" in str(error.value)
    assert "--image-column NAME" in str(error.value)
    with pytest.raises(UsageError, match="--caption-column NAME, or --no-captions"):
        make(table, image_column="bild")
    with pytest.raises(UsageError, match=r"(?s)no column 'wort'.*did you mean 'worte'"):
        make(table, image_column="bild", caption_column="wort")
    assert make(table, image_column="bild", caption_column="worte").num_samples == 1

    urls = write_csv(pictures / "u.csv", [["url", "TEXT"], ["http://x/p.jpg", "x"]])
    with pytest.raises(UsageError) as error:
        make(urls)
    assert f"img2dataset --url_list {urls} --input_format csv --url_col url --caption_col TEXT" in str(error.value)
    for text in ("", "a,a\n1,2\n"):
        (pictures / "empty.csv").write_text(text)
        with pytest.raises(DataError, match="first line"):
            make(pictures / "empty.csv")
    (pictures / "header.csv").write_text("image,text\n")
    with pytest.raises(DataError, match="contains no image"):
        make(pictures / "header.csv")


def photo_table(**columns: list[Any]) -> pa.Table:
    image = pa.array([{"bytes": data, "path": f"p{i}.jpg"} for i, data in enumerate(PHOTOS)])
    return pa.table({"image": image, **columns})


def test_parquet_with_pictures_in_several_files_and_groups(tmp_path: Path, make: Make):
    folder = tmp_path / "in"
    folder.mkdir()
    table = photo_table(text=[f"photo {i}" for i in range(6)], day=[date(2020, 1, i + 1) for i in range(6)])
    parquet.write_table(table.slice(0, 4), folder / "train-0.parquet", row_group_size=3)
    parquet.write_table(table.slice(4), folder / "train-1.parquet")
    for workers in (1, 2):
        report = make(folder, f"out{workers}", workers, shard_size=2)
        found = samples(tmp_path / f"out{workers}")
        assert [sample["jpg"] for sample in found] == PHOTOS
        assert [sample["txt"] for sample in found] == [f"photo {i}" for i in range(6)]
        assert found[5]["json"] == {"day": "2020-01-06", "source": "p5.jpg"}
        assert (report.kind, report.num_shards) == ("parquet", 3)
    with pytest.raises(UsageError, match="reshard"):
        make(folder, "x", shuffle=1)
    make(folder, "one", shard_size=1)
    assert [sample["jpg"] for sample in samples(tmp_path / "one")] == PHOTOS
    packed = pack(open_parquet(sorted(folder.iterdir())), Columns("image", ("text",), None))
    for first, last in (1, 1), (2, 4), (5, 5):  # as of a run that goes on
        rows = packed.rows(range(first, last + 1))
        assert [row.captions for row in rows] == [(f"photo {i}",) for i in range(first, last + 1)]

    parquet.write_table(table, folder / "test-0.parquet")
    with pytest.raises(UsageError, match=r"(?s)several data sets: test, train.*test\*\.parquet' OUT"):
        make(folder, "x")
    assert make(folder / "train-*.parquet", "x").num_samples == 6
    (folder / "test-0.parquet").unlink()

    parquet.write_table(table.drop_columns("day"), folder / "train-2.parquet")
    with pytest.raises(DataError, match=r"(?s)other columns than train-0.*train-2"):
        make(folder, "y")
    (folder / "train-2.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a parquet"):
        make(folder, "y")


def test_parquet_with_paths_and_with_plain_bytes(tmp_path: Path, pictures: Path, make: Make):
    parquet.write_table(
        pa.table({"file_name": [f"images/p{i}.jpg" for i in range(6)], "caption": ["x"] * 6, "hash": [b"\xff"] * 6}),
        pictures / "paths.parquet",
    )
    make(pictures / "paths.parquet", "paths", image_column="file_name", shuffle=3)
    found = samples(tmp_path / "paths")
    assert sorted(sample["jpg"] for sample in found) == sorted(PHOTOS)
    assert [sample["jpg"] for sample in found] != PHOTOS
    assert set(found[0]["json"]) == {"source"}

    parquet.write_table(pa.table({"caption": list("abcdef"), "jpg": [*PHOTOS[:5], None]}), pictures / "b.parquet")
    make(pictures / "b.parquet", "bytes")
    assert [sample["jpg"] for sample in samples(tmp_path / "bytes")] == PHOTOS[:5]
    assert samples(tmp_path / "bytes")[4]["json"] == {"source": "b.parquet row 4"}
    assert [(entry["row"], entry["cause"]) for entry in rejected(tmp_path / "bytes")] == [(5, "no-image")]


def save_to_disk(folder: Path, table: pa.Table, features: dict[str, Any]) -> Path:
    """Write what `datasets.Dataset.save_to_disk` writes (datasets 5.2)."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for i, name in enumerate(names):
        with (folder / name).open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(4 * i, 4), max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    info = {"features": features, "description": "", "citation": "", "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_a_hugging_face_data_set_on_disk(tmp_path: Path, make: Make):
    table = photo_table(caption=[f"photo {i}" for i in range(6)], label=[2, 0, 1, 0, -1, 2])
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "ant"], "_type": "ClassLabel"}}
    source = save_to_disk(tmp_path / "in" / "train", table, features)
    report = make(source, in_order=True, shard_size=2)
    found = samples(tmp_path / "out")
    assert [sample["jpg"] for sample in found] == PHOTOS[:4] + PHOTOS[5:]
    assert [(sample["txt"], sample["cls"]) for sample in found] == [
        *(("photo 0", "2"), ("photo 1", "0"), ("photo 2", "1"), ("photo 3", "0"), ("photo 5", "2"))
    ]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "cat\ndog\nant\n"
    assert (report.kind, report.rejected, report.num_classes) == ("datasets", {"bad-label": 1}, 3)
    make(source, "shuffled")
    assert sorted(sample["jpg"] for sample in samples(tmp_path / "shuffled")) == sorted(PHOTOS[:4] + PHOTOS[5:])
    assert samples(tmp_path / "shuffled")[0]["jpg"] != PHOTOS[0]

    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UsageError, match=r"(?s)several data sets: train.*make .*SPLIT OUT"):
        make(tmp_path / "in", "x")
    (tmp_path / "in" / "x.arrow").write_bytes((source / "data-00000-of-00002.arrow").read_bytes())
    state = json.loads((source / "state.json").read_text())
    for bad, told in ({"_data_files": [{"filename": "../x.arrow"}]}, "lacks"), ({"_indices_files": ["i"]}, "chosen by"):
        (source / "state.json").write_text(json.dumps(state | bad))
        with pytest.raises(DataError, match=told):
            make(source, "x")
    (source / "state.json").write_text(json.dumps(state))
    (source / "data-00001-of-00002.arrow").write_bytes(b"cut")
    with pytest.raises(DataError, match="not an Arrow table"):
        make(source, "x")


class Img2dataset:
    """Writes what img2dataset 1.47 writes."""

    def __init__(self, folder: Path, form: str):
        self.folder = folder
        self.form = form
        folder.mkdir(parents=True, exist_ok=True)

    def shard(self, number: int, fetched: list[int], failed: int = 0, stats: bool = True) -> None:
        name = f"{number:05d}"
        rows = []
        for place, i in enumerate(fetched):
            key = f"{number:05d}{place:04d}"
            meta = {"url": f"http://x/{i}.jpg", "caption": f"photo {i}", "license": "by", "key": key}
            meta |= {"status": "success", "error_message": None, "width": 48, "height": 40, "sha256": "f" * 64}
            rows.append((key, PHOTOS[i], f"photo {i}", json.dumps(meta, indent=4)))
        if self.form == "files":
            (self.folder / name).mkdir()
            for key, image, text, meta in rows:
                (self.folder / name / f"{key}.jpg").write_bytes(image)
                (self.folder / name / f"{key}.txt").write_text(text)
                (self.folder / name / f"{key}.json").write_text(meta)
        else:
            with webdataset.TarWriter(str(self.folder / f"{name}.tar")) as writer:
                for key, image, text, meta in rows:
                    writer.write({"__key__": key, "jpg": image, "txt": text, "json": meta.encode()})
        if stats:
            parquet.write_table(pa.table({"url": ["u"], "status": ["success"]}), self.folder / f"{name}.parquet")
            account = {"count": len(fetched) + failed, "successes": len(fetched), "failed_to_download": failed}
            account["status_dict"] = {"success": len(fetched), "HTTP Error 404: Not Found": failed}
            (self.folder / f"{name}_stats.json").write_text(json.dumps(account, indent=4))


@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_img2dataset_output(tmp_path: Path, make: Make, form: str):
    made = Img2dataset(tmp_path / "in", form)
    made.shard(0, [0, 1, 2], failed=2)
    made.shard(1, [3], failed=1)
    made.shard(4, [4, 5], stats=False)
    report = make(tmp_path / "in", workers=2, shard_size=4)
    found = samples(tmp_path / "out")
    assert [(sample["jpg"], sample["txt"]) for sample in found] == [(PHOTOS[i], f"photo {i}") for i in range(6)]
    place = "00001.tar/000010000" if form == "webdataset" else "00001/000010000.jpg"
    assert found[3]["key"] == "000000003"
    assert found[3]["json"]["source"] == place
    assert {found[3]["json"][name] for name in ("url", "license", "sha256")} == {"http://x/3.jpg", "by", "f" * 64}
    assert report.kind == "img2dataset"
    assert report.left_aside == {}
    assert report.notes == [
        "img2dataset fetched 4 of 7 images, 57.1%, 3 x HTTP Error 404: Not Found",
        "not finished by img2dataset, what is whole is taken: 00004",
        "missing numbers: 00002, 00003",
    ]


def test_img2dataset_output_that_is_damaged(tmp_path: Path, make: Make):
    made = Img2dataset(tmp_path / "in", "webdataset")
    made.shard(0, [0, 1, 2, 3])
    made.shard(1, [4, 5])
    made.shard(2, [])
    made.shard(3, [0])
    made.shard(4, [1, 2])
    tar = tmp_path / "in" / "00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"000000002.jpg")])
    (tmp_path / "in" / "00003.tar").unlink()
    (tmp_path / "in" / "00004.tar").write_bytes(b"cut")
    report = make(tmp_path / "in")
    assert [sample["txt"] for sample in samples(tmp_path / "out")] == [f"photo {i}" for i in (0, 1, 4, 5)]
    entries = {entry["source"]: (entry["cause"], entry["count"]) for entry in rejected(tmp_path / "out")}
    assert entries == {"00000.tar": ("truncated", 2), "00003.tar": ("no-image", 1), "00004.tar": ("damaged", 2)}
    assert (report.num_rows, report.num_samples, report.num_rejected) == (9, 4, 5)

    with webdataset.TarWriter(str(tmp_path / "in" / "00004.tar")) as writer:
        writer.write({"__key__": "a", "jpg": PHOTOS[0], "json": b"{}"})
    for number in (0, 1):
        (tmp_path / "in" / f"{number:05d}.tar").unlink()
    with pytest.raises(UsageError, match="--no-captions"):
        make(tmp_path / "in", "x")
    assert make(tmp_path / "in", "bare", captions=False).num_samples == 1

    files = Img2dataset(tmp_path / "files", "files")
    files.shard(0, [0, 1])
    (tmp_path / "files" / "00000" / "000000001.jpg").unlink()
    report = make(tmp_path / "files", "from-files")
    assert rejected(tmp_path / "from-files")[0]["count"] == 1
    assert (report.num_rows, report.num_samples) == (2, 1)
    (tmp_path / "files" / "00000_stats.json").write_text("{")
    with pytest.raises(DataError, match="account of an img2dataset shard"):
        make(tmp_path / "files", "x")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg"], "folder"),
        (["a.jpg", "cat/b.jpg"], "folder"),
        (["x/a.png", "x/a.txt"], "folder"),
        (["x/y/a.png", "x/y/a.json"], "folder"),
        (["cat/a.png", "dog/b.png", "readme.txt"], "classes"),
        (["0.parquet", "1.parquet"], "parquet"),
        (["00000.tar", "00000_stats.json", "00000.parquet"], "img2dataset"),
        (["00000/a.jpg", "00000_stats.json"], "img2dataset"),
        (["00000.parquet", "00000_stats.json"], "parquet"),
        (["data.arrow", "state.json"], "datasets"),
    ],
)
def test_kinds_are_found(tmp_path: Path, names: list[str], kind: str):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_kind(tmp_path) == kind
    assert kind in KINDS


def test_what_is_no_source(tmp_path: Path, make: Make):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").touch()
    (tmp_path / "shards" / "a.tar.meta.parquet").touch()  # of mmvit-data stats
    with pytest.raises(UsageError, match="already contains tars"):
        make(tmp_path / "shards")
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(UsageError, match=r"(?s)\.xlsx is not a supported source.*\.csv"):
        make(tmp_path / "x.xlsx")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "sub" / "a.mp4").touch()
    with pytest.raises(DataError, match=r"(?s)contains no image.*1 x .mp4"):
        make(tmp_path / "empty")
    for path, kind, told in (
        (tmp_path / "empty", "csv", "a folder is not a source of kind 'csv'"),
        (tmp_path / "x.xlsx", "classes", "a file is not a source of kind 'classes'"),
        (tmp_path / "*.xlsx", "csv", "only parquet files"),
    ):
        with pytest.raises(UsageError, match=told):
            make(path, kind=kind)
    with pytest.raises(DataError, match="does not exist"):
        make(tmp_path / "*.csv")
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "splits" / name).mkdir(parents=True)
        (tmp_path / "splits" / name / "a.jpg").write_bytes(PHOTOS[0])
    with pytest.raises(UsageError, match=r"(?s)'train' is a part of a data set.*splits/train OUT \(the others too\)"):
        make(tmp_path / "splits")
    assert make(tmp_path / "splits" / "train", "train").num_classes == 2
    assert make(tmp_path / "splits", kind="classes").num_classes == 2
    with pytest.raises(UsageError, match="for images without captions: --no-captions"):
        make(tmp_path / "splits" / "val" / "cat", "x")


@pytest.fixture
def web_server(pictures: Path) -> Iterator[str]:
    """Serve the images on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pictures / "images")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["webdataset", "files"])
def test_img2dataset_itself(tmp_path: Path, web_server: str, make: Make, form: str):
    pytest.importorskip("img2dataset")
    rows: list[list[object]] = [["url", "caption"], *([f"{web_server}/p{i}.jpg", f"photo {i}"] for i in range(6))]
    table = write_csv(tmp_path / "urls.csv", [*rows, [f"{web_server}/none.jpg", "x"]])
    out = tmp_path / "fetched"
    options = {"url_list": table, "input_format": "csv", "url_col": "url", "caption_col": "caption"}
    options |= {"output_format": form, "output_folder": out, "processes_count": 1, "number_sample_per_shard": 4}
    command = [sys.executable, "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    report = make(out)
    assert (report.num_samples, report.rejected) == (6, {})
    assert report.notes[0].startswith("img2dataset fetched 6 of 7 images, 85.7%")
    assert {sample["txt"] for sample in samples(tmp_path / "out")} == {f"photo {i}" for i in range(6)}
