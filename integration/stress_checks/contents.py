"""Messages of every size and kind arrive as they were sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from exec_core import Executor
from stress_checks.worker import checksum, shares

KIB, MIB = 1 << 10, 1 << 20


def sizes(executor: Executor, largest: int) -> str:
    """Tensors and bytes of 0 bytes to ``largest``, there and back.

    Raises:
        AssertionError: for a checksum that differs.
    """
    inline, checked = executor.config.rpc.inline_bytes, 0
    around = [inline // 2, inline, 4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
    steps = {0, 1, 2, 63, 64, 65, *(size + more for size in around for more in (-1, 0, 1))}
    for nbytes in sorted({size for size in steps if size < largest} | {largest // 4, largest}):
        tensor = _pattern(nbytes)
        _round_trip(executor, tensor)
        checked += 1
        if nbytes <= MIB:
            _round_trip(executor, tensor.numpy().tobytes())
            checked += 1
    return f"{checked} messages of 0 to {largest:,} bytes, there and back"


def _pattern(nbytes: int) -> torch.Tensor:
    """Bytes of which no two pages are alike."""
    block = torch.randint(0, 256, (min(nbytes, 8 * MIB + 11),), dtype=torch.uint8)
    return block.repeat(-(-nbytes // max(1, len(block))))[:nbytes]


def _round_trip(executor: Executor, value: Any) -> None:
    expected = checksum(value)
    arrived = executor.collective_rpc("checksum", args=(value,))
    (back,) = executor.collective_rpc("echo", args=(value,), ranks=(executor.output_rank,))
    found = [*arrived, checksum(back)]
    if found != [expected] * (executor.world_size + 1) or len(back) != len(value):
        raise AssertionError(f"{len(value)} bytes with checksum {expected} arrived on the ranks and back as {found}")


def kinds(executor: Executor) -> str:
    """Tensors and arrays of many types and layouts, nested, and views that share memory.

    Raises:
        AssertionError: naming what came back differently.
    """
    sent = _zoo()
    for rank, back in enumerate(executor.collective_rpc("echo", args=(sent,))):
        _compare(f"rank {rank}", sent, back)
        if not shares(back["views"][1], back["views"][0]):
            raise AssertionError(f"rank {rank}: two views of one storage came back as two storages")
    base = torch.arange(100_000, dtype=torch.int16)
    found = executor.collective_rpc("shares", args=(base, base[500:700]))
    found += executor.collective_rpc("shares", args=(base.clone(), base[500:700]))
    if found != [True] * executor.world_size + [False] * executor.world_size:
        raise AssertionError(f"whether two tensors share memory: the ranks say {found}")
    return f"{sum(1 for _ in _leaves(sent))} tensors and arrays, nested, there and back"


def _zoo() -> dict[str, Any]:
    base = torch.arange(3_000_000, dtype=torch.float32)
    floats = torch.randn(37, 53)
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2]
    array = np.arange(24_000, dtype=np.int32).reshape(20, 30, 40)
    return {
        "dtypes": {str(dtype): floats.to(dtype) for dtype in dtypes},
        "layouts": [
            floats.t(),
            floats[::3, 1::2],
            floats.expand(2, 37, 53),
            torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        ],
        "empty": (torch.empty(0), torch.empty(0, 5, dtype=torch.bfloat16), np.empty((3, 0)), b"", [], {}),
        "scalars": [torch.tensor(3.5), torch.tensor(True), np.float64(1.25), np.array(7, dtype=np.uint8)],  # a value
        "views": [base, base[1000:2000], base.view(1000, 3000)[:, 5]],
        "arrays": [array, array[::2, ::-1, 3:], np.asfortranarray(array[0]), np.array(["a", "bc"]), array > 5],
        "nested": {"deep": [{"er": (torch.ones(70_000), [np.ones(70_000)], "text")}]},
    }


def _leaves(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _compare(where: str, sent: Any, back: Any) -> None:
    if type(sent) is not type(back):
        raise AssertionError(f"{where}: {type(sent)} came back as {type(back)}")
    if isinstance(sent, dict):
        if list(sent) != list(back):
            raise AssertionError(f"{where}: keys {list(sent)} came back as {list(back)}")
        for key in sent:
            _compare(f"{where}, {key}", sent[key], back[key])
    elif isinstance(sent, list | tuple):
        if len(sent) != len(back):
            raise AssertionError(f"{where}: {len(sent)} items came back as {len(back)}")
        for number, (one, other) in enumerate(zip(sent, back, strict=True)):
            _compare(f"{where}, {number}", one, other)
    elif not _same(sent, back):
        raise AssertionError(f"{where}: {sent!r} came back as {back!r}")


def _same(sent: Any, back: Any) -> bool:
    if isinstance(sent, torch.Tensor):
        alike = (sent.dtype, sent.shape, sent.stride()) == (back.dtype, back.shape, back.stride())
        return alike and checksum(sent) == checksum(back)
    if isinstance(sent, np.ndarray):
        return (sent.dtype, sent.shape) == (back.dtype, back.shape) and bool(np.array_equal(sent, back))
    return bool(sent == back)
