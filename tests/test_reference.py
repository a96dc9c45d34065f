"""The reference pages are what the code says."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

from data_tools.cli.app import app as data_app
from mmvit.cli import app as mmvit_app
from mmvit.config import FinetuneConfig, PretrainConfig
from mmvit.keys import declared
from mmvit.models.image_towers import TOWERS

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_pages_are_not_stale(generate: ModuleType):
    assert generate.stale() == ""


def test_stale_pages_are_named_with_the_command(generate: ModuleType, tmp_path: Path):
    shutil.copytree(DOCS / "reference", tmp_path / "reference")
    page = tmp_path / "reference" / "config.md"
    page.write_text(page.read_text(encoding="utf-8").replace("number of steps", "number of stairs"), encoding="utf-8")
    (tmp_path / "reference" / "verbs.md").unlink()
    assert generate.stale(tmp_path) == (
        "reference/config.md, reference/verbs.md is stale; run: python docs/generate.py"
    )


def test_each_key_and_each_kind_of_tower_is_listed():
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    keys = [*declared(PretrainConfig()), *declared(FinetuneConfig()), *(f"model.image.{key}" for key in ("widths",))]
    assert [key for key in keys if f"| `{key}` |" not in page] == []
    assert [kind for kind in TOWERS if f"`{kind}`" not in page] == []


@pytest.mark.parametrize(("program", "app"), [("mmvit", mmvit_app), ("mmvit-data", data_app)])
def test_each_verb_and_each_option_is_listed(program: str, app: object):
    page = (DOCS / "reference" / "verbs.md").read_text(encoding="utf-8")
    for name, verb in get_command(app).commands.items():
        _, found, part = page.partition(f"\n### {program} {name}\n")
        assert found, f"{program} {name}"
        part = part.partition("\n### ")[0]
        options = [each.opts[0] for each in verb.params if each.param_type_name == "option" and each.name != "help"]
        assert [option for option in options if not re.search(rf"`{option}[`/]", part)] == []
