"""Whether two ranks mean the same call: digests of it that are the same in every process, and the call in words.

    QuickDigest     by a pickler, which is fast; equal calls may differ by the order of a set
    exact_digest    by taking values apart, made only when the quick ones differ: sets in any order, and whatever else there is

Values count, not identities: neither looks at what is shared inside a call. A tensor or an array counts by shape, type and
memory, a function by its name and code and the plain data that it closes over.
"""

from __future__ import annotations

import contextlib
import copyreg
import marshal
import pickle
import reprlib
import struct
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from exec_core.messages import method_name

_SAMPLE_BYTES = 1 << 16  # larger arrays and tensors are compared by their beginning and end
_DEPTH = 30
_pack_checksum = struct.Struct("<QII").pack
_ATOMS = frozenset({int, str, float, bytes, bool, complex, type(None)})
_CONTAINERS = frozenset({tuple, list, set, frozenset})


@attrs.frozen
class PerRank:
    """An argument that may differ between ranks. The worker gets ``value``."""

    value: Any


def own_value(argument: Any) -> Any:
    """What the worker gets for ``argument``."""
    return argument.value if isinstance(argument, PerRank) else argument


class QuickDigest:
    """``digest(method, args, kwargs, options)`` is 16 bytes. Equal ones mean equal calls. For one thread at a time.

    It keeps its pickler: to make one for each call takes as long as all the rest.
    """

    def __init__(self) -> None:
        self._written: list[bytes] = []
        self._pickler = self._new_pickler()

    def _new_pickler(self) -> _Pickler:
        pickler = _Pickler(_Writer(self._written.append), 5)
        pickler.fast = True  # no memo: what is shared does not count
        return pickler

    def __call__(
        self, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: tuple[Any, ...]
    ) -> bytes:
        written = self._written
        try:
            self._pickler.dump((method, args, _ordered(kwargs) if kwargs else kwargs, options))
            data = written[0] if len(written) == 1 else b"".join(written)
        except Exception:  # something in it cannot be pickled, or holds itself
            self._pickler = self._new_pickler()
            return exact_digest(method, args, kwargs, options)
        finally:
            written.clear()
        return _checksum(data)


def exact_digest(
    method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: tuple[Any, ...]
) -> bytes:
    """16 bytes, equal for equal calls and for no others."""
    return _digest((method, args, _ordered(kwargs), options), _DEPTH)


