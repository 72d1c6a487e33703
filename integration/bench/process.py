"""A peer's process, as the campaign sees it: started, asked, left to become quiet, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import procfs
from bench.peer import AbsentError
from bench.peers import PeerSpec
from bench.stats import Metrics

INTEGRATION = Path(__file__).parents[1]
START_S = 180.0
ANSWER_S = 180.0
STOP_S = 15.0
_QUIET_CORES, _LOOK_S, _SETTLE_S = 0.05, 0.1, 3.0


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a program that imports `bench`, and keeps what it compiles: as installed by pip, packages are compiled."""
    path = os.pathsep.join([str(INTEGRATION), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": path, **(extra or {})}


class PeerProcess:
    """`bench.serve` with one peer. It starts at once; `ready` waits for it.

    Args:
        python: the interpreter that has what the peer needs.
        log: file that gets what it prints.
    """

    def __init__(self, spec: PeerSpec, n: int, python: str, log: Path) -> None:
        self.spec, self.n = spec, n
        self._log, self._unread = log, b""
        self._scratch = tempfile.TemporaryDirectory(prefix="b-", ignore_cleanup_errors=True)  # for names of sockets
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [python, "-m", "bench.serve", spec.name, str(n)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment({"TMPDIR": self._scratch.name, **dict(spec.variables)}),
                start_new_session=True,
            )

    def ready(self) -> dict[str, Any]:
        """Its version and how long it took.

        Raises:
            AbsentError: it did not start.
        """
        ready: dict[str, Any] = self._read(START_S)["ready"]
        return ready

    def ask(self, workload: str, params: Mapping[str, Any]) -> Metrics:
        """What a workload has measured.

        Raises:
            AbsentError: it cannot do that, or does not answer.
        """
        assert self._process.stdin is not None  # it is a pipe
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps({"workload": workload, "params": dict(params)}).encode() + b"\n")
            self._process.stdin.flush()
        metrics: Metrics = self._read(ANSWER_S)["metrics"]
        return metrics

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None  # it is a pipe
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.kill()
                raise AbsentError(f"no answer within {timeout_s:g} s")
            if not (read := os.read(descriptor, 1 << 16)):
                code = self._process.wait()
                raise AbsentError(f"it ended with exit code {code}{self._last_line()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "absent" in answer:
            raise AbsentError(answer["absent"])
        return answer

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def settle(self) -> None:
        """Waits until its processes are quiet: some go on looking for work for a while, and would disturb others."""
        until = time.monotonic() + _SETTLE_S
        pids = procfs.tree(self._process.pid)
        while self.alive and time.monotonic() < until:
            before = procfs.cpu_seconds(pids)
            time.sleep(_LOOK_S)
            if procfs.cpu_seconds(pids) - before < _QUIET_CORES * _LOOK_S:
                return

    def leave(self) -> None:
        """Ends its input, and so tells it to end."""
        assert self._process.stdin is not None  # it is a pipe
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def stop(self) -> None:
        """Waits until it has left, and kills what has not."""
        self.leave()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        assert self._process.stdout is not None  # it is a pipe
        self._process.stdout.close()
        self._scratch.cleanup()

    def kill(self) -> None:
        """With all its descendants."""
        for pid in procfs.tree(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def run_own(arguments: list[str], timeout_s: float, log: Path) -> dict[str, float]:
    """One of our own programs in a fresh interpreter: what it printed.

    Raises:
        AbsentError: it failed.
    """
    with log.open("ab") as file:
        command = [sys.executable, "-m", *arguments]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=file, env=environment(), timeout=timeout_s, check=True
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise AbsentError(f"{' '.join(arguments)}: {error}"[:200]) from error
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
