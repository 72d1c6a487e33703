"""The first meeting of all ranks of the world, before any worker exists.

    rank 0: listens, puts its address into the launcher's store
    others: connect, say HELLO with a report        (configuration, what is wrong here, where my replica's hub listens)
    rank 0: WELCOME with all reports                (so that all ranks raise if one has something to raise)

The launcher's store may still hold what an earlier attempt of the same job put there (torchrun keeps it over restarts), so
an address counts only if somebody answers there who knows the secret beside it, and the process groups meet under a name
that rank 0 draws anew.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import secrets
import socket
import time
from typing import Any

import attrs

from exec_core import messages
from exec_core.errors import WorkerStartupError
from exec_torchrun import _sockets, _store
from exec_torchrun._env import LauncherEnv
from exec_torchrun._frames import Connection, Frame, Kind
from exec_torchrun._hub import Hub
from exec_torchrun._link import Link, Member
from exec_torchrun._page import HAS_PAGE, Page
from exec_torchrun._sockets import Address, Patience, Problem


@attrs.frozen
class Report:
    """What a rank tells all others before the start.

    Attributes:
        config: what must be the same on all ranks, in words.
        error: pickled with `exec_core.messages.encode_error`: why this rank cannot start; empty when it can.
        hub: where this rank listens for the others of its replica; None for a rank that is no hub, or no others.
    """

    rank: int
    pid: int
    config: str
    error: bytes = b""
    hub: Address | None = None


@attrs.frozen
class Meeting:
    """What came of it.

    Attributes:
        reports: of all ranks, in rank order.
        init_method: URL under which the process groups meet.
        link: to the other ranks of this replica; None when there are none.
    """

    reports: tuple[Report, ...]
    init_method: str | None
    link: Link | None


def meet(env: LauncherEnv, name: str, report: Report, patience: Patience, grace_s: float) -> Meeting:
    """Meets all ranks of the world.

    Args:
        name: of this meeting, the same on all ranks.
        grace_s: see `exec_torchrun._rounds.Rounds`.

    Raises:
        WorkerStartupError: naming who did not come while there was ``patience``, or this rank when it was given up.
    """
    if env.world_size == 1:
        return Meeting((report,), None, None)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(_store.found(env, patience))
        listener = None
        if env.index == 0 and env.replica_size > 1:
            listener, address = _sockets.listen(env, stack)
            report = attrs.evolve(report, hub=address)
        key = f"{_store.SCHEME}/{name}"
        if env.rank == 0:
            reports, token = _receive(env, key, store, report, patience)
        else:
            reports, token = _visit(env, key, store, report, patience)
        link: Link | None = None
        hub = reports[env.replica * env.replica_size]
        if listener is not None and report.hub is not None:
            connections = _gather(env, listener, report.hub.secret, patience)
            pids = {index: reports[env.rank + index].pid for index in connections}
            link = Hub(connections, pids, grace_s, _share_page(env, connections))
        elif hub.hub is not None:
            while (connection := _sockets.try_connect(hub.hub, env.index, b"")) is None:
                _pause(env, patience, hub.rank)
            link = Member(env.index, connection, hub.pid, _receive_page(env, connection, patience))
        return Meeting(reports, _store.offer(store, token), link)


def _pause(env: LauncherEnv, patience: Patience, rank: int) -> None:
    """A moment, before ``rank`` is looked for again.

    Raises:
        WorkerStartupError: there is no more patience.
    """
    patience.check(env.rank)
    if not patience.left_s:
        raise WorkerStartupError(rank, "launch", "cannot be reached for the ranks' first meeting")
    time.sleep(_sockets.RETRY_S)


def _receive(
    env: LauncherEnv, key: str, store: Any, mine: Report, patience: Patience
) -> tuple[tuple[Report, ...], str]:
    """Rank 0's part: waits for all others and tells each what all have said."""
    with contextlib.ExitStack() as stack:
        listener, address = _sockets.listen(env, stack)
        store.set(key, pickle.dumps(address))
        warning = functools.partial(_store.warning, store, key)
        visitors, problem = _sockets.accept(listener, address.secret, range(1, env.world_size), patience, warning)
        for connection, _ in visitors.values():
            stack.callback(connection.close)
        reports = (mine, *(pickle.loads(visitors[rank][1].parts[1][1]) for rank in sorted(visitors)))
        answer = problem, reports, secrets.token_hex(8)
        for connection, _ in visitors.values():
            connection.send(Frame(Kind.WELCOME, 0, ((0, pickle.dumps(answer)),)))
    return _checked(*answer)


def _visit(env: LauncherEnv, key: str, store: Any, mine: Report, patience: Patience) -> tuple[tuple[Report, ...], str]:
    """The other ranks' part."""
    while True:
        try:
            said = None
            while not store.check([key]) and (said := _store.warning(store, key)) is None and patience.left_s:
                time.sleep(_sockets.RETRY_S)
            store.set_timeout(patience.left)
            address = None if said is not None else pickle.loads(store.get(key))
        except Exception as error:
            patience.check(env.rank)
            raise WorkerStartupError(0, "launch", "did not come to the ranks' first meeting") from error
        if address is None:
            return _checked(said, (), "")
        connection = _sockets.try_connect(address, env.rank, pickle.dumps(mine))
        frame = None if connection is None else _sockets.receive(connection, patience)
        if connection is not None:
            connection.close()
        if frame is not None:
            return _checked(*pickle.loads(frame.parts[0][1]))
        _pause(env, patience, 0)  # what an earlier attempt left in the store is overwritten soon


def _checked(problem: Problem, reports: tuple[Report, ...], token: str) -> tuple[tuple[Report, ...], str]:
    if isinstance(problem, bytes):
        raise messages.decode_error(memoryview(problem), messages.Format.PICKLE, -1, 0, "launch")
    if problem is not None:
        raise WorkerStartupError(problem[0], "launch", problem[1])
    return reports, token


def _gather(env: LauncherEnv, listener: socket.socket, secret: bytes, patience: Patience) -> dict[int, Connection]:
    visitors, problem = _sockets.accept(listener, secret, range(1, env.replica_size), patience)
    connections = {index: connection for index, (connection, _) in visitors.items()}
    if isinstance(problem, tuple):
        for connection in connections.values():
            connection.close()
        raise WorkerStartupError(env.rank + problem[0], "launch", problem[1])
    return connections


def _share_page(env: LauncherEnv, connections: dict[int, Connection]) -> Page | None:
    """Gives the others memory to meet in, if all ranks are here."""
    if not (env.is_one_machine and HAS_PAGE):
        return None
    fd = Page.create(env.replica_size)
    try:
        for connection in connections.values():
            connection.send_descriptor(fd)
        return Page(fd, env.replica_size, 0)
    finally:
        os.close(fd)


def _receive_page(env: LauncherEnv, connection: Connection, patience: Patience) -> Page | None:
    if not (env.is_one_machine and HAS_PAGE):
        return None
    fd = _sockets.receive_descriptor(connection, patience)
    if fd is None:
        connection.close()
        patience.check(env.rank)
        raise WorkerStartupError(
            env.rank - env.index, "launch", "did not share its memory for the ranks of this machine"
        )
    try:
        return Page(fd, env.replica_size, env.index)
    finally:
        os.close(fd)
