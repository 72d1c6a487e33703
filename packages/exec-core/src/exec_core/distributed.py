"""Process groups of a worker: joining the world, splitting it into tp, pp and dp groups, leaving it again.

One default process group per process is all that torch offers. The one made here is counted: executors in the same
process that may share it do, each with groups of its own over it, and the last to leave destroys it. A group that the
host program made is never replaced or destroyed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import attrs

from exec_core.drowsy import drowsy_threads
from exec_core.errors import ConfigError, ExecutorError

# What a group over NCCL does when a collective fails, because a peer has died say, or takes too long: its watchdog waits for a
# minute and then ends the process. The driver's is not to end: there it aborts the communicator, at once, and no more. What
# that leaves in memory is no result; the executor knows why, and raises that.
_SPARING = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}

_lock = threading.Lock()
_users = 0  # memberships that rest on a default group made here; guarded by _lock
_store: Any = None  # where that group has met; guarded by _lock


@attrs.frozen
class Group:
    """One process group as a rank sees it.

    Attributes:
        ranks: its global ranks, in group order.
        rank: this worker's position in ``ranks``.
    """

    ranks: tuple[int, ...]
    rank: int
    _made: Callable[[], Any] = attrs.field(repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def device_group(self) -> Any:
        """`torch.distributed.ProcessGroup` for device tensors.

        On cuda one group carries both NCCL and gloo, on cpu it is gloo's; collectives on either must be issued in the same
        order on all ranks.
        """
        return self._made()

    @property
    def cpu_group(self) -> Any:
        """`torch.distributed.ProcessGroup` for CPU tensors."""
        return self._made()


class _Alone:
    """The group of this rank alone, made when it is first used: most programs never do, and gloo gives it threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group: Any = None  # guarded by _lock

    def __call__(self) -> Any:
        import torch.distributed as dist

        with self._lock:
            if self._group is None:
                # Local synchronisation: the other ranks of the world need not know.
                with drowsy_threads():
                    self._group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            return self._group

    def forget(self) -> list[Any]:
        """The group, if there is one, which is the caller's to destroy."""
        group, self._group = self._group, None
        return [] if group is None else [group]


@attrs.frozen
class ProcessGroups:
    """The groups that a worker belongs to: tensor, pipeline and data parallel, and all of them."""

    tp: Group
    pp: Group
    dp: Group
    world: Group


@attrs.frozen
class World:
    """Which world to join, and as whom.

    Attributes:
        rank, world_size: in the whole world, replicas included.
        tensor_parallel_size, pipeline_parallel_size: the data parallel size is what remains.
        init_method: URL as `torch.distributed.init_process_group` takes it; None: a world of one.
        backend: None (gloo on cpu, NCCL and gloo on cuda) or a torch.distributed backend.
        device: ``cpu`` or ``cuda:N``.
        timeout_s: limit of a collective; None: torch's default.
        existing: what to do with a default group that the host made.
        given_up: for rank 0 in the driver, whose executor learns of deaths and then calls `Membership.abort`: asked while it waits for
            the others; True when they will not come.
    """

    rank: int
    world_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    init_method: str | None
    backend: str | None
    device: str
    timeout_s: float | None
    existing: Literal["refuse", "use"] = "refuse"
    given_up: Callable[[], bool] | None = None


