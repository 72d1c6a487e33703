"""The launcher's store, at MASTER_ADDR and MASTER_PORT: torchrun's, or hosted by rank 0.

All ranks can reach it, so they meet first through it, later their process groups do, and who cannot come says so in it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from exec_core.errors import WorkerStartupError
from exec_torchrun import _sockets
from exec_torchrun._env import LauncherEnv
from exec_torchrun._sockets import Patience

SCHEME = "exec-torchrun"
_HOSTED_S = 10.0  # how much later than others rank 0 may start, for them to be able to warn it

# The launcher's store, kept for this process's later executors: where rank 0 hosts it, it would end with the first of them.
_kept: dict[tuple[Any, ...], Any] = {}
_offered: list[Any] = []  # the one that `SCHEME` URLs lead to


@contextlib.contextmanager
def found(env: LauncherEnv, patience: Patience) -> Iterator[Any]:
    """The store; where patience is given up inside, this process keeps no store that it did not have before.

    Raises:
        WorkerStartupError: nobody hosts it, or this process cannot.
    """
    before = dict(_kept)
    try:
        yield _find(env, patience)
    except BaseException:
        if patience.given_up:
            _kept.clear()
            _kept.update(before)
        raise


def _find(env: LauncherEnv, patience: Patience) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, whoever hosts it, as ``env://`` finds it."""
    from torch.distributed.rendezvous import rendezvous

    key = os.getpid(), env.master_addr, env.master_port, env.rank, env.world_size
    if key in _kept:
        with contextlib.suppress(RuntimeError):  # its host is gone: perhaps there is another one by now
            _kept[key].set_timeout(patience.left)
            _kept[key].num_keys()
            return _kept[key]
    _kept.clear()
    # Torch would wait for a host, or as the host for all others, where nothing can interrupt it: it finds the host there, and
    # as the host is told of a world of one. The others are waited for in the meeting.
    while env.rank != 0 and patience.left_s and not _sockets.is_answered(env.master_addr, env.master_port):
        time.sleep(_sockets.RETRY_S)
    patience.check(env.rank)
    url = f"env://?rank={env.rank}&world_size={env.world_size if env.rank else 1}"
    try:
        store, _, _ = next(rendezvous(url, timeout=patience.left))
    except Exception as error:
        where = f"MASTER_ADDR={env.master_addr}, MASTER_PORT={env.master_port}"
        raise WorkerStartupError(
            env.rank, "launch", f"the ranks cannot meet at {where}: {str(error).splitlines()[0]}", os.getpid(),
            "check that all ranks were started, that rank 0 runs there, and that the port is free",
        ) from error  # fmt: skip
    _kept[key] = store
    return store


def offer(store: Any, token: str) -> str:
    """A URL that `torch.distributed.init_process_group` takes, once for each process group, which meet under ``token``."""
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
    return f"{SCHEME}://{token}"


def warn_others(name: str, error: bytes, patience: Patience) -> None:
    """Tells the ranks that wait for this one why it cannot come, if the store is there: torchrun's, or that of rank 0.

    Args:
        name: of the meeting that it misses.
        error: pickled with `exec_core.messages.encode_error`.
        patience: how long to look for the store, at most.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not _is_hosted(patience):
        return
    with contextlib.suppress(Exception):  # its own error is told in any case
        from torch.distributed.rendezvous import rendezvous

        # Any rank but 0: this one may not know its own, and the launcher's store is the same for all.
        store, _, _ = next(
            rendezvous("env://?rank=1&world_size=2", timeout=datetime.timedelta(seconds=_sockets.HELLO_S))
        )
        store.set(_wrong(f"{SCHEME}/{name}"), error)


def _is_hosted(patience: Patience) -> bool:
    """Whether rank 0 hosts the store. Not for long: where all ranks are wrong, nobody does."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (host and port.isdecimal()) or os.environ.get("RANK", "").strip() == "0":
        return False
    until = time.monotonic() + _HOSTED_S
    while patience.left_s and time.monotonic() < until:
        if _sockets.is_answered(host, int(port)):
            return True
        time.sleep(_sockets.RETRY_S)
    return False


def _wrong(key: str) -> str:
    return f"{key}/wrong"


def warning(store: Any, key: str) -> bytes | None:
    """What a rank that cannot come has said."""
    return bytes(store.get(_wrong(key))) if store.check([_wrong(key)]) else None