def _ordered(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keyword arguments mean the same in any order."""
    return dict(sorted(kwargs.items())) if len(kwargs) > 1 else kwargs


def describe_call(method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The call in words, cut to a readable length."""
    shown = [_short(value) for value in args] + [f"{name}={_short(value)}" for name, value in kwargs.items()]
    return f"{method_name(method)}({', '.join(shown)})"


@attrs.frozen
class _Writer:
    """What a pickler takes for a file."""

    write: Callable[[bytes], object]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """What is not pickled by its own rules: only its bytes matter, nobody loads them."""
        if isinstance(value, PerRank | types.ModuleType):
            return "per rank"
        if isinstance(value, types.FunctionType | types.MethodType):
            return bytes, (_code_of(value),)
        memory = _memory(value)
        return NotImplemented if memory is None else (bytes, (memory,))


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 8

    def repr_Tensor(self, value: Any, level: int) -> str:  # noqa: N802, ARG002 # reprlib looks for this name
        if value.numel() <= self.maxlist and value.device.type == "cpu":
            return f"tensor({value.tolist()})"
        return f"tensor(shape={tuple(value.shape)}, dtype={value.dtype}, device={value.device})"


def _short(value: Any) -> str:
    try:
        return _Repr().repr(value)
    except Exception:  # a __repr__ of the user's
        return f"<{type(value).__qualname__}>"


def _checksum(data: bytes) -> bytes:
    """Against mistakes, not against attackers: ten times as fast as a hash."""
    return _pack_checksum(len(data), zlib.crc32(data), zlib.adler32(data))


def _digest(value: Any, depth: int) -> bytes:
    parts: list[bytes] = []
    _feed(parts.append, value, depth)
    return _checksum(b"".join(parts))


def _feed(update: Callable[[bytes], None], value: Any, depth: int) -> None:
    """Puts ``value`` into the digest: plain data by `marshal` in its version 2, which knows no sharing and sorts sets."""
    if _is_data(value, depth):
        update(marshal.dumps(value, 2))
        return
    update(type(value).__qualname__.encode())
    if depth:
        _feed_parts(update, value, depth - 1)


def _is_data(value: Any, depth: int = _DEPTH) -> bool:
    """Whether it is made of builtin values only: `marshal` takes whatever has memory for bytes, arrays of any type too."""
    kind = type(value)
    if kind is dict:
        return _is_data(list(value), depth) and _is_data(list(value.values()), depth)
    if kind in _CONTAINERS:
        return set(map(type, value)) <= _ATOMS or (depth > 0 and all(_is_data(item, depth - 1) for item in value))
    return kind in _ATOMS


def _feed_parts(update: Callable[[bytes], None], value: Any, depth: int) -> None:
    if isinstance(value, PerRank | types.ModuleType):
        return
    if isinstance(value, bytearray | memoryview):
        update(bytes(value))
    elif isinstance(value, tuple | list):
        update(str(len(value)).encode())
        for part in value:
            _feed(update, part, depth)
    elif isinstance(value, dict):
        _feed_parts(update, [part for item in value.items() for part in item], depth)
    elif isinstance(value, set | frozenset):
        update(b"".join(sorted(_digest(part, depth) for part in value)))
    elif isinstance(value, type):
        update(f"{value.__module__}.{value.__qualname__}".encode())
    elif isinstance(value, types.FunctionType | types.MethodType):
        update(_code_of(value))
    elif (memory := _memory(value)) is not None:
        update(memory)
    else:
        _feed_object(update, value, depth)


def _code_of(function: types.FunctionType | types.MethodType) -> bytes:
    """Its name and code, and the plain data that it closes over or has as defaults: other things may be a rank's own."""
    if isinstance(function, types.MethodType):
        return _code_of(function.__func__) if isinstance(function.__func__, types.FunctionType) else b""
    parts = [f"{function.__module__}.{function.__qualname__}".encode(), *_code_parts(function.__code__)]
    values = [*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty still
            values.append(cell.cell_contents)
    return b"".join([*parts, *(marshal.dumps(value, 2) for value in values if _is_data(value))])


def _code_parts(code: types.CodeType) -> list[bytes]:
    """What it does, without where it was read from: that may differ between machines."""
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts += _code_parts(constant)
        elif _is_data(constant):
            parts.append(marshal.dumps(constant, 2))
    return parts


def _memory(value: Any) -> bytes | None:
    """Shape, type and memory of an array or a tensor; None for anything else."""
    if not (hasattr(type(value), "dtype") and hasattr(type(value), "shape")):
        return None
    if getattr(value.dtype, "hasobject", False):  # its memory is addresses: taken apart as an object
        return None
    head = f"{tuple(value.shape)} {value.dtype}".encode()
    try:
        if hasattr(type(value), "detach"):  # a tensor
            if value.device.type != "cpu":
                return head  # reading it would wait for the device
            import torch

            value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(value.tobytes() if value.nbytes <= _SAMPLE_BYTES else value.reshape(-1)).cast("B")
    except (TypeError, ValueError, RuntimeError):  # sparse, of objects, without memory of its own: its type has to do
        return head
    return head + (
        bytes(data) if len(data) <= _SAMPLE_BYTES else bytes(data[: _SAMPLE_BYTES // 2]) + data[-_SAMPLE_BYTES // 2 :]
    )


def _feed_object(update: Callable[[bytes], None], value: Any, depth: int) -> None:
    """An object as pickle would take it apart; one that cannot be pickled counts by its type."""
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return
    if isinstance(reduced, str):
        update(reduced.encode())
        return
    made_by, arguments, *state = reduced
    if made_by is copyreg.__newobj__:  # type: ignore[attr-defined] # what most classes say, about themselves
        arguments = arguments[1:]
    else:
        update(getattr(made_by, "__qualname__", type(made_by).__qualname__).encode())
    _feed(update, arguments, depth)
    for part in state[:1]:
        _feed(update, part, depth)
    for items in state[1:3]:
        _feed(update, None if items is None else list(items), depth)
