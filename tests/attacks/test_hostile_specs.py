"""What names shards or configures a run is data: no command, no code, no file of another kind is reached by it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.core.errors import MmvitError, UsageError
from data_tools.tar.expand import expand_shards
from data_tools.tar.index import open_index
from mmvit.config import PretrainConfig, load_config
from mmvit.data.shards import IndexedShards

RunCli = Callable[..., tuple[int, str, str]]

COMMANDS = [
    "pipe:touch {canary}",
    "pipe:touch {canary}; cat a.tar",
    "PIPE:touch {canary}",
    "pipe://touch {canary}",
    "filecache::pipe:touch {canary}",
    "https://host/a.tar::pipe:touch {canary}",
    "zip://a.tar::file://{canary}",
    "local://{canary}",
    "ssh://host/{canary}",
    "$(touch {canary}).tar",
    "`touch {canary}`.tar",
    "a.tar; touch {canary}",
    "{{a,$(touch {canary})}}.tar",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["one", "list"])
def test_commands_and_strange_urls(canary: Path, command: str, form: str):
    spec = command.format(canary=canary)
    with pytest.raises(Exception, match="shards") as caught:
        expand_shards(spec if form == "one" else [spec])
    assert caught.value.exit_code in (2, 3)
    assert caught.value.where
    assert caught.value.hint
    assert not canary.exists()


def test_a_pipe_that_reaches_the_reader_all_the_same(canary: Path):
    for opened in (open_index, lambda spec: IndexedShards([spec])):
        with pytest.raises(UsageError, match="shards are read from local files"):
            opened(f"pipe:touch {canary}")
    assert not canary.exists()


def test_passwords_in_urls_are_not_shown():
    with pytest.raises(UsageError) as caught:
        expand_shards("ftp://user:secret@host/a.tar?token=hidden")
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "train",
    [
        '["pipe:touch {canary}"]',
        '["a.tar", "pipe:touch {canary}"]',
        '!!python/object/apply:os.system ["touch {canary}"]',
        '!!python/object/new:os.system ["touch {canary}"]',
        "[!!python/name:os.system]",
        '["${{oc.env:HOME}}/pipe:touch {canary}"]',
        '["${{eval:1}}.tar"]',
    ],
)
def test_a_hostile_config(tmp_path: Path, canary: Path, train: str):
    path = tmp_path / "hostile.yaml"
    path.write_text(f"data:\n  train: {train.format(canary=canary)}\n")
    with pytest.raises(MmvitError) as caught:
        expand_shards(load_config(PretrainConfig, path).data.train)
    assert caught.value.exit_code in (2, 3)
    assert caught.value.where
    assert not canary.exists()


def test_a_hostile_config_in_the_program(tmp_path: Path, canary: Path, run_cli: RunCli):
    path = tmp_path / "hostile.yaml"
    path.write_text(f"data:\n  train: !!python/object/apply:os.system ['touch {canary}']\n")
    code, _, err = run_cli("pretrain", path, "--print-config")
    assert code == 2
    assert "python/object/apply" in err
    assert "Traceback" not in err
    assert not canary.exists()
