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
import datetime
import functools
import os
import pickle
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import attrs

from exec_core import messages
from exec_core.errors import WorkerStartupError
from exec_torchrun import _sockets
from exec_torchrun._env import LauncherEnv
from exec_torchrun._frames import Connection, Frame, Kind
from exec_torchrun._hub import Hub
from exec_torchrun._link import Link, Member
from exec_torchrun._page import HAS_PAGE, Page
from exec_torchrun._sockets import Address, Problem

SCHEME = "exec-torchrun"
_HOSTED_S = 10.0  # how much later than others rank 0 may start, for them to be able to warn it

# The launcher's store, kept for this process's later executors: where rank 0 hosts it, it would end with the first of them.
_kept: dict[tuple[Any, ...], Any] = {}
_offered: list[Any] = []  # the one that `SCHEME` URLs lead to


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


def meet(env: LauncherEnv, name: str, report: Report, deadline: float, grace_s: float) -> Meeting:
    """Meets all ranks of the world.

    Args:
        name: of this meeting, the same on all ranks.
        grace_s: see `exec_torchrun._rounds.Rounds`.

    Raises:
        WorkerStartupError: naming who did not come by ``deadline`` (monotonic).
    """
    if env.world_size == 1:
        return Meeting((report,), None, None)
    store = _store(env, deadline)
    with contextlib.ExitStack() as stack:
        listener = None
        if env.index == 0 and env.replica_size > 1:
            listener, address = _sockets.listen(env, stack)
            report = attrs.evolve(report, hub=address)
        key = f"{SCHEME}/{name}"
        if env.rank == 0:
            reports, token = _receive(env, key, store, report, deadline)
        else:
            reports, token = _visit(env, key, store, report, deadline)
        _offer(store)
        link: Link | None = None
        hub = reports[env.replica * env.replica_size]
        if listener is not None and report.hub is not None:
            connections = _gather(env, listener, report.hub.secret, deadline)
            pids = {index: reports[env.rank + index].pid for index in connections}
            link = Hub(connections, pids, grace_s, _share_page(env, connections))
        elif hub.hub is not None:
            connection = _sockets.connect(hub.hub, env.index, b"", deadline)
            link = Member(env.index, connection, hub.pid, _receive_page(env, connection, deadline))
        return Meeting(reports, f"{SCHEME}://{token}", link)


def _store(env: LauncherEnv, deadline: float) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, whoever hosts it, as ``env://`` finds it."""
    from torch.distributed.rendezvous import rendezvous

    key = os.getpid(), env.master_addr, env.master_port, env.rank, env.world_size
    if key in _kept:
        with contextlib.suppress(RuntimeError):  # its host is gone: perhaps there is another one by now
            _kept[key].set_timeout(_sockets.remaining(deadline))
            _kept[key].num_keys()
            return _kept[key]
    _kept.clear()
    url = f"env://?rank={env.rank}&world_size={env.world_size}"
    try:
        store, _, _ = next(rendezvous(url, timeout=_sockets.remaining(deadline)))
    except Exception as error:
        where = f"MASTER_ADDR={env.master_addr}, MASTER_PORT={env.master_port}"
        raise WorkerStartupError(
            env.rank, "launch", f"the ranks cannot meet at {where}: {str(error).splitlines()[0]}", os.getpid(),
            "check that all ranks were started, that rank 0 runs there, and that the port is free",
        ) from error  # fmt: skip
    _kept[key] = store
    return store


def _offer(store: Any) -> None:
    """Makes ``SCHEME://token`` a URL that `torch.distributed.init_process_group` takes, once for each process group."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import register_rendezvous_handler

    def handler(url: str, timeout: datetime.timedelta, **_: object) -> Iterator[tuple[Any, int, int]]:
        parsed = urlsplit(url)
        query = dict(parse_qsl(parsed.query))
        prefixed = dist.PrefixStore(parsed.netloc, *_offered)  # type: ignore[attr-defined] # public
        prefixed.set_timeout(timeout)
        yield prefixed, int(query["rank"]), int(query["world_size"])

    if not _offered:
        register_rendezvous_handler(SCHEME, handler)  # type: ignore[no-untyped-call] # torch does not type it
    _offered[:] = [store]


def warn_others(name: str, error: bytes) -> None:
    """Tells the ranks that wait for this one why it cannot come, if the store is there: torchrun's, or that of rank 0.

    Args:
        name: of the meeting that it misses.
        error: pickled with `exec_core.messages.encode_error`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not _is_hosted():
        return
    with contextlib.suppress(Exception):  # its own error is told in any case
        from torch.distributed.rendezvous import rendezvous

        # Any rank but 0: this one may not know its own, and the launcher's store is the same for all.
        store, _, _ = next(
            rendezvous("env://?rank=1&world_size=2", timeout=datetime.timedelta(seconds=_sockets.HELLO_S))
        )
        store.set(_wrong(f"{SCHEME}/{name}"), error)


