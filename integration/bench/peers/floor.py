"""What the machine itself takes: a ping-pong in C between processes that sleep, and one copy of memory."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.peer import AbsentError, Peer
from bench.stats import Metrics

_SOURCE = Path(__file__).with_name("eventfd_floor.c")


class EventfdFloor(Peer):
    """N processes of a C program, each asleep on its eventfd, that wake the driver by another one."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        compiler = shutil.which("cc")
        if compiler is None:
            raise AbsentError("there is no C compiler (cc)")
        self._directory = tempfile.TemporaryDirectory(prefix="bench-floor-")
        self._program = str(Path(self._directory.name) / "floor")
        done = subprocess.run(
            [compiler, "-O2", "-o", self._program, str(_SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise AbsentError(f"cc: {(done.stderr.strip().splitlines() or ['failed'])[0]}")

    def measure(self, workload: str, params: Mapping[str, Any]) -> Metrics:
        """Runs the program once."""
        command = [self._program, str(self.n), str(params["calls"])]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return {"us": [int(line) / 1e3 for line in output.split()]}

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """Only `measure` is of use here."""
        return []

    def in_flight(self, count: int, window: int) -> None:
        """Not in this program."""
        raise AbsentError("one call at a time")

    def stop(self) -> None:
        """Removes the program; its processes have ended."""
        self._directory.cleanup()


class MemcpyFloor(Peer):
    """Copies the payload into memory that is there already."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._copies: dict[int, bytearray] = {}

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """One copy of a tensor's bytes."""
        from bench.work import checksum

        if not args:
            return []
        source = args[0] if isinstance(args[0], bytes) else args[0].numpy()
        if (copy := self._copies.get(len(source))) is None:
            copy = self._copies[len(source)] = bytearray(len(source))
        memoryview(copy)[:] = source
        return [checksum(bytes(copy))] if method == "checksum" else [None]

    def in_flight(self, count: int, window: int) -> None:
        """Nothing to be had in advance."""
        raise AbsentError("one copy at a time")

    def stop(self) -> None:
        """Nothing to end."""
