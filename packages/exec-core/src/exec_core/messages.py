"""What travels between driver and workers, as bytes: requests, values, errors.

    encode(value)  ->  Encoded(parts, nbytes, format)      serialised once, whatever the number of receivers
    decode(buffer, format)  ->  value                      in the receiver's own, private, writable memory

Format NONE is an empty body, PICKLE one pickle, SEGMENTS a pickle and the memory of its tensors and arrays beside it
(see `exec_core.arrays`)::

    [n_segments, n_views, pickle_nbytes][segment nbytes ...][(segment, offset) of each view ...] pickle | segment ...

with 8-byte words, and pickle and segments each starting on a multiple of 64 bytes. Pickling follows cloudpickle's
rules: functions and classes of ``__main__`` travel by value, those of a module by name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import cloudpickle

from exec_core import arrays
from exec_core.errors import RemoteTraceback, SerializationError, WorkerError

Part = bytes | bytearray | memoryview


class Format:
    """How a body is laid out. Plain numbers: an enum's take longer to compare than a small body to be unpickled."""

    NONE: Final = 0
    PICKLE: Final = 1
    SEGMENTS: Final = 2


class Status:
    """What a reply says."""

    VALUE: Final = 0
    ERROR: Final = 1
    PROGRESS: Final = 2


@attrs.define  # not frozen: one is made for every call, and a frozen one costs three times as much
class Encoded:
    """A body ready to be written: ``parts`` one after the other, ``nbytes`` in all, their memory kept by ``owners``."""

    parts: Sequence[Part]
    nbytes: int
    format: int
    owners: object = attrs.field(default=None, repr=False)


NO_KWARGS: Mapping[str, Any] = {}


@attrs.define  # not frozen, likewise
class Request:
    """One call as a worker runs it. Not changed once made.

    Attributes:
        method: a worker method's name, or a callable that gets the worker first.
        wants_value: whether the value is sent back; otherwise only that it has run.
    """

    method: str | Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = NO_KWARGS
    wants_value: bool = True

    @property
    def name(self) -> str:
        return method_name(self.method)


@attrs.define
class Reply:
    """What became of a `Request`: a value, or an error with the monotonic time at which it was raised, in ns.

    Not changed once made, but that its error is taken out by who raises it.
    """

    value: Any = None
    error: BaseException | None = None
    time_ns: int = 0

    @classmethod
    def of_error(cls, error: BaseException) -> Reply:
        """A reply that says so, now."""
        return cls(None, error, time.monotonic_ns())


@attrs.frozen
class Failure:
    """An error that arrived from a rank."""

    rank: int
    pid: int
    error: BaseException
    time_ns: int


def method_name(method: str | Callable[..., Any]) -> str:
    """A method for people: its name, or the callable's qualified name."""
    return method if isinstance(method, str) else getattr(method, "__qualname__", type(method).__qualname__)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle ships no types
    def __init__(self, file: io.BytesIO, table: arrays.ViewTable | None, same_program: bool = False) -> None:
        super().__init__(file, protocol=5)
        self._table, self._same_program = table, same_program

    def reducer_override(self, obj: Any) -> Any:
        if obj is arrays.load_tensor or obj is arrays.load_array:
            return NotImplemented  # by name, which takes cloudpickle long to find out
        if self._same_program and _is_in_main(obj):
            return NotImplemented
        reduced = None if self._table is None else self._table.reduce(obj)
        if reduced is None and type(obj).__name__ in arrays.STORAGES:
            reduced = arrays.reduce_storage(obj)
        return super().reducer_override(obj) if reduced is None else reduced


