"""A place that attacks try to write to, hostile tars, and a process whose memory is measured."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Member = tuple[str, bytes] | tarfile.TarInfo


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that appears when an attack has an effect."""
    return tmp_path / "canary"


@pytest.fixture
def hostile_tar(tmp_path: Path) -> Callable[[Sequence[Member]], Path]:
    """Write a tar with one good sample around what is given: a file's name and data, or any header."""

    def write(members: Sequence[Member]) -> Path:
        path = tmp_path / "hostile.tar"
        with tarfile.open(path, "w") as archive:
            for member in [("good.jpg", b"picture"), *members, ("good.txt", b"a caption")]:
                info, data = (member, b"") if isinstance(member, tarfile.TarInfo) else _file(*member)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write


def _file(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


@pytest.fixture(scope="session")
def measure() -> Callable[..., list[tuple[int, str]]]:
    """Run a function on each of some paths, in a process of its own.

    Returns for each by how many MiB the memory of the process has risen at most up to then, and what was printed.
    """

    def run(code: str, paths: Sequence[Path]) -> list[tuple[int, str]]:
        command = [sys.executable, "-c", f"{code}\n{_MEASURE}", *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return [(rise, said) for rise, said in json.loads(done.stdout)]

    return run


_MEASURE = """
import contextlib, io, json, resource, sys
from pathlib import Path

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before, results = peak(), []
for path in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(Path(path))
    results.append((peak() - before, said.getvalue()))
print(json.dumps(results))
"""
