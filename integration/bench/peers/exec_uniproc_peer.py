"""exec-uniproc through its public calls: the worker is in the caller's process."""

from __future__ import annotations

from typing import ClassVar

from bench.peers.exec_mp_peer import ExecMp


class ExecUniproc(ExecMp):
    """The same calls, in one process."""

    distribution: ClassVar[str | None] = "exec-uniproc"
    backend: ClassVar[str] = "uniproc"
