"""Tensors and arrays in messages: moved as bytes beside the pickle, never through it.

    pickling          every tensor and numpy array becomes an index into the message's table of byte ranges
    after pickling    ranges that overlap in memory are merged into segments, so that views which shared memory share
                      it again on arrival, and a slice of a large tensor ships only its own bytes
    unpickling        each view is laid over its segment of the receiver's own, private, writable memory

What was on a CUDA device arrives on the CPU: the sender's device number means another device to the receiver, or none, and
a tensor that came there by itself would cost a CUDA context.

Neither torch nor numpy is imported here: an object of theirs can only exist where they are imported already.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import attrs

ALIGNMENT = 64  # bytes; of segments in a message
_WIDEST = 16  # bytes; of complex128, the widest element
STORAGES = frozenset({"TypedStorage", "UntypedStorage"})  # names of torch's classes of what lies under a tensor


@attrs.define  # not frozen: that takes three times as long
class Segment:
    """Contiguous source memory, ``[start, end)``, kept alive by ``owners``."""

    start: int
    end: int
    owners: tuple[object, ...] = attrs.field(eq=False, repr=False)

    @property
    def lead(self) -> int:
        """Bytes of padding in front, so that addresses keep their remainder: a wider view may begin inside."""
        return self.start % _WIDEST

    @property
    def nbytes(self) -> int:
        return self.lead + self.end - self.start

    def memory(self) -> memoryview:
        """The source memory itself, or a copy where it is a device's."""
        start, end = self.start, self.end
        if getattr(self.owners[0], "is_cuda", False):
            return _copied_to_host(self.owners[0], start, end)
        return memoryview((ctypes.c_char * (end - start)).from_address(start)).cast("B")


def _copied_to_host(tensor: Any, start: int, end: int) -> memoryview:
    """The bytes from ``start`` to ``end`` of the storage of a CUDA tensor, once what computes them has run."""
    import torch

    storage, memory = tensor.untyped_storage(), bytearray(end - start)
    source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    source.set_(storage, start - storage.data_ptr(), (len(memory),), (1,))
    torch.frombuffer(memory, dtype=torch.uint8).copy_(source)
    return memoryview(memory)


def reduce_storage(obj: Any) -> Any:
    """How to pickle the storage of a CUDA tensor that is not plain, so that it arrives on the CPU; None for all else."""
    torch = sys.modules.get("torch")
    if torch is None or type(obj) not in {torch.TypedStorage, torch.UntypedStorage}:
        return None
    storage = getattr(obj, "_untyped_storage", obj)
    if not storage.is_cuda:
        return None
    host = storage.cpu()
    if storage is not obj:
        host = torch.TypedStorage(wrap_storage=host, dtype=obj.dtype, _internal=True)
    return host.__reduce__()


known: frozenset[type] = frozenset()  # torch.Tensor and numpy.ndarray, each once one has been pickled


def _meet(kind: type) -> None:
    global known
    if kind not in known:
        known |= {kind}


