"""The contract table holds, and mutated losses violate it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("contracts") / "rows.json"
    script = Path(__file__).with_name("contracts.py")
    command = [sys.executable, str(script), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_every_loss_matches_its_formula_in_every_layout_on_1_2_and_4_ranks(table: list[dict[str, Any]]):
    rows = [row for row in table if "broken" not in row]
    assert [row for row in rows if not max(row["errors"].values()) <= row["allowed"]] == []
    pair_losses = {row["loss"] for row in rows if row["layout"] != "-"}
    assert len(pair_losses) == 9
    layouts = {"auto", "global", "rows", "tiles", "ring"}
    walked = {(row["loss"], row["layout"], row["processes"]) for row in rows if row["layout"] != "-"}
    assert walked == {(loss, layout, size) for loss in pair_losses for layout in layouts for size in (1, 2, 4)}


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_every_gradient_has_an_error_in_the_table(table: list[dict[str, Any]], loss: str):
    known = {"contrastive": "softmax", "sigmoid": "sigmoid"}[loss]
    expected = {"value", "image", "text", "logit_scale"} | ({"logit_bias"} if loss == "sigmoid" else set())
    assert all(set(row["errors"]) == expected for row in table if row["loss"].startswith(known))


@pytest.mark.parametrize("processes", [2, 4])
def test_a_gather_without_gradient_breaks_the_contract(table: list[dict[str, Any]], processes: int):
    errors = broken(table, "a gather without gradient", processes)
    assert errors["value"] <= TOLERANCE  # the value alone would not show it
    assert errors["text"] > 1000 * TOLERANCE


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("loss", ["a wrong partner", "columns normalised by own rows only"])
def test_a_wrong_loss_breaks_the_contract(table: list[dict[str, Any]], loss: str, processes: int):
    errors = broken(table, loss, processes)
    assert min(errors["value"], errors["image"], errors["text"]) > 1000 * TOLERANCE


def broken(table: list[dict[str, Any]], loss: str, processes: int) -> dict[str, float]:
    (row,) = [row for row in table if row["loss"] == loss and row["processes"] == processes]
    return row["errors"]
