"""The one bell of the driver: it may ring late, and for another thread than the one that takes the ringing back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import exec_core as ec
from exec_core.testing import Gate, eventually, workers
from exec_mp import _channel as end
from exec_mp import _driver_channel

Launch = Callable[..., ec.Executor]
MAIN = threading.main_thread()


@pytest.fixture
def executor(launch: Launch) -> ec.Executor:
    """Two ranks."""
    return launch(2, rpc={"timeout_s": 20.0})


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Where both wait."""
    return Gate(tmp_path)


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """What holds the background thread in a test; let go when that has failed."""
    event = threading.Event()
    yield event
    event.set()


def _channel(executor: ec.Executor) -> Any:
    return executor._group._channel  # type: ignore[union-attr] # ours


def _in_background(
    monkeypatch: pytest.MonkeyPatch, executor: ec.Executor, quiet: Callable[[Callable[[], None]], None]
) -> None:
    """``quiet(original)`` is how the background thread takes back what rang."""
    original = _channel(executor).quiet

    def patched() -> None:
        if threading.current_thread() is MAIN:
            original()
        else:
            quiet(original)

    monkeypatch.setattr(_channel(executor), "quiet", patched)


def test_bell_that_rings_late_costs_nobody_the_lead(
    executor: ec.Executor, gate: Gate, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the background thread finds out that there is nothing, the main thread receives its answer itself."""
    rung = threading.Event()

    def slowly(original: Callable[[], None]) -> None:
        rung.set()
        held.wait(30.0)
        original()

    _in_background(monkeypatch, executor, slowly)
    future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    _channel(executor).ring()
    assert rung.wait(10.0)
    gate.open()

    assert [0, 1] == future.result(10.0)
    assert not held.is_set()


def test_ringing_that_was_for_another_is_rung_again(
    executor: ec.Executor, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread is about to sleep on the bell when the background thread takes back what has rung for it."""
    channel, inside, leads, taken = _channel(executor), threading.Event(), threading.Event(), threading.Event()
    rings = end.rings

    def all_have_answered() -> bool:
        words = channel.look()
        return words is not None and len(channel.replies(words)) == 2

    def take_back(original: Callable[[], None]) -> None:
        inside.set()
        if leads.wait(20.0) and not taken.is_set():
            eventually(all_have_answered)
            time.sleep(0.1)  # and have rung
            original()
            taken.set()
        else:
            original()

    def late(*args: Any) -> bool:
        if threading.current_thread() is MAIN and not taken.is_set():
            gate.open()
            leads.set()
            assert taken.wait(20.0)
        return rings(*args)

    _in_background(monkeypatch, executor, take_back)
    monkeypatch.setattr(_driver_channel, "rings", late)
    future = executor.collective_rpc(workers.wait_at, args=(gate,), non_block=True)
    channel.ring()
    assert inside.wait(10.0)
    began = time.monotonic()

    assert [0, 1] == future.result(20.0)
    assert time.monotonic() - began < 10.0  # not when it looks for the last time
    assert taken.is_set()