def _is_in_main(obj: Any) -> bool:
    """Whether it is a class or function that ``__main__`` has under its name."""
    if getattr(obj, "__module__", None) != "__main__" or not callable(obj):
        return False
    found: Any = sys.modules["__main__"]
    for name in getattr(obj, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is obj


_EMPTY = Encoded((), 0, Format.NONE)


def encode(value: object, name: str = "the value", same_program: bool = False) -> Encoded:
    """``value`` as a message body; None is an empty one.

    Args:
        same_program: the receiver has the same ``__main__``, so that its classes and functions travel by name and are the
            receiver's own.

    Raises:
        SerializationError: naming the part of ``value`` that cannot be pickled; ``name`` is what to call the whole.
    """
    if value is None:
        return _EMPTY
    if _is_plain(value):  # no pickler of our own is needed, and making one costs more than the rest
        plain = pickle.dumps(value, 5)
        return Encoded((plain,), len(plain), Format.PICKLE)
    return _encode_other(value, name, same_program)


def _encode_other(value: object, name: str = "the value", same_program: bool = False) -> Encoded:
    """`encode`, of what is not plain."""
    table, file = arrays.ViewTable(), io.BytesIO()
    is_common = bool(arrays.known) and _is_plain(value, _ATOMS | arrays.known)
    if not is_common or not _pickled_with_arrays(value, table, file):
        table, file = arrays.ViewTable(), io.BytesIO()
        try:
            _Pickler(file, table, same_program).dump(value)
        except Exception as error:
            path, cause = _culprit(value, name, error)
            raise SerializationError(path, f"{type(cause).__name__}: {cause}") from error
    nbytes = file.tell()
    segments, views = table.segments()
    if not segments:
        return Encoded((file.getbuffer(),), nbytes, Format.PICKLE)
    file.write(_padding(nbytes))
    if len(segments) == len(views) == 1:  # the commonest
        head = _ONE_VIEW.pack(1, 1, nbytes, segments[0].nbytes, *views[0])
    else:
        words = [len(segments), len(views), nbytes]
        words += [segment.nbytes for segment in segments]
        for view in views:
            words += view
        head = struct.pack(f"<{len(words)}Q", *words)
        head += _padding(len(head))
    parts: list[Part] = [head, file.getbuffer()]
    for segment in segments:
        if segment.lead:
            parts.append(bytes(segment.lead))
        parts.append(segment.memory())
        if padding := _padding(segment.nbytes):
            parts.append(padding)
    return Encoded(parts, sum(map(len, parts)), Format.SEGMENTS, segments)


def _pickled_with_arrays(value: object, table: arrays.ViewTable, file: io.BytesIO) -> bool:
    """Pickles builtin values among which are tensors and arrays; False when one of those is odd."""
    pickler = pickle.Pickler(file, 5)
    pickler.dispatch_table = table.dispatch()
    try:
        pickler.dump(value)
    except Exception:
        return False
    return True


_ONE_VIEW = struct.Struct(f"<6Q{-48 % arrays.ALIGNMENT}x")  # how such a body begins, with one view of one segment


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % arrays.ALIGNMENT)


_ATOMS: frozenset[type] = frozenset({int, str, float, bytes, bool, type(None)})
_CONTAINERS = frozenset({tuple, list, dict})
_PLAIN_ITEMS = 64


def _is_plain(value: Any, atoms: frozenset[type] = _ATOMS, depth: int = 4) -> bool:
    """Whether ``value`` is made of builtin containers and ``atoms`` only, and few of them."""
    kind = type(value)
    if kind not in _CONTAINERS:
        return kind in atoms
    if not depth or len(value) > _PLAIN_ITEMS:
        return False
    if kind is dict and not _is_plain(tuple(value.values()), atoms, depth):
        return False
    if not atoms.issuperset(map(type, value)):
        for item in value:
            if type(item) not in atoms and not _is_plain(item, atoms, depth - 1):
                return False
    return True


def decode(buffer: memoryview, fmt: int, owned: bool = False) -> Any:
    """The value in ``buffer``.

    Args:
        owned: tensors and arrays may lie over ``buffer`` itself, which is writable and theirs for as long as they live;
            otherwise they get a copy, and ``buffer`` may be reused as soon as this returns.
    """
    if fmt == Format.NONE:
        return None
    if fmt == Format.PICKLE:
        return pickle.loads(buffer)
    # One copy into memory of our own; the views below lie over it and keep it alive.
    memory = buffer if owned else memoryview(bytearray(buffer))
    n_segments, n_views, pickle_nbytes, size, number, offset = _ONE_VIEW.unpack_from(memory)
    if n_segments == n_views == 1:
        begin = _ONE_VIEW.size + arrays.round_up(pickle_nbytes)
        with arrays.Loading((memory[begin : begin + size],), ((number, offset),)):
            return pickle.loads(memory[_ONE_VIEW.size : _ONE_VIEW.size + pickle_nbytes])
    words = struct.unpack_from(f"<{n_segments + 2 * n_views}Q", memory, 24)
    position = arrays.round_up(8 * (3 + len(words)))
    pickled = memory[position : position + pickle_nbytes]
    position += arrays.round_up(pickle_nbytes)
    segments = []
    for nbytes in words[:n_segments]:
        segments.append(memory[position : position + nbytes])
        position += arrays.round_up(nbytes)
    with arrays.Loading(segments, list(zip(words[n_segments::2], words[n_segments + 1 :: 2], strict=True))):
        return pickle.loads(pickled)


def _culprit(value: object, path: str, error: Exception, depth: int = 6) -> tuple[str, Exception]:
    """The innermost part of ``value`` that cannot be pickled on its own, and why."""
    if depth:
        for name, part in _parts(value, path):
            try:
                _Pickler(io.BytesIO(), arrays.ViewTable()).dump(part)
            except Exception as inner:
                return _culprit(part, name, inner, depth - 1)
    return path, error


