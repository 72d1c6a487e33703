"""The program of a peer's process: `python -m bench.serve PEER N`.

It starts the peer with N workers and prints `{"ready": {...}}`, then answers each line of its standard input,
`{"workload": name, "params": {...}}`, with a line `{"metrics": {...}}` or `{"absent": reason}`. It ends when the input
does. Whatever else is printed, by anybody, goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

from bench.peer import AbsentError
from bench.peers import PEERS
from bench.workloads import measure


def main(name: str, n: int) -> None:
    """Serves until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.set_inheritable(answers.fileno(), False)
    os.dup2(2, 1)
    started = time.monotonic()
    try:
        cls = PEERS[name].load()
        peer = cls(n)
        peer.call("noop")
    except Exception as error:
        _answer(answers, {"absent": _reason(error)})
        return
    _answer(answers, {"ready": {"start_s": time.monotonic() - started, "version": cls.version()}})
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {"metrics": measure(peer, request["workload"], request["params"])}
            except Exception as error:
                answer = {"absent": _reason(error)}
            _answer(answers, answer)
    finally:
        peer.stop()


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _reason(error: Exception) -> str:
    if isinstance(error, AbsentError):
        return str(error)
    traceback.print_exc()
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