class Membership:
    """A worker's place in a world; `leave` it once."""

    def __init__(
        self, groups: ProcessGroups, owned: list[Any], alone: _Alone, counted: bool, abortable: Sequence[Any] = ()
    ) -> None:
        self.groups = groups
        self._abortable = abortable  # groups made here that have other ranks in them
        self._owned = owned  # subgroups made for this membership; empty when the default group goes with it
        self._alone = alone
        self._counted = counted
        self._aborted = False

    def check_may_leave(self) -> None:
        """Raises `ConfigError` where leaving would not free the process for another world."""
        if not self._counted or _users > 1:
            raise ConfigError(
                "the default process group", "must be this executor's own for it to join another world",
                "the program's" if not self._counted else f"shared by {_users} executors",
            )  # fmt: skip

    def abort(self) -> None:
        """Ends what this process is doing, or will do, in these groups, as far as their backends can.

        For another thread than the one inside: when a rank has died, a collective may never end by itself. It neither
        raises nor waits. NCCL aborts its communicators; gloo cannot, but fails when a connection closes.
        The groups are still to be left. The host's own stay untouched.
        """
        self._aborted = True
        for group in self._abortable:
            # A thread each: an abort may have to wait for a kernel that waits for another group's.
            with suppress(RuntimeError):  # a limit on threads
                threading.Thread(target=_abort, args=(group,), name="exec-abort", daemon=True).start()

    def leave(self) -> None:
        """Destroys what `join` made. Twice is fine; the host's own groups stay."""
        import torch.distributed as dist

        global _users, _store
        owned, self._owned = [*self._owned, *self._alone.forget()], []
        abortable, self._abortable = [*self._abortable], ()
        counted, self._counted = self._counted, False
        with _lock:
            _users -= counted
            last = counted and _users == 0
            for group in [None] if last else owned:  # the default group takes all groups over it along
                if dist.is_initialized() and self._aborted:
                    _give_up(group, abortable)
                elif dist.is_initialized():
                    dist.destroy_process_group(group)
            if last and _store is not None:
                from exec_core import stores  # there since the store was made

                stores.give_up(_store)
                _store = None


def join(world: World) -> Membership:
    """Joins ``world`` and builds the groups.

    Raises:
        ConfigError: when the process has a default group already that cannot serve.
    """
    import torch.distributed as dist

    if not dist.is_available():
        raise ExecutorError("this torch is built without torch.distributed; use distributed_backend='none'")
    global _users, _store
    with _lock:
        if dist.is_initialized():
            ours = _users > 0
            if world.world_size == 1:
                _users += ours
                return _group_of_one(counted=ours)
            if world.existing == "refuse":
                raise ConfigError(
                    "the default process group", "must not exist yet in a process that runs a rank of a larger world",
                    f"a group of {dist.get_world_size()}", "use driver_worker='process', or destroy the group first",
                )  # fmt: skip
            if (dist.get_world_size(), dist.get_rank()) != (world.world_size, world.rank):
                raise ConfigError(
                    "the default process group", f"must be rank {world.rank} of {world.world_size}",
                    f"rank {dist.get_rank()} of {dist.get_world_size()}", "match the parallel sizes to the group",
                )  # fmt: skip
            with _host_spared(world):
                groups, made, alone = _split(world)
            _users += ours
            return Membership(groups, made, alone, counted=ours, abortable=made)
        try:
            with _host_spared(world):
                _store = _init_default(world)
                groups, made, alone = _split(world)
        except BaseException:
            _store = None
            _forget_default()
            raise
        _users = 1
        return Membership(groups, [], alone, counted=True, abortable=[*made, dist.group.WORLD])


def _abort(group: Any) -> None:
    """Ends the operations of a `torch.distributed.ProcessGroup`, which may take as long as one of them may."""
    with suppress(Exception):  # a backend that has failed, or has been destroyed meanwhile
        if not hasattr(group, "abort"):  # torch 2.6 has it on the backend only
            import torch

            group = group._get_backend(torch.device("cuda"))  # noqa: SLF001 # as torch's own function for it does
        group.abort()


def _give_up(group: Any, held: list[Any]) -> None:
    """Destroys an aborted group, or all (None), of which the caller has given ``held``.

    That waits for NCCL's watchdog, which may be seconds in describing what was aborted: a thread does.
    """
    import torch.distributed as dist

    if "nccl" not in dist.get_backend_config(group):
        dist.destroy_process_group(group)
        return
    try:
        # The public function would ask communicators that are aborted to finish first.
        dist.distributed_c10d._abort_process_group(group)  # noqa: SLF001 # as it says
    except Exception:  # aborted twice, in a state that torch does not foresee: then this thread waits
        dist.destroy_process_group(group)
        return
    with suppress(RuntimeError):  # a limit on threads: then whoever lets go of a group last waits
        threading.Thread(target=_see_off, args=(held,), name="exec-abort", daemon=True).start()