def _is_hosted() -> bool:
    """Whether rank 0 hosts the store. Not for long: where all ranks are wrong, nobody does."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (host and port.isdecimal()) or os.environ.get("RANK", "").strip() == "0":
        return False
    until = time.monotonic() + _HOSTED_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError, OverflowError):
            socket.create_connection((host, int(port)), timeout=_HOSTED_S).close()
            return True
        time.sleep(_sockets.RETRY_S)
    return False


def _wrong(key: str) -> str:
    return f"{key}/wrong"


def _warning(store: Any, key: str) -> bytes | None:
    """What a rank that cannot come has said."""
    return bytes(store.get(_wrong(key))) if store.check([_wrong(key)]) else None


def _receive(env: LauncherEnv, key: str, store: Any, mine: Report, deadline: float) -> tuple[tuple[Report, ...], str]:
    """Rank 0's part: waits for all others and tells each what all have said."""
    with contextlib.ExitStack() as stack:
        listener, address = _sockets.listen(env, stack)
        store.set(key, pickle.dumps(address))
        warning = functools.partial(_warning, store, key)
        visitors, problem = _sockets.accept(listener, address.secret, range(1, env.world_size), deadline, warning)
        for connection, _ in visitors.values():
            stack.callback(connection.close)
        reports = (mine, *(pickle.loads(visitors[rank][1].parts[1][1]) for rank in sorted(visitors)))
        answer = problem, reports, secrets.token_hex(8)
        for connection, _ in visitors.values():
            connection.send(Frame(Kind.WELCOME, 0, ((0, pickle.dumps(answer)),)))
    return _checked(*answer)


def _visit(env: LauncherEnv, key: str, store: Any, mine: Report, deadline: float) -> tuple[tuple[Report, ...], str]:
    """The other ranks' part."""
    while True:
        try:
            said = None
            while not store.check([key]) and (said := _warning(store, key)) is None and time.monotonic() < deadline:
                time.sleep(_sockets.RETRY_S)
            store.set_timeout(_sockets.remaining(deadline))
            address = None if said is not None else pickle.loads(store.get(key))
        except Exception as error:
            raise WorkerStartupError(0, "launch", "did not come to the ranks' first meeting") from error
        if address is None:
            return _checked(said, (), "")
        connection = _sockets.try_connect(address, env.rank, pickle.dumps(mine))
        frame = None if connection is None else connection.receive(deadline)
        if connection is not None:
            connection.close()
        if frame is not None:
            return _checked(*pickle.loads(frame.parts[0][1]))
        _sockets.pause(deadline, 0)  # what an earlier attempt left in the store is overwritten soon


def _checked(problem: Problem, reports: tuple[Report, ...], token: str) -> tuple[tuple[Report, ...], str]:
    if isinstance(problem, bytes):
        raise messages.decode_error(memoryview(problem), messages.Format.PICKLE, -1, 0, "launch")
    if problem is not None:
        raise WorkerStartupError(problem[0], "launch", problem[1])
    return reports, token


def _gather(env: LauncherEnv, listener: socket.socket, secret: bytes, deadline: float) -> dict[int, Connection]:
    visitors, problem = _sockets.accept(listener, secret, range(1, env.replica_size), deadline)
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


def _receive_page(env: LauncherEnv, connection: Connection, deadline: float) -> Page | None:
    if not (env.is_one_machine and HAS_PAGE):
        return None
    fd = connection.receive_descriptor(deadline)
    if fd is None:
        connection.close()
        raise WorkerStartupError(
            env.rank - env.index, "launch", "did not share its memory for the ranks of this machine"
        )
    try:
        return Page(fd, env.replica_size, env.index)
    finally:
        os.close(fd)
