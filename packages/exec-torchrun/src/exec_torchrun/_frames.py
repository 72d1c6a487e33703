"""What ranks and hub say to each other, as bytes on a stream socket.

    kind (1 byte) | parts (4) | turn (8) | wait_s (8) | limit_s (8) | digest (16) || (number, nbytes) of each part || the parts

A `Connection` never waits for a half-sent frame: what has come is kept until the rest is there.
"""

from __future__ import annotations

import contextlib
import enum
import math
import select
import socket
import struct
import time

import attrs

_HEAD = struct.Struct("<B3xIQdd16s")
_PART = struct.Struct("<qQ")
_CHUNK = 1 << 16

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


class Connection:
    """A socket that carries frames. One thread sends at a time, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._buffer = bytearray()
        self.ended = False  # the other side has closed, or the connection broke

    def send(self, frame: Frame) -> None:
        """Sends ``frame``. A broken connection shows when it is read from."""
        parts = frame.parts
        data = _HEAD.pack(frame.kind, len(parts), frame.turn, frame.wait_s, frame.limit_s, frame.digest)
        if parts:
            table = b"".join([_PART.pack(number, len(body)) for number, body in parts])
            data = b"".join([data, table, *[body for _, body in parts]])
        try:
            self.sock.sendall(data)
        except OSError:
            pass

    def receive(self, deadline: float) -> Frame | None:
        """The next frame; None when there is none by ``deadline``, or no more will come (`ended`)."""
        while (frame := self.pop()) is None and not self.ended:
            remaining = deadline - time.monotonic()
            self.sock.settimeout(None if remaining == math.inf else max(0.0, remaining))
            try:
                self.fill(0)
            except TimeoutError:
                return None
        return frame

    def fill(self, flags: int) -> None:
        """Reads what has come; with ``socket.MSG_DONTWAIT`` nothing is fine."""
        try:
            data = self.sock.recv(_CHUNK, flags)
        except BlockingIOError:
            return
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if data:
            self._buffer += data
        else:
            self.ended = True

    def pop(self) -> Frame | None:
        """Takes a whole frame out of what has come."""
        buffer = self._buffer
        if len(buffer) < _HEAD.size:
            return None
        kind, n_parts, turn, wait_s, limit_s, digest = _HEAD.unpack_from(buffer)
        position = _HEAD.size + n_parts * _PART.size
        if len(buffer) < position:
            return None
        table = [_PART.unpack_from(buffer, _HEAD.size + i * _PART.size) for i in range(n_parts)]
        end = position + sum(nbytes for _, nbytes in table)
        if len(buffer) < end:
            return None
        parts = []
        for number, nbytes in table:
            parts.append((number, bytes(memoryview(buffer)[position : position + nbytes])))
            position += nbytes
        del buffer[:end]
        return Frame(Kind(kind), turn, tuple(parts), digest, wait_s, limit_s)

    def close(self) -> None:
        self.ended = True
        self.sock.close()


def wait_readable(sock: socket.socket, timeout_s: float) -> bool:
    """Whether something came within ``timeout_s`` seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000 if timeout_s < math.inf else None))