def _see_off(groups: list[Any]) -> None:
    """Waits for the threads of aborted groups."""
    while groups:
        with suppress(Exception):  # torch 2.6 cannot be asked: it waits when the object goes, at the end of this turn
            groups.pop().shutdown()


@contextmanager
def _host_spared(world: World) -> Iterator[None]:
    """Groups of rank 0 in the driver, made meanwhile, do not end that process, unless its environment says what they are to do."""
    watched = world.given_up is not None and "nccl" in _backend(world)
    missing = set(_SPARING) - set(os.environ) if watched else ()
    os.environ.update({name: _SPARING[name] for name in missing})  # read by each group when it is made
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _init_default(world: World) -> Any:
    """Makes the default group. Returns the store where it has met; None: torch's own rendezvous has made one."""
    import datetime

    import torch.distributed as dist

    from exec_core import stores  # not everybody joins a world, and it imports sockets and more

    options: dict[str, Any] = {"world_size": world.world_size, "rank": world.rank}
    if world.timeout_s is not None:
        options["timeout"] = datetime.timedelta(seconds=world.timeout_s)
    if world.init_method is None:
        options["store"] = dist.HashStore()  # type: ignore[attr-defined] # public, not listed in its __all__
    elif world.init_method.startswith("file://"):
        path = world.init_method.removeprefix("file://")
        options["store"] = stores.file_store(path, world.world_size, world.timeout_s, world.given_up or (lambda: False))
    elif world.init_method.startswith("tcp://"):
        options["store"] = stores.tcp_store(world.init_method, world.rank, world.world_size, world.timeout_s)
    else:
        options["init_method"] = world.init_method
    with _excepthook_kept(), drowsy_threads():
        dist.init_process_group(_backend(world), **options)
    return options.get("store")


def _forget_default() -> None:
    """Undoes a default group that was not finished.

    Torch numbers groups, counts one that failed, and starts anew when a default group is destroyed. Ranks that count
    differently never meet: so one that can always be made is made and destroyed.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        with _excepthook_kept():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined] # public
    dist.destroy_process_group()


def _backend(world: World) -> str:
    cuda = world.device.startswith("cuda")
    if world.backend is None:
        return "cpu:gloo,cuda:nccl" if cuda else "gloo"
    return "cpu:gloo,cuda:nccl" if world.backend == "nccl" and cuda else world.backend


@contextmanager
def _excepthook_kept() -> Iterator[None]:
    """init_process_group replaces ``sys.excepthook`` for good; the host's stays here."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def _split(world: World) -> tuple[ProcessGroups, list[Any], _Alone]:
    """The groups, those made for it, and the one that may still be."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    tp, pp = world.tensor_parallel_size, world.pipeline_parallel_size
    sizes = {"dp": world.world_size // (tp * pp), "pp": pp, "tp": tp}
    split = [name for name, size in sizes.items() if size > 1]
    alone, everyone = _Alone(), dist.group.WORLD
    named = dict.fromkeys(sizes, Group((world.rank,), 0, alone if split else lambda: everyone))
    made = []
    if split:
        # A cpu mesh whatever the device: it never selects one, and its groups inherit all backends of the default group.
        with drowsy_threads():
            mesh = init_device_mesh("cpu", tuple(sizes[name] for name in split), mesh_dim_names=tuple(split))
        for name in split:
            group = mesh.get_group(name)
            named[name] = _group(group)
            if group is not everyone:
                made.append(group)
    groups = ProcessGroups(tp=named["tp"], pp=named["pp"], dp=named["dp"], world=_group(everyone))
    return groups, made, alone


def _group(group: Any) -> Group:
    import torch.distributed as dist

    ranks = tuple(dist.get_process_group_ranks(group))
    return Group(ranks, ranks.index(dist.get_rank()), lambda: group)


def _group_of_one(counted: bool) -> Membership:
    alone = _Alone()
    group = Group((0,), 0, alone)
    return Membership(ProcessGroups(group, group, group, group), [], alone, counted)
