"""The house rules of the code: who may import what, what never appears, how large things may grow.

Each rule is a function from the parsed sources to a list of complaints, so that it runs on the real code and, to prove
that it can fail, on a planted bad source.
"""

import ast
import dataclasses
import graphlib
import subprocess
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("data_tools", "mmvit")

# Left to right: a package may import only what stands to its left, or itself.
ROOMS = (
    *(f"data_tools.{room}" for room in ("core", "tar", "sample", "make", "examine", "select", "demo", "cli")),
    *("data_tools", "data_tools.__main__"),
    *(
        "mmvit.keys",
        "mmvit.model_folder",
        "mmvit.layers",
        "mmvit.towers",
        "mmvit.models",
        "mmvit.losses",
        "mmvit.data",
        "mmvit.config",
    ),
    *("mmvit.checkpoint", "mmvit.eval"),
    *(f"mmvit.train.{room}" for room in ("device", "optim", "safety", "record", "start")),
    *(
        f"mmvit.train.{file}"
        for file in ("contract", "gradcache", "step", "run", "preflight", "rehearsal", "meters", "runs", "loop")
    ),
    *(
        "mmvit.train",
        "mmvit.retrieval",
        "mmvit.interop",
        "mmvit.terminal",
        "mmvit.table_file",
        "mmvit.doctor",
        "mmvit.quickstart",
        "mmvit",
    ),
    *("mmvit.words", "mmvit.cli", "mmvit.__main__"),
)
# Packages of which only __init__.py is a room of its own: everything else in them has a narrower one.
ROOTS = ("data_tools", "mmvit.train", "mmvit")
# A library and the only room that may import it.
KEPT_IN = {"accelerate": "mmvit.train", "omegaconf": "mmvit.config"}
# What several towers share, and what knows all of them.
TOWER_SHARED = {f"mmvit.towers{each}" for each in ("", ".contract", ".config", ".timm_models")}

BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_CALLS = {
    *("eval", "exec", "torch.load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load"),
}
BANNED_ARGUMENTS = ("shell", "allow_pickle")
BANNED_NAMES = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py"}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_CONSTRUCTOR_PARAMETERS = 10
MAX_CLASS_DEPTH = 2
MAX_CONFIG_FIELDS = {
    # All losses, schedules, precisions and ways to save and to spread are keys of the one config of a pretraining run,
    # so that a run can be read and compared in one file; recipes name 15 to 30 of them.
    "PretrainConfig": 120,
    # The same for supervised runs; what both have in common alone is 60.
    "FinetuneConfig": 100,
}

