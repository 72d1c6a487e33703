"""A progress bar for several ranks that load at the same time."""

from __future__ import annotations

from typing import TextIO

_WIDTH = 30
_STEP = 25  # percent between two plain lines


class ProgressBar:
    """Shows how far all ranks are: one line drawn over and over on a terminal, a few plain lines elsewhere.

    Args:
        stream: where to.
        num_ranks: how many ranks will report.
    """

    def __init__(self, stream: TextIO, num_ranks: int) -> None:
        self._stream = stream
        self._redraws = stream.isatty()
        self._shares = dict.fromkeys(range(num_ranks), 0.0)
        self._shown = 0

    def update(self, rank: int, done: int, total: int, what: str) -> None:
        """Takes a report: ``rank`` has ``done`` of ``total`` units of ``what``."""
        self._shares[rank] = done / total
        percent = int(100 * sum(self._shares.values()) / len(self._shares))
        if percent == self._shown:
            return
        if self._redraws:
            filled = percent * _WIDTH // 100
            ranks = " ".join(f"{share:4.0%}" for share in self._shares.values())
            bar = "#" * filled + "-" * (_WIDTH - filled)
            print(f"\r{what} [{bar}] {percent:3d}%  by rank: {ranks}", end="", file=self._stream, flush=True)
        elif percent // _STEP > self._shown // _STEP:
            print(f"{what} {percent}% loaded on {len(self._shares)} ranks", file=self._stream, flush=True)
        self._shown = percent

    def close(self) -> None:
        """Takes the bar away; plain lines stay."""
        if self._redraws and self._shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
