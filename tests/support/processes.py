"""Start the ranks of a run on this machine: through `accelerate launch`, or one by one as a launcher does."""

import os
import socket
import subprocess
import sys
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


def start(command: Sequence[str], output: Path | None = None, **environment: str) -> "subprocess.Popen[bytes]":
    """Start a process in a group of its own; what it prints is appended to `output`."""
    options = {"env": os.environ | environment, "start_new_session": True}
    if output is None:
        return subprocess.Popen(command, **options)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, **options)


def launch(
    num_ranks: int,
    program: Sequence[str],
    output: Callable[[int], Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> "list[subprocess.Popen[bytes]]":
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