# What may break a budget: the name as the complaint gives it -> the reason. An entry that nothing needs is an error.
ALLOWED: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Source:
    """One parsed file: its path below the root, its dotted module name, its text and its tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The dotted name that a relative import starts from."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]


def load_sources(root: Path, folders: tuple[str, ...] = SHIPPED) -> list[Source]:
    """Return the parsed .py files of the folders."""
    sources = []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        sources.append(Source(path.relative_to(root).as_posix(), module, text, ast.parse(text)))
    return sources


def imported_names(source: Source) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of all that a file imports, at its top and inside functions."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = source.package.split(".")[: len(source.package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [item.value for item in node.args[:1] if isinstance(item, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names)


def room_of(name: str) -> str | None:
    """Return the room that a dotted name lies in; None when it is not ours or has no room."""
    rooms = [room for room in ROOMS if name == room or name.startswith(room + ".")]
    room = max(rooms, key=len, default=None)
    return None if room == "mmvit" and name.count(".") > 1 else room


def circle_complaints(sources: list[Source]) -> list[str]:
    """Complain about files that import each other, directly or through others."""
    modules = {source.module for source in sources}
    graph = {}
    for source in sources:
        names = {name if name in modules else name.rpartition(".")[0] for _, name in imported_names(source)}
        graph[source.module] = (names & modules) - {source.module}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return [f"circle of imports: {' <- '.join(error.args[1])}"]
    return []


def tower_of(name: str) -> str:
    return ".".join(name.split(".")[:3])


def import_complaints(sources: list[Source]) -> list[str]:
    """Complain about imports to the right, between towers, and of libraries outside their room."""
    complaints = []
    for source in sources:
        here = room_of(source.module)
        if here is None or (here in ROOTS and source.module != here):
            complaints.append(f"{source.path}: module has no room in ROOMS")
            continue
        for line, name in imported_names(source):
            where, top, room = f"{source.path}:{line}", name.split(".")[0], room_of(name)
            if top in SHIPPED and name != "mmvit.__version__":
                if room is None or ROOMS.index(room) > ROOMS.index(here):
                    complaints.append(f"{where}: {here} imports {name}, which stands to its right")
                if here == room == "mmvit.towers" and source.module not in TOWER_SHARED:
                    other = tower_of(name)
                    if other not in {source.module, *TOWER_SHARED}:
                        complaints.append(f"{where}: {source.module} imports another tower, {other}")
            if top in KEPT_IN and not here.startswith(KEPT_IN[top]):
                complaints.append(f"{where}: {top} is imported outside {KEPT_IN[top]}")
            if top.startswith("torch") and here.startswith("data_tools"):
                complaints.append(f"{where}: data_tools imports {top}")
            if top in BANNED_MODULES:
                complaints.append(f"{where}: {top} is imported")
    return complaints


def call_complaints(sources: list[Source]) -> list[str]:
    """Complain about calls that run text or unpickle, under whatever name the function was imported."""
    complaints = []
    for source in sources:
        aliases = {}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = (aliases.get(first, first) + dot + rest).removeprefix("builtins.")
            if name in BANNED_CALLS:
                complaints.append(f"{source.path}:{node.lineno}: {name} is called")
            for keyword in node.keywords:
                false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in BANNED_ARGUMENTS and not false:
                    complaints.append(f"{source.path}:{node.lineno}: {name} is called with {keyword.arg}")
    return complaints


def file_complaints(sources: list[Source]) -> list[str]:
    """Complain about names that say nothing, characters beyond ASCII, and long files."""
    complaints = []
    for source in sources:
        if Path(source.path).name in BANNED_NAMES:
            complaints.append(f"{source.path}: name the file after its one concept")
        if not source.text.isascii():
            bad = next(number for number, line in enumerate(source.text.splitlines(), 1) if not line.isascii())
            complaints.append(f"{source.path}: line {bad} is not ASCII")
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES and not source.path.startswith("tests/"):
            complaints.append(f"{source.path}: {lines} lines, more than {MAX_FILE_LINES}")
    return complaints


def size_complaints(sources: list[Source]) -> list[str]:
    """Complain about long functions and constructors with many parameters."""
    complaints = []
    for source in sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                complaints.append(f"{source.path} {node.name}: {lines} lines, more than {MAX_FUNCTION_LINES}")
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            counted = [name for name in given if name not in {"self", "config"}]
            if node.name == "__init__" and len(counted) > MAX_CONSTRUCTOR_PARAMETERS:
                complaints.append(f"{source.path} line {node.lineno} __init__: {len(counted)} parameters")
    return complaints


def depth_complaints(sources: list[Source]) -> list[str]:
    """Complain about our own classes that stand more than MAX_CLASS_DEPTH below nn.Module."""
    bases: dict[str, list[str]] = {}
    for source in sources:
        known = {name.rpartition(".")[2]: name for _, name in imported_names(source)}
        classes = [node for node in source.tree.body if isinstance(node, ast.ClassDef)]
        known |= {node.name: f"{source.module}.{node.name}" for node in classes}
        for node in classes:
            names = [ast.unparse(base).partition(".") for base in node.bases]
            bases[f"{source.module}.{node.name}"] = [known.get(first, first) + dot + rest for first, dot, rest in names]

    def depth(name: str) -> int:
        """Return the number of steps from a class up to nn.Module, 0 for what is no module."""
        above = [(base.endswith("nn.Module"), depth(base)) for base in bases.get(name, ())]
        return max((1 + steps for is_module, steps in above if is_module or steps), default=0)

    return [f"{name}: inheritance is {depth(name)} deep" for name in bases if depth(name) > MAX_CLASS_DEPTH]


def count_fields(config: type) -> int:
    """Count the leaf fields of a dataclass; where a field may be one of several dataclasses, the largest counts."""
    hints = typing.get_type_hints(config)
    total = 0
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        union = typing.get_origin(hint) in {typing.Union, types.UnionType}
        kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if dataclasses.is_dataclass(kind)]
        total += max((count_fields(kind) for kind in kinds), default=1)
    return total


RULES = (import_complaints, circle_complaints, call_complaints, file_complaints, size_complaints, depth_complaints)


def all_complaints(sources: list[Source]) -> list[str]:
    return [complaint for rule in RULES for complaint in rule(sources)]


def test_shipped_code_keeps_the_rules():
    complaints = all_complaints(load_sources(ROOT))
    assert [complaint for complaint in complaints if not complaint.startswith(tuple(ALLOWED))] == []


def test_every_allowance_is_needed():
    complaints = all_complaints(load_sources(ROOT))
    assert [name for name in ALLOWED if not any(complaint.startswith(name) for complaint in complaints)] == []


def test_tests_and_benchmarks_are_ascii_and_well_named():
    assert file_complaints(load_sources(ROOT, ("tests", "benchmarks"))) == []


def test_the_largest_run_config_stays_small():
    from mmvit import config as module

    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    counts = {kind.__name__: count_fields(kind) for kind in kinds}
    assert counts, "mmvit/config.py composes dataclasses"
    assert {name: count for name, count in counts.items() if count > MAX_CONFIG_FIELDS.get(name, 80)} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import mmvit",
        "import mmvit.cli",
        "import data_tools.cli.app",
        "sys.argv = ['mmvit', '--help']\nfrom mmvit.cli import main\nmain()",
        "sys.argv = ['mmvit-data', '--help']\nfrom data_tools.cli.app import main\nmain()",
    ],
)
def test_import_and_help_load_no_torch(code):
    body = "".join(f"    {line}\n" for line in code.split("\n"))
    script = f"import sys\ntry:\n{body}except SystemExit as stop:\n    assert not stop.code\n"
    script += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_check_can_fail():
    script = "import sys, torch\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 1


PLANTED = {
    "import to the right": ("mmvit/layers/a.py", "def f():\n    from mmvit.models import b\n", "to its right"),
    "relative import to the right": ("mmvit/layers/a.py", "from ..train import loop\n", "mmvit.train.loop"),
    "import by name": ("mmvit/data/a.py", "importlib.import_module('mmvit.eval.x')\n", "to its right"),
    "data_tools imports mmvit": ("data_tools/core/a.py", "import mmvit\n", "to its right"),
    "the package root from a room": ("mmvit/eval/a.py", "import mmvit\n", "to its right"),
    "to the right inside data_tools": ("data_tools/tar/a.py", "from data_tools.sample import content\n", "its right"),
    "to the right inside train": ("mmvit/train/device/a.py", "from mmvit.train.safety import stop\n", "its right"),
    "a file outside the rooms of data_tools": ("data_tools/a.py", "x = 1\n", "no room"),
    "a module without a room": ("mmvit/new/a.py", "x = 1\n", "no room"),
    "tower imports tower": ("mmvit/towers/a.py", "from mmvit.towers.b import B\n", "another tower"),
    "tower imports tower, relative": ("mmvit/towers/a.py", "from . import b\n", "another tower"),
    "accelerate": ("mmvit/eval/a.py", "from accelerate import Accelerator\n", "outside mmvit.train"),
    "omegaconf": ("mmvit/cli.py", "import omegaconf\n", "outside mmvit.config"),
    "torch in data_tools": ("data_tools/core/a.py", "def f():\n    import torchvision\n", "data_tools imports"),
    "pickle": ("mmvit/checkpoint.py", "from pickle import loads\n", "pickle is imported"),
    "torch.load": ("mmvit/checkpoint.py", "import torch as t\nt.load(p)\n", "torch.load is called"),
    "torch.load by name": ("mmvit/checkpoint.py", "from torch import load\nload(p)\n", "torch.load is called"),
    "eval": ("mmvit/config.py", "eval('1')\n", "eval is called"),
    "exec": ("mmvit/config.py", "import builtins\nbuiltins.exec('1')\n", "exec is called"),
    "shell": ("data_tools/core/a.py", "import subprocess\nsubprocess.run('x', shell=True)\n", "with shell"),
    "os.system": ("data_tools/core/a.py", "from os import system as run\nrun('x')\n", "os.system is called"),
    "yaml.load": ("mmvit/config.py", "import yaml\nyaml.load(x)\n", "yaml.load is called"),
    "numpy pickle": ("mmvit/data/a.py", "np.load(p, allow_pickle=True)\n", "with allow_pickle"),
    "empty name": ("mmvit/data/utils.py", "x = 1\n", "one concept"),
    "beyond ASCII": ("mmvit/data/a.py", "x = 1\ny = '\u00e9'\n", "line 2 is not ASCII"),
    "long file": ("mmvit/data/a.py", "x = 1\n" * 401, "401 lines"),
    "long function": ("mmvit/data/a.py", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
    "many parameters": (
        "mmvit/data/a.py",
        f"class A:\n    def __init__(self, config, {', '.join('abcdefghijk')}): ...\n",
        "11 parameters",
    ),
    "deep inheritance": (
        "mmvit/models/a.py",
        "class A(nn.Module): ...\nclass B(A): ...\nclass C(B): ...\n",
        "3 deep",
    ),
}


@pytest.mark.parametrize(("path", "text", "complaint"), PLANTED.values(), ids=PLANTED.keys())
def test_each_rule_can_fail(tmp_path, path, text, complaint):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    complaints = all_complaints(load_sources(tmp_path))
    assert len(complaints) == 1
    assert complaint in complaints[0]


def test_a_circle_is_found(tmp_path):
    texts = {
        "a": "def f():\n    from mmvit.data import b\n",
        "b": "from mmvit.data.c import x\n",
        "c": "from . import a\n",
    }
    for name, text in texts.items():
        path = tmp_path / "mmvit" / "data" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (complaint,) = all_complaints(load_sources(tmp_path))
    assert "circle" in complaint
    (tmp_path / "mmvit" / "data" / "c.py").write_text("x = 1\n", encoding="utf-8")
    assert all_complaints(load_sources(tmp_path)) == []


def test_good_code_passes_every_rule(tmp_path):
    good = {
        "mmvit/__init__.py": "def __getattr__(name):\n    from mmvit.eval.encoder import load\n    return load\n",
        "mmvit/__main__.py": "from mmvit.cli import main\nmain()\n",
        "mmvit/towers/__init__.py": "from mmvit.towers.vit import ViT\n",
        "mmvit/towers/vit.py": "from .contract import Tokens\nfrom mmvit.layers import block\n",
        "mmvit/eval/a.py": "from mmvit import __version__, models\nmodel.eval()\nnp.load(p, allow_pickle=False)\n",
        "mmvit/train/step/a.py": "import accelerate\nimport data_tools.core.errors\n",
        "mmvit/models/a.py": "class A(nn.Module): ...\nclass B(A): ...\n",
        "data_tools/core/errors.py": "class A(Exception): ...\nclass B(A): ...\nclass C(B): ...\n",
        "mmvit/data/a.py": "def f():\n" + "    x = 1\n" * 59,
    }
    for path, text in good.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert all_complaints(load_sources(tmp_path)) == []


def test_config_fields_are_counted_through_nested_choices():
    @dataclasses.dataclass
    class Small:
        a: int = 0

    @dataclasses.dataclass
    class Large:
        a: int = 0
        b: str | None = None

    names = {"Small": Small, "Large": Large}
    run = dataclasses.make_dataclass("Run", [("x", "int"), ("tower", "Small | Large | None")])
    run.__module__ = __name__
    globals().update(names)
    try:
        assert count_fields(run) == 3
    finally:
        for name in names:
            del globals()[name]


def test_room_names_are_unique():
    assert max(Counter(ROOMS).values()) == 1
