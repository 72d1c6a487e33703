"""Joining a world where nobody, or somebody else, listens."""

from __future__ import annotations

import socket
import time

import pytest

from exec_core import ExecutorError
from exec_core.stores import tcp_store

LIMIT_S = 1.0


def refused(url: str) -> tuple[str, float]:
    """The error of an attempt to join, and how long it took."""
    began = time.monotonic()
    with pytest.raises(ExecutorError) as caught:
        tcp_store(url, rank=1, world_size=2, timeout_s=LIMIT_S)
    return str(caught.value), time.monotonic() - began


def test_nobody_listens() -> None:
    """The error says so within the limit, which torch's own client would double."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        port = taken.getsockname()[1]
        text, seconds = refused(f"tcp://127.0.0.1:{port}")

    assert f"nobody listens at 127.0.0.1:{port} after 1 s" in text
    assert seconds < 2 * LIMIT_S


def test_a_host_that_nobody_knows() -> None:
    """A name that leads nowhere is told like a port where nobody listens."""
    text, _ = refused("tcp://host.invalid:29500")

    assert "nobody listens at host.invalid:29500" in text


def test_a_stranger_who_says_nothing() -> None:
    """Something listens that never answers: an error within the limit, where torch's own client waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        text, seconds = refused(f"tcp://127.0.0.1:{port}")

    assert f"what listens at 127.0.0.1:{port} has not answered as a store within 1 s" in text
    assert seconds < 2 * LIMIT_S
