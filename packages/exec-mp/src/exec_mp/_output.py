"""Where the workers' stdout and stderr go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def inherited_output() -> Iterator[tuple[int, int]]:
    """Descriptors of the driver's present stdout and stderr; of /dev/null where it has none."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield tuple(fd if _is_open(fd) else null for fd in (1, 2))  # type: ignore[misc] # two of them
    finally:
        os.close(null)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
