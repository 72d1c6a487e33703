"""The worker under stress. It keeps account of what reaches it, and plays with what it was given."""

from __future__ import annotations

import gc
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from exec_core import Worker, WorkerContext

_TICKET = struct.Struct("<2Q")


class Litter:
    """Garbage that only the collector finds, when it chooses to look, and whose finalizer then lets ``held`` go."""

    dropped = 0

    def __init__(self, held: object) -> None:
        self.held = held
        self.itself = self

    def __del__(self) -> None:
        self.held = None
        Litter.dropped += 1


class StressWorker(Worker):
    """Every method is one that the checks call."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context)
        self._order = 0  # of all tickets so far
        self._last: dict[int, int] = {}
        self._kept: dict[str, Any] = {}

    def collect_often(self, threshold: int) -> None:
        """Has the garbage collector come after every few allocations; 0: as it is used to."""
        collect_often(threshold)

    def note(self, thread: int, number: int, value: Any) -> tuple[int, int, Any]:
        """Takes a ticket; its answer depends on rank and value, and every other tensor comes back.

        Raises:
            ValueError: when it is not the next one of its thread.
        """
        expected = self._last.get(thread, -1) + 1
        if number != expected:
            raise ValueError(f"ticket {number} of thread {thread} came where {expected} was due")
        self._last[thread] = number
        self._order = zlib.crc32(_TICKET.pack(thread, number), self._order)
        Litter(value)
        return self.context.rank, answer(value, self.context.rank), value if comes_back(number, value) else None

    def order(self) -> tuple[int, int]:
        """A number that depends on all tickets and their order, and how many there were."""
        return self._order, sum(last + 1 for last in self._last.values())

    def checksum(self, value: Any) -> int:
        """Of the bytes of a tensor, array or bytes object."""
        return checksum(value)

    def echo(self, value: Any) -> Any:
        """What it was given."""
        return value

    def shares(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        """Whether a change of one tensor is a change of the other, here."""
        return shares(first, second)

    def keep(self, values: Mapping[str, Any], ranks: tuple[int, ...]) -> None:
        """On ``ranks``: keeps parts of the values, whose wholes it drops."""
        if self.context.rank in ranks:
            self._kept = {f"{name}: {how}": view for name, value in values.items() for how, view in views(value)}

    def kept(self) -> dict[str, int]:
        """Checksums of what it keeps."""
        return {name: checksum(view) for name, view in self._kept.items()}

    def drop(self) -> None:
        """Keeps nothing any more."""
        self._kept = {}

    def write(self, tensor: torch.Tensor) -> None:
        """Overwrites what it was given with its rank, and keeps it."""
        tensor.fill_(self.context.rank + 1)
        self._kept = {"written": tensor}

    def written(self) -> tuple[int, int]:
        """The least and the greatest byte of that."""
        tensor = self._kept["written"]
        return int(tensor.min()), int(tensor.max())

    def lend(self, nbytes: int) -> torch.Tensor:
        """A tensor that it keeps as well."""
        tensor = torch.full((nbytes,), self.context.rank + 1, dtype=torch.uint8)
        self._kept = {"written": tensor}
        return tensor


_THRESHOLDS = gc.get_threshold()


def collect_often(threshold: int) -> None:
    """Has the garbage collector come after every few allocations; 0: as it is used to."""
    if threshold:
        gc.freeze()  # what is there already need not be looked at every time
        gc.set_threshold(threshold, 2, 2)
    else:
        gc.set_threshold(*_THRESHOLDS)
        gc.unfreeze()


def note(worker: StressWorker, thread: int, number: int, value: Any) -> tuple[int, int, Any]:
    """The method, as a function that travels with the call."""
    return worker.note(thread, number, value)


def comes_back(number: int, value: Any) -> bool:
    """Whether the answer to this ticket has the value in it."""
    return number % 2 == 0 and not isinstance(value, int)


def answer(value: Any, rank: int) -> int:
    """What rank ``rank`` has to say to ``value``."""
    return (value * 3 if isinstance(value, int) else checksum(value)) + rank


def checksum(value: Any) -> int:
    """Of the bytes of a tensor, array or bytes object."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(value)


def shares(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a change of one tensor is a change of the other."""
    before = second.clone()
    first.view(torch.uint8).bitwise_not_()
    changed = not torch.equal(before, second)
    first.view(torch.uint8).bitwise_not_()
    return changed and torch.equal(before, second)


def views(value: torch.Tensor) -> list[tuple[str, Any]]:
    """Ways to hold on to a part of a tensor's memory without the tensor."""
    array = value.numpy()
    middle = len(value) // 3
    return [
        ("tensor", value.view(-1)),
        ("slice", value[middle : 2 * middle]),
        ("array", array[1:]),
        ("from_numpy", torch.from_numpy(array[middle:])),
        ("memoryview", array.data[:middle]),
    ]
