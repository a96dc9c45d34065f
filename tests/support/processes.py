"""Start the ranks of a run on this machine: through `accelerate launch`, or one by one as a launcher does."""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_reserved: list[socket.socket] = []


def free_port() -> int:
    """Return a port that nobody else is given as long as this process lives.

    Its socket stays bound without listening: others cannot bind it and the system gives it to none, while the store of
    torch, which reuses addresses, can listen on it.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])


def launcher(num_ranks: int | None, *how: str) -> list[str]:
    """Return the beginning of a command of `accelerate launch`; None: the number is in a file that `how` names."""
    options: tuple[str, ...] = ()
    if num_ranks is not None:
        options = ("--num_processes", str(num_ranks), "--num_machines", "1", "--mixed_precision", "no")
        options += ("--dynamo_backend", "no")
    return [sys.executable, "-m", "accelerate.commands.launch", *how, *options, "--main_process_port", str(free_port())]


class Program:
    """A Python program in a process group of its own, with the methods of `subprocess.Popen`.

    It is forked from a server that has imported torch and accelerate, which takes a start about four seconds.
    """

    def __init__(self, arguments: Sequence[str], output: Path | None, environment: Mapping[str, str]):
        self._process = _forks.Process(target=_run, args=(list(arguments), output, dict(environment), Path.cwd()))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)  # until then a signal to its group would reach none

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = Program | subprocess.Popen[bytes]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torchvision", "accelerate"])


def _run(arguments: list[str], output: Path | None, environment: dict[str, str], folder: Path) -> None:
    """Run `python ARGUMENTS` in this new process."""
    os.setsid()
    if output is not None:
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # that of the system, not the one by which this was forked
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(command: Sequence[str], output: Path | None = None, **environment: str) -> Process:
    """Start a process in a group of its own; what it prints is appended to `output`."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()  # before the process opens it
    if command[0] == sys.executable and command[1] != "-c":
        return Program(command[1:], output, os.environ | environment)
    with output.open("ab") if output else contextlib.nullcontext() as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True)


def launch(
    num_ranks: int,
    program: Sequence[str],
    output: Callable[[int], Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Process]:
    """Start `python PROGRAM` as each rank of a run on CPUs; a run of one rank has no group of processes."""
    shared = {"ACCELERATE_USE_CPU": "true", **(environment or {})}
    if num_ranks > 1:
        size = str(num_ranks)
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    started = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
        command = [sys.executable, *program]
        started.append(start(command, output(rank) if output else None, **shared, **own))
    return started
