"""What ranks and hub say to each other, as bytes on a stream socket.

    kind (1 byte) | parts (4) | turn (8) | wait_s (8) | limit_s (8) | digest (16) || (number, nbytes) of each part || the parts

A `Connection` never waits for a half-sent frame: what has come is kept until the rest is there.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import select
import socket
import struct
import time
import weakref

import attrs

_HEAD = struct.Struct("<B3xIQdd16s")
_PART = struct.Struct("<qQ")
# Ranks come to a call together: to wait for a while by yielding is cheaper than to sleep and be woken. Not where ranks share
# cores: then it would take them from those that are waited for.
HAS_CORES = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) <= len(os.sched_getaffinity(0))
SPIN_S = 200e-6 if HAS_CORES else 0.0
_CHUNK, _LARGEST_CHUNK = 1 << 14, 1 << 22
_LOOK_S = struct.pack("ll", 0, 100_000)  # a receiver looks at its deadline so often (struct timeval)
_STUCK_S = struct.pack("ll", 30, 0)  # a receiver that has not taken anything for so long gets nothing more

Part = tuple[int, bytes]


class Kind(enum.IntEnum):
    """What a frame says."""

    # a rank to the hub
    HELLO = 0  # I am here
    BEGIN = 1  # I want to run this call
    END = 2  # I have run it
    ERROR = 3  # I have run it, and it raised
    LEAVE = 4  # I shut down
    TEXT = 5  # my call in words
    # the hub to the ranks
    WELCOME = 6
    GO = 7  # all want to run the same call
    DONE = 8  # all have run it
    FAILED = 9  # these have raised; a part without bytes names a rank that has not come out of the call
    TIMEOUT = 10  # the call's time is over, and these have not come
    DIVERGED = 11  # the calls differ; each part is a rank's call in words
    DESCRIBE = 12  # the calls differ: tell me yours
    DIED = 13  # this rank is gone
    BYE = 14  # all have left
    LEFT = 15  # the hub's rank has left; the parts are those of DIVERGED


_KINDS = tuple(Kind)


@attrs.define  # not frozen: some are made for every call, and a frozen one costs three times as much
class Frame:
    """One message. Not changed once made.

    Attributes:
        turn: which meeting of the ranks it belongs to.
        parts: pairs of a number, a rank in most frames, and bytes.
        digest: of the call, for BEGIN.
        wait_s: how long the others may be away before they count as diverged, in seconds.
        limit_s: when the call's time is over, in seconds from now.
    """

    kind: Kind
    turn: int = 0
    parts: tuple[Part, ...] = ()
    digest: bytes = bytes(16)
    wait_s: float = math.inf
    limit_s: float = math.inf

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(number for number, _ in self.parts)

    def packed(self) -> bytes:
        """The bytes that travel."""
        parts = self.parts
        head = _HEAD.pack(self.kind, len(parts), self.turn, self.wait_s, self.limit_s, self.digest)
        if not parts:
            return head
        table = [_PART.pack(number, len(body)) for number, body in parts]
        return b"".join([head, *table, *[body for _, body in parts]])


class _Frames:
    """Takes frames out of bytes."""

    def __init__(self, data: bytes = b"") -> None:
        self._buffer: bytes | bytearray = data
        self._missing = 0  # of the frame that has begun to come, as far as is known
        self.ended = False  # no more will come

    def pop(self) -> Frame | None:
        """Takes a whole frame out of what has come; what cannot be one ends the connection."""
        buffer = self._buffer
        if len(buffer) < _HEAD.size:
            return None
        kind, n_parts, turn, wait_s, limit_s, digest = _HEAD.unpack_from(buffer)
        end = _HEAD.size + n_parts * _PART.size
        if kind >= len(_KINDS):
            self.ended = True
        if len(buffer) < end or self.ended:
            return None
        parts = []
        if n_parts:
            table = [_PART.unpack_from(buffer, _HEAD.size + i * _PART.size) for i in range(n_parts)]
            self._missing = end + sum([nbytes for _, nbytes in table]) - len(buffer)
            if self._missing > 0:
                return None
            for number, nbytes in table:
                parts.append((number, bytes(buffer[end : end + nbytes])))
                end += nbytes
        self._buffer = buffer[end:] if len(buffer) > end else b""
        return Frame(_KINDS[kind], turn, tuple(parts), digest, wait_s, limit_s)


_open: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection(_Frames):
    """A socket that carries frames. One thread sends at a time, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel's own limits: Python's would poll before every read and write.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LOOK_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _STUCK_S)
        self.sock = sock
        _open.add(self)

    def send(self, frame: Frame) -> None:
        """Sends ``frame``. A broken connection shows when it is read from."""
        self.send_packed(frame.packed())

    def send_packed(self, data: bytes) -> None:
        """Sends what `Frame.packed` made."""
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def receive(self, deadline: float, spin_until: float = 0.0) -> Frame | None:
        """The next frame; None when there is none by ``deadline``, or no more will come (`ended`).

        Args:
            spin_until: until when to wait by yielding.
        """
        while (frame := self.pop()) is None and not self.ended:
            if time.monotonic() < spin_until:
                if not self.fill(socket.MSG_DONTWAIT):
                    os.sched_yield()
            elif not self.fill() and time.monotonic() >= deadline:
                return None
        return frame

    def send_descriptor(self, fd: int) -> None:
        """Gives the other side a descriptor for the same file. Only between processes of one machine."""
        with contextlib.suppress(OSError):
            socket.send_fds(self.sock, [b"f"], [fd])

    def receive_descriptor(self) -> int | None:
        """What `send_descriptor` sent, before any frame, once the socket is readable; None when nothing has come."""
        _, fds, _, _ = socket.recv_fds(self.sock, 1, 1)
        return fds[0] if fds else None

    def drop(self) -> None:
        """Drops what has come."""
        while self.fill(socket.MSG_DONTWAIT) and not self.ended:
            while self.pop() is not None:
                pass

    def fill(self, flags: int = 0) -> bool:
        """Takes what has come; False for nothing, at once with ``socket.MSG_DONTWAIT``, otherwise after `_LOOK_S`."""
        try:
            data = self.sock.recv(min(max(self._missing, _CHUNK), _LARGEST_CHUNK), flags)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.ended = not data
        if not self._buffer:
            self._buffer = data
        else:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
        return True

    def peek(self, kind: Kind) -> Frame | None:
        """A small frame of ``kind`` that has come; whatever has come stays. From any thread."""
        try:
            data = b"" if self.ended else self.sock.recv(_CHUNK, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self.ended = self.ended or not data
        frames = _Frames(data)
        while (frame := frames.pop()) is not None and frame.kind is not kind:
            pass
        return frame

    def close(self) -> None:
        self.ended = True
        self.sock.close()


def _close_in_child() -> None:
    """A forked child of the host's keeps no connection open: its end would not tell the others that the host has died."""
    for connection in list(_open):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)


def wait_readable(sock: socket.socket, timeout_s: float) -> bool:
    """Whether something came within ``timeout_s`` seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000 if timeout_s < math.inf else None))
