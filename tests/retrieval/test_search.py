"""Exact search finds what a plain sum in double precision finds, and only with the model that made the rows."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mmvit.checkpoint
from data_tools.core.errors import CheckpointError, UsageError
from mmvit.data.shards import IndexedShards
from mmvit.data.tokenizers import TokenizerConfig
from mmvit.retrieval import search
from mmvit.retrieval.search import Searcher, top_k
from mmvit.retrieval.sources import open_source
from mmvit.retrieval.store import embed_source

RunCli = Callable[..., tuple[int, str, str]]


def unit_rows(rng: np.random.Generator, num_rows: int, dim: int = 16) -> np.ndarray:
    rows = rng.standard_normal((num_rows, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def oracle(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines in double precision; of equal ones the lower row first."""
    queries, rows = queries.astype(np.float64), rows.astype(np.float64)
    scores = queries @ rows.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("parts", [[200], [1, 0, 70, 129], [20] * 10])
@pytest.mark.parametrize("k", [1, 10, 200, 500])
@pytest.mark.parametrize("chunk_size", [7, 65_536])
def test_equals_the_oracle(monkeypatch: pytest.MonkeyPatch, parts: list[int], k: int, chunk_size: int):
    monkeypatch.setattr(search, "CHUNK_SIZE", chunk_size)
    rng = np.random.default_rng(0)
    rows = unit_rows(rng, sum(parts)).astype(np.float16)
    queries = unit_rows(rng, 5).astype(np.float32)
    found = top_k(torch.from_numpy(queries), np.split(rows, np.cumsum(parts)[:-1]), k)
    scores, order = oracle(queries, rows, k)
    assert found.scores.shape == (5, min(k, 200))
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-6)
    np.testing.assert_array_equal(found.rows.numpy(), order)


def test_scores_are_cosines_of_rows_that_are_not_of_unit_length():
    """Lengths of float16 rows are off by up to 5e-4 here; the cosines of equal rows are 1 and never above."""
    rng = np.random.default_rng(2)
    rows = np.concatenate([unit_rows(rng, 500, 8), 3 * unit_rows(rng, 20, 8), np.zeros((1, 8))]).astype(np.float16)
    queries = rows[:-1].astype(np.float32) * 1.0004
    found = top_k(torch.from_numpy(queries), [rows[:300], rows[300:]], 521)
    assert found.scores.abs().max() <= 1
    assert found.scores[:, 0].min() >= 1 - 3e-7
    assert torch.equal(found.rows[:, 0], torch.arange(520))
    cosines, _ = oracle(queries, rows[:-1], 520)
    assert (np.linalg.norm(queries[:500], axis=1) > 1 + 2e-4).any()
    assert (found.scores == 0).any(dim=1).all()  # the row of zeros
    np.testing.assert_allclose(found.scores.numpy()[:, :100], cosines[:, :100], atol=3e-7)


def test_of_equal_scores_the_lower_row_comes_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "CHUNK_SIZE", 9)
    rng = np.random.default_rng(1)
    # Few directions with short coordinates: every score is exact in float32, and most of them stand many times.
    directions = np.eye(8)[:, :8] * 0.5 + np.eye(8)[::-1] * 0.25
    choice = rng.integers(0, 8, 120)
    rows = directions[choice].astype(np.float16)
    queries = directions[:3].astype(np.float32)
    found = top_k(torch.from_numpy(queries), [rows[:50], rows[50:51], rows[51:]], 40)
    scores, order = oracle(queries, rows, 40)
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-7)
    np.testing.assert_array_equal(found.rows.numpy(), order)


@pytest.fixture(scope="module")
def folder(finished_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search")
    shutil.copytree(finished_run / "model", out / "model")
    embed_source(mmvit.load(out / "model"), out / "model", open_source(f"{tiny_data}/val-*.tar"), out / "embeddings")
    return out / "embeddings"


def test_finds_a_picture_by_itself_and_texts_by_cosine(folder: Path, tiny_data: Path, tmp_path: Path):
    searcher = Searcher(folder)
    sample = IndexedShards(sorted(tiny_data.glob("val-*.tar"))).read(11)
    (tmp_path / "query.png").write_bytes(sample.image)
    hits = searcher.search(image=tmp_path / "query.png", k=3)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert (hits[0].image_path, hits[0].caption, hits[0].meta) == (sample.key, sample.caption, sample.meta)
    assert 1 - 1e-6 <= hits[0].score <= 1

    images = np.load(folder / "img_emb" / "img_emb_0.npy")
    for text in ("red apple", "\uac1c"):
        scores, rows = oracle(searcher.encoder.encode_text([text]).numpy(), images, 5)
        hits = searcher.search(text=text, k=5)
        assert [hit.score for hit in hits] == pytest.approx(scores[0].tolist(), abs=1e-6)
        paths = searcher.embeddings.metadata["image_path"].to_pylist()
        assert [hit.image_path for hit in hits] == [paths[row] for row in rows[0]]
    assert len(searcher.search(text="x", k=1000)) == 40


def test_queries_that_are_none(folder: Path, run_cli: RunCli, tmp_path: Path):
    searcher = Searcher(folder)
    for query in ({}, {"text": "x", "image": "y"}, {"text": "x", "k": 0}, {"text": ""}, {"text": " \n"}):
        with pytest.raises(UsageError):
            searcher.search(**query)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("broken.png", "none.png"):
        code, out, err = run_cli("search", folder, "--image", tmp_path / name, "--json")
        assert (code, out) == (3, "")
        assert name in err
        assert "Traceback" not in err
    assert run_cli("search", folder)[0] == 2
    code, _, err = run_cli("search", folder, "--text", "")
    assert (code, "text to search for is empty" in err) == (2, True), err
    assert run_cli("search", folder, "--text", "x", "-k", "0")[0] == 2


def test_moved_together_they_still_find_each_other(folder: Path, tmp_path: Path):
    moved = shutil.copytree(folder.parent, tmp_path / "moved")
    assert Searcher(moved / "embeddings").search(text="x", k=1)


def test_missing_or_other_model_is_refused(folder: Path, run_cli: RunCli, tmp_path: Path):
    alone = shutil.copytree(folder, tmp_path / "alone")
    code, _, err = run_cli("search", alone, "--text", "x")
    assert code == 4
    assert "cannot be loaded: not a model folder" in err
    assert "hint: pass the model folder: --model FOLDER" in err
    assert run_cli("search", alone, "--text", "x", "--model", folder.parent / "model")[0] == 0

    loaded = mmvit.load(folder.parent / "model")
    torch.nn.init.zeros_(loaded.model.logit_scale)
    description = mmvit.checkpoint.load_model(folder.parent / "model")
    tokenizer = TokenizerConfig("file", str(folder.parent / "model" / "tokenizer.json"))
    mmvit.checkpoint.save_model(tmp_path / "other", loaded.model, description.config, description.preprocess, tokenizer)
    code, _, err = run_cli("search", alone, "--text", "x", "--model", tmp_path / "other")
    assert code == 4
    assert "computed by a model with different weights" in err
    with pytest.raises(CheckpointError, match="not a model folder"):
        Searcher(alone)
