"""Tasks run in this process, in local processes and on Ray: the same results, the same errors."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.core.errors import ResourceError, SampleError, UsageError
from data_tools.core.workers import run_tasks
from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from data_tools.select.reshard import reshard
from data_tools.select.write import OutputOptions


def square(task: int) -> int:
    if task < 0:
        raise SampleError("hash", "the bytes differ", shard="a.tar", key=str(task), note="left out")
    if task == 13:
        os._exit(1)  # as the kernel ends a process when memory is full
    return task * task


def with_counter(seen: list[int], task: int) -> tuple[int, int]:
    seen.append(task)
    return os.getpid(), len(seen)


@pytest.mark.parametrize("num_workers", [1, 2, None])
def test_results_carry_the_number_of_their_task(num_workers: int | None):
    assert sorted(run_tasks(square, [3, 4, 5], num_workers=num_workers)) == [(0, 9), (1, 16), (2, 25)]
    assert list(run_tasks(square, [], num_workers=num_workers)) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_comes_back_as_it_was_raised(num_workers: int):
    with pytest.raises(SampleError) as caught:
        list(run_tasks(square, [1, -2, 3], num_workers=num_workers))
    assert (caught.value.cause, caught.value.key, caught.value.note) == ("hash", "-2", "left out")


def test_a_killed_worker_is_reported():
    with pytest.raises(ResourceError, match="a worker process was killed"):
        list(run_tasks(square, [1, 13], num_workers=2))


def test_what_a_partial_holds_is_sent_once_to_each_worker():
    done = [result for _, result in run_tasks(functools.partial(with_counter, []), range(8), num_workers=2)]
    last = dict(sorted(done))
    assert os.getpid() not in last
    assert sum(last.values()) == 8  # each worker counts on in its one list


CTRL_C_SCRIPT = """
import signal, sys, time
from pathlib import Path
from data_tools.core.workers import run_tasks

def wait(task):
    if task:
        Path(sys.argv[1]).touch()
        try:
            for _ in range(600):  # a signal that comes just before a sleep is heard after it
                time.sleep(0.1)
        finally:
            print("cleaned up", flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background inherits that it is ignored
    try:
        for number, _ in run_tasks(wait, [0, 1], num_workers=2):
            pass
    except KeyboardInterrupt:
        print("stopped", flush=True)
"""


def test_ctrl_c_ends_a_task_and_an_idle_worker_without_a_traceback(tmp_path: Path):
    (tmp_path / "script.py").write_text(CTRL_C_SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "busy")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True) as program:
        deadline = time.monotonic() + 60
        while not (tmp_path / "busy").exists():
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all processes at once
        out, err = program.communicate(timeout=60)
    assert (sorted(out.split("\n")), err) == (["", "cleaned up", "stopped"], "")


def test_unknown_engine_and_missing_ray(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="unknown engine 'rya'") as caught:
        list(run_tasks(square, [1], engine="rya"))
    assert caught.value.hint == "did you mean 'ray'?"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="ray is not installed") as caught:
        list(run_tasks(square, [1], engine="ray"))
    assert caught.value.hint == 'pip install "mmvit[ray]"'


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UsageError, match="cluster cannot be reached") as caught:
        list(run_tasks(square, [1], engine="ray"))
    assert caught.value.where == "RAY_ADDRESS=127.0.0.1:9"


# In a program of its own: Ray leaves threads, sockets and warnings behind.
RAY_SCRIPT = """
import functools, os, sys
from pathlib import Path
from data_tools.core.workers import run_tasks
from data_tools.core.errors import SampleError
from data_tools.select.reshard import reshard
from data_tools.select.write import OutputOptions
from data_tools.demo.synthetic import SyntheticPhotos, write_synthetic
from test_engine import square, with_counter

run = functools.partial(run_tasks, num_workers=2, engine="ray")
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)  # which the calls then use
assert sorted(run(square, [3, 4, 5])) == [(0, 9), (1, 16), (2, 25)]
try:
    list(run(square, [1, -2]))
except SampleError as error:
    assert type(error) is SampleError, type(error)
    assert (error.cause, error.shard, error.key, error.meaning) == ("hash", "a.tar", "-2", "left out")
else:
    raise AssertionError("no error")
done = dict(sorted(result for _, result in run(functools.partial(with_counter, []), range(8))))
assert os.getpid() not in done and sum(done.values()) == 8, done
ray.shutdown()
folder = Path(sys.argv[1])
report = write_synthetic(folder, SyntheticPhotos(64, 48), num_shards=6, num_samples=60, num_workers=2, engine="ray")
assert not ray.is_initialized()
shuffled, _ = reshard(sorted(folder.glob("*.tar")), OutputOptions(folder / "shuffled", 25, 7, 2, "ray"))
print("written", report["shards"], shuffled.shards)
"""


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_shards(tmp_path: Path):
    pytest.importorskip("ray")
    here = Path(__file__).resolve()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parents[3]), str(here.parent)])
    (tmp_path / "script.py").write_text(RAY_SCRIPT)
    command = [sys.executable, "-W", "error", str(tmp_path / "script.py"), str(tmp_path / "ray")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "written 6 3"
    local = tmp_path / "local"
    write_synthetic(local, SyntheticPhotos(64, 48), num_shards=6, num_samples=60, num_workers=2)
    reshard(sorted(local.glob("*.tar")), OutputOptions(local / "shuffled", 25, 7, 2))
    tars = sorted(local.rglob("*.tar"))
    assert len(tars) == 9
    for tar in tars:
        assert tar.read_bytes() == (tmp_path / "ray" / tar.relative_to(local)).read_bytes(), tar.name
