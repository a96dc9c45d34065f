"""Lets the tests of this folder import the modules beside them."""

import copy
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def quick_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save and load thousands of times: syncs do nothing, for no test pulls the plug of this machine, and what comes
    after the files of a model were verified is done once.
    """
    from saves import tiny_model, tiny_tokenizer

    import mmvit.checkpoint.models as checkpoint

    @functools.cache
    def parsed(cls: type, text: str) -> Any:
        return from_tree(cls, json.loads(text), "")

    from_tree = checkpoint.from_tree
    monkeypatch.setattr(checkpoint, "from_tree", lambda cls, tree, where: copy.deepcopy(parsed(cls, json.dumps(tree))))
    monkeypatch.setattr(checkpoint, "build_dual_encoder", lambda *arguments: tiny_model())
    monkeypatch.setattr(checkpoint, "build_tokenizer", lambda *arguments: tiny_tokenizer())
    monkeypatch.setattr(os, "fsync", lambda fd: None)
