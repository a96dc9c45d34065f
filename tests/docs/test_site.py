"""The documentation builds as a site without a warning, and the site needs no network."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(source: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    """Build the site of a checkout."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(source / "mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(site)], capture_output=True, text=True, check=False, env=environment
    )


def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = [page for page in (tmp_path / "site").rglob("*.html") if page.name != "404.html"]
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))
    loaded = r"<(?:script|img|iframe|source)[^>]*src=[\"']?(?:https?:)?//|<link[^>]*rel=\"?stylesheet[^>]*//"
    assert [page.name for page in pages if re.search(loaded, page.read_text(encoding="utf-8"))] == []
    assert not list((tmp_path / "site").rglob("*.py"))


@pytest.mark.parametrize("link", ["[a](nowhere.md)", "[a](data.md#nowhere)", "![a](nowhere.png)"])
def test_a_broken_link_is_found(tmp_path: Path, link: str):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    page = tmp_path / "docs" / "search.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{link}\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def test_the_drawing_of_the_architecture_shows_the_rule():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rule = module.architecture_test()
    groups = module.grouped_rooms(rule.ROOMS, rule.ROOTS)
    assert groups["data_tools"][:3] == ["core", "tar", "sample"]
    fresh = module.draw(groups)
    assert module.TARGET.read_text(encoding="utf-8") == fresh, "run: python docs/draw_architecture.py"
