"""What was received is its receiver's own, for as long as any view of it lives."""

from __future__ import annotations

import random
from typing import Any

import torch

from exec_core import Executor
from stress_checks.worker import checksum, views

KIB, MIB = 1 << 10, 1 << 20
_KEPT_BYTES = (1 * KIB, 64 * KIB, 2 * MIB, 24 * MIB)  # beside the pickle, in the ring and in mapped memory
_WRITTEN_BYTES = (1, 64 * KIB, 2 * MIB, 64 * MIB)


def kept_views(executor: Executor, messages: int) -> str:
    """One rank and the driver keep views of tensors while ``messages`` further messages of like sizes pass.

    Raises:
        AssertionError: naming the view that changed.
    """
    sent = {f"{nbytes} bytes": _random(nbytes) for nbytes in _KEPT_BYTES}
    keeper = executor.world_size - 1
    executor.collective_rpc("keep", args=(sent, (keeper,)))
    (back,) = executor.collective_rpc("echo", args=(sent,), reply_ranks=(keeper,))
    mine = {f"{name}: {how}": view for name, value in back.items() for how, view in views(value)}
    expected = {f"{name}: {how}": checksum(view) for name, value in sent.items() for how, view in views(value)}
    del back
    _pass_messages(executor, messages)
    (found,) = executor.collective_rpc("kept", ranks=(keeper,))
    for where, checksums in (
        (f"rank {keeper}", found),
        ("driver", {name: checksum(view) for name, view in mine.items()}),
    ):
        changed = [name for name in expected if checksums[name] != expected[name]]
        if changed or len(checksums) != len(expected):
            raise AssertionError(f"kept by the {where}, changed while {messages} messages passed: {changed}")
    mine.clear()
    executor.collective_rpc("drop")
    _pass_messages(executor, messages // 20)
    return f"{2 * len(expected)} views unchanged after {messages:,} messages"


def _pass_messages(executor: Executor, messages: int) -> None:
    """Of sizes like those that are kept, small ones more often; a few come back, too."""
    chance = random.Random(messages)  # noqa: S311 # not for secrets
    source = _random(max(_KEPT_BYTES))
    for number in range(messages):
        nbytes = chance.choices(_KEPT_BYTES, (8, 8, 3, 1))[0]
        part: Any = source[chance.randrange(len(source) - nbytes + 1) :][:nbytes]
        if number % 2:
            part = part.numpy()
        expected = checksum(part)
        if number % 5:
            found = executor.collective_rpc("checksum", args=(part,))
        else:
            found = [checksum(back) for back in executor.collective_rpc("echo", args=(part,))]
        if found != [expected] * executor.world_size:
            raise AssertionError(f"{nbytes} bytes with checksum {expected} arrived with {found}")


def _random(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def own_writes(executor: Executor) -> str:
    """All ranks, then the driver, write in place to what they were given; nobody else sees it.

    Raises:
        AssertionError: when somebody does.
    """
    for nbytes in _WRITTEN_BYTES:
        sent = torch.full((nbytes,), 100, dtype=torch.uint8)
        executor.collective_rpc("write", args=(sent,))
        again = executor.collective_rpc("checksum", args=(sent,))
        expected = [(rank + 1, rank + 1) for rank in range(executor.world_size)]
        _expect(nbytes, "in the driver", bool((sent == 100).all()), True)
        _expect(nbytes, "sent again", again, [checksum(sent)] * executor.world_size)
        _expect(nbytes, "on the ranks", executor.collective_rpc("written"), expected)
        for lent in executor.collective_rpc("lend", args=(nbytes,)):
            lent.fill_(200)
        _expect(nbytes, "on the ranks after the driver's write", executor.collective_rpc("written"), expected)
        executor.collective_rpc("drop")
    return f"tensors of {len(_WRITTEN_BYTES)} sizes written to on all sides"


def _expect(nbytes: int, where: str, found: object, expected: object) -> None:
    if found != expected:
        raise AssertionError(f"{nbytes} bytes {where}: {found}, not {expected}")
