"""What holds for every test: shapes in signatures are checked, nothing leaves this machine, no window opens."""

import os
import socket

import jaxtyping
import pytest

# Programs that the tests start inherit these.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Before the first import of mmvit: from here on each call checks its annotations (dtype and shape of tensors too).
jaxtyping.install_import_hook("mmvit", "beartype.beartype")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that connects to anything but this machine itself."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and str(address[0]) not in {"127.0.0.1", "::1", "localhost"}:
            raise RuntimeError(f"a test connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