class ViewTable:
    """The byte ranges that one message refers to, collected while it is pickled."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, object]] = []  # (start, end, owner), in the order of the views

    def dispatch(self) -> dict[type, Callable[[Any], Any]]:
        """For a pickler that meets no others: how to pickle what is of a `known` type. Raises for one that is not plain."""
        return dict.fromkeys(known, self._reduce_plain)

    def _reduce_plain(self, obj: Any) -> tuple[object, ...]:
        reduced = self.reduce(obj)
        if reduced is None:
            raise TypeError("not plain")
        return reduced

    def reduce(self, obj: Any) -> tuple[object, ...] | None:
        """How to pickle ``obj``, or None when it is not a plain strided tensor or array."""
        kind = type(obj)
        torch = sys.modules.get("torch")
        if torch is not None and kind is getattr(torch, "Tensor", None):
            return self._reduce_tensor(obj) if _is_plain(obj, torch) else None
        numpy = sys.modules.get("numpy")
        if numpy is not None and kind is getattr(numpy, "ndarray", None) and not obj.dtype.hasobject:
            return self._reduce_array(obj)
        return None

    def _reduce_tensor(self, tensor: Any) -> tuple[object, ...]:
        _meet(type(tensor))
        shape, stride, count = tuple(tensor.shape), tensor.stride(), tensor.numel()
        if not tensor.is_contiguous():
            count = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1 if count else 0
        index = self._add(tensor.data_ptr(), count * tensor.element_size(), tensor)
        return load_tensor, (index, str(tensor.dtype).removeprefix("torch."), shape, stride, tensor.requires_grad)

    def _reduce_array(self, array: Any) -> tuple[object, ...]:
        _meet(type(array))
        steps = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
        before = -sum(s for s in steps if s < 0)  # bytes below the first element when strides are negative
        extent = before + sum(s for s in steps if s > 0) + array.itemsize if array.size else 0
        index = self._add(array.ctypes.data - before, extent, array)
        return load_array, (index, array.dtype, array.shape, array.strides, before)

    def _add(self, start: int, nbytes: int, owner: object) -> int:
        if nbytes == 0:
            return -1
        self._ranges.append((start, start + nbytes, owner))
        return len(self._ranges) - 1

    def segments(self) -> tuple[list[Segment], list[tuple[int, int]]]:
        """Merged segments, and for each view the number of its segment and its offset there in bytes."""
        ranges = self._ranges
        if len(ranges) == 1:  # the commonest
            ((start, end, owner),) = ranges
            only = Segment(start, end, (owner,))
            return [only], [(0, only.lead)]
        merged: list[list[Any]] = []
        place: dict[int, tuple[int, int]] = {}
        for index in sorted(range(len(ranges)), key=lambda i: ranges[i][:2]):
            start, end, owner = ranges[index]
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
                merged[-1][2].append(owner)
            else:
                merged.append([start, end, [owner]])
            place[index] = len(merged) - 1, start
        segments = [Segment(start, end, tuple(owners)) for start, end, owners in merged]
        views = (place[i] for i in range(len(ranges)))
        return segments, [(n, start - segments[n].start + segments[n].lead) for n, start in views]


def _is_plain(tensor: Any, torch: Any) -> bool:
    return (
        tensor.layout is torch.strided
        and (tensor.is_cpu or tensor.is_cuda)
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
        and not vars(tensor)
        and (tensor.is_leaf or not tensor.requires_grad)
    )


class _State(threading.local):
    """What the message being unpickled by this thread refers to."""

    segments: Sequence[Any] = ()
    views: Sequence[tuple[int, int]] = ()


_loading = _State()


class Loading:
    """Context in which `load_tensor` and `load_array` find the memory of the message being unpickled."""

    def __init__(self, segments: Sequence[Any], views: Sequence[tuple[int, int]]) -> None:
        self._now = segments, views

    def __enter__(self) -> None:
        self._outer = _loading.segments, _loading.views
        _loading.segments, _loading.views = self._now

    def __exit__(self, *exc: object) -> None:
        _loading.segments, _loading.views = self._outer


def load_tensor(
    index: int, dtype_name: str, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool
) -> Any:
    """A tensor over its segment of the message being unpickled; ``shape`` and ``stride`` in elements."""
    import torch

    dtype = getattr(torch, dtype_name)
    if index < 0:
        return torch.empty_strided(shape, stride, dtype=dtype, requires_grad=requires_grad)
    number, offset = _loading.views[index]
    if not offset and len(_loading.views) == 1:  # the commonest: nothing else lies there, nor will be laid over it
        tensor = torch.frombuffer(_loading.segments[number], dtype=dtype)
        if stride != (1,) or tensor.shape != shape:
            tensor.as_strided_(shape, stride)
        return tensor.requires_grad_() if requires_grad else tensor
    storage = torch.frombuffer(_loading.segments[number], dtype=torch.uint8).untyped_storage()
    tensor = torch.empty(0, dtype=dtype)
    if offset % tensor.element_size():  # unaligned at its source too: torch cannot say so, a copy can
        extent = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
        own = bytearray(_loading.segments[number][offset : offset + extent * tensor.element_size()])
        storage, offset = torch.frombuffer(own, dtype=torch.uint8).untyped_storage(), 0
    tensor.set_(storage, offset // tensor.element_size(), shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor


def load_array(index: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], before: int) -> Any:
    """A numpy array over its segment; ``strides`` in bytes, ``before`` the bytes below its first element."""
    import numpy

    if index < 0:
        return numpy.empty(shape, dtype)
    number, offset = _loading.views[index]
    return numpy.ndarray(shape, dtype, _loading.segments[number], offset + before, strides)


def round_up(nbytes: int) -> int:
    """``nbytes`` up to the next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