def _parts(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(value))
    elif callable(value) and hasattr(value, "__code__"):
        names = value.__code__.co_names
        known: dict[str, object] = getattr(value, "__globals__", {})
        yield from ((f"{path}: global {name!r}", known[name]) for name in names if name in known)
        closure = getattr(value, "__closure__", None) or ()
        for name, cell in zip(value.__code__.co_freevars, closure, strict=False):
            with contextlib.suppress(ValueError):  # an empty cell
                yield f"{path}: variable {name!r}", cell.cell_contents
    elif not isinstance(value, type):
        yield from ((f"{path}.{name}", part) for name, part in getattr(value, "__dict__", {}).items())


NAME_BYTES = 24  # of a method's name on its own; a longer one travels in the body


@functools.lru_cache(1024)
def _wire_name(method: str) -> bytes:
    """The name as it stands beside the body; empty for one that has to travel in it."""
    name = method.encode() if method.isidentifier() else b""
    return name if len(name) <= NAME_BYTES else b""


def encode_call(request: Request) -> tuple[bytes, Encoded]:
    """The method's name and the body of a request. Without a name, the method is in the body: a callable, say.

    Raises:
        SerializationError: naming the method or argument that cannot be pickled.
    """
    method, args, kwargs = request.method, request.args, request.kwargs
    name = _wire_name(method) if isinstance(method, str) else b""
    if not name:
        return name, _encode_named((args, kwargs, method), request)
    if not args and not kwargs:
        return name, _EMPTY
    if not _is_plain(args) or (kwargs and not _is_plain(kwargs)):
        return name, _encode_named((args, kwargs), request)
    plain = pickle.dumps((args, kwargs), 5)  # what `encode` would make of it, sooner
    return name, Encoded((plain,), len(plain), Format.PICKLE)


def _encode_named(body: tuple[Any, ...], request: Request) -> Encoded:
    try:
        return _encode_other(body)
    except SerializationError:
        names = ("args", "kwargs", "method")
        for name, part in zip(names, body, strict=False):
            encode(part, f"{request.name}: {name}")  # raises again, with the path from the argument on
        raise


def decode_call(
    name: str, buffer: memoryview, fmt: int, owned: bool = False
) -> tuple[str | Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    """Method, arguments and keyword arguments of the request that `encode_call` made. Unpickling may raise anything."""
    if fmt == Format.NONE:
        return name, (), NO_KWARGS
    body = pickle.loads(buffer) if fmt == Format.PICKLE else decode(buffer, fmt, owned)
    if name:
        args, kwargs = body
        return name, args, kwargs
    args, kwargs, method = body
    return method, args, kwargs


def encode_error(error: BaseException, why: str = "", same_program: bool = False) -> Encoded:
    """An error with its traceback; whatever cannot be pickled still arrives, as a `WorkerError`.

    Args:
        same_program: see `encode`.
    """
    text, remote = _text(error, str), _text(error, lambda e: "".join(traceback.format_exception(e)))
    pickled, file = None, io.BytesIO()
    try:
        if isinstance(error, Exception):
            _Pickler(file, None, same_program).dump(error)
            pickled = file.getvalue()
    except Exception as unpicklable:
        pickled, why = None, why or f"the exception cannot be pickled: {unpicklable}"
    return encode((pickled, type(error).__qualname__, text, remote, why))


def _text(error: BaseException, of: Callable[[BaseException], str]) -> str:
    """``of(error)``, which runs methods of the error's class."""
    try:
        return of(error)
    except Exception as silent:
        return f"<its text cannot be had: {type(silent).__name__}>"


def decode_error(buffer: memoryview, fmt: int, rank: int, pid: int, method: str) -> BaseException:
    """The error that a rank sent: its own type with a note and the remote traceback as cause, or a `WorkerError`."""
    pickled, type_name, text, remote, why = decode(buffer, fmt)
    error: object = None
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
            if not isinstance(error, Exception):
                why = f"it was loaded as a {type(error).__qualname__}"
        except Exception as unloadable:
            why = f"the exception cannot be loaded here: {type(unloadable).__name__}: {unloadable}"
    if not isinstance(error, Exception):
        error = WorkerError(rank, pid, method, type_name, text, remote, why)
    add_origin(error, rank, pid, method)
    error.__cause__ = RemoteTraceback(remote)
    return error


def add_origin(error: BaseException, rank: int, pid: int, method: str) -> None:
    """Notes on ``error`` where it was raised, once."""
    note = f"rank {rank} (pid {pid}) in {method}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def first_failure(failures: Sequence[Failure]) -> BaseException:
    """The first of ``failures`` by time, with the others listed in its notes."""
    first, *others = sorted(failures, key=lambda failure: failure.time_ns)
    for other in others:
        if other.error is not first.error:
            first.error.add_note(f"also failed: rank {other.rank} (pid {other.pid}): {other.error!r}")
    return first.error
