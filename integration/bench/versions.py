"""Which versions this project is developed with, from constraints.txt: the same for all peers."""

from __future__ import annotations

from pathlib import Path

_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def version(distribution: str) -> str:
    """The one that ``distribution`` is pinned to."""
    lines = _CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{distribution}=="))
