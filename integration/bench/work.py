"""What the workers of every peer do, and the payloads that they are sent."""

from __future__ import annotations

import time
import zlib
from typing import Any


class Work:
    """The methods that the cases call. Each peer gives one such object to each of its workers."""

    def __init__(self) -> None:
        self._tensors: dict[int, Any] = {}

    def run(self, method: str, args: tuple[Any, ...]) -> Any:
        """One call."""
        return getattr(self, method)(*args)

    def noop(self) -> None:
        """Nothing."""

    def take(self, payload: object) -> None:
        """Drops what it was given."""

    def echo(self, payload: object) -> object:
        """What it was given."""
        return payload

    def give(self, nbytes: int) -> Any:
        """A tensor of bytes."""
        if nbytes not in self._tensors:
            self._tensors[nbytes] = tensor(nbytes)
        return self._tensors[nbytes]

    def step(self, busy_s: float, payload: object) -> None:
        """Is busy for a while, as a model is."""
        time.sleep(busy_s)

    def checksum(self, payload: Any) -> int:
        """Of bytes or of a tensor of bytes."""
        return checksum(payload)


def tensor(nbytes: int) -> Any:
    """A CPU tensor of ``nbytes`` bytes of no particular pattern."""
    import torch

    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def payload(kind: str, nbytes: int) -> Any:
    """``bytes`` or a ``tensor``."""
    return bytes(nbytes) if kind == "bytes" else tensor(nbytes)


def checksum(value: Any) -> int:
    """Of bytes or of a tensor of bytes."""
    return zlib.crc32(value if isinstance(value, bytes) else value.numpy())
