"""Process groups in a process that has, or gets, a default group of its own."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist

from exec_core import ConfigError, distributed
from exec_core.distributed import World, join
from exec_core.testing import eventually
from exec_core.testing.sync import DEADLINE_S


@pytest.fixture
def hosts_group() -> Iterator[None]:
    """A default group that the host program has made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined] # public, not listed
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def world(size: int = 1, existing: str = "refuse") -> World:
    """Rank 0 of a world."""
    return World(
        rank=0,
        world_size=size,
        tensor_parallel_size=1,
        pipeline_parallel_size=size,
        init_method=None,
        backend=None,
        device="cpu",
        timeout_s=5.0,
        existing="use" if existing == "use" else "refuse",
    )


def test_world_of_one() -> None:
    """A world of one has all four groups, each of this rank alone, and leaves no default group."""
    membership = join(world())
    groups = membership.groups
    for group in (groups.tp, groups.pp, groups.dp, groups.world):
        assert ((0,), 0, 1) == (group.ranks, group.rank, group.size)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group.device_group)
        dist.all_reduce(tensor, group=group.cpu_group)
    membership.leave()
    membership.leave()

    assert not dist.is_initialized()


def threads() -> set[str]:
    """Of this process, gloo's among them: one that has just started has not yet the name that would tell it."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


def slack_ns(thread: object) -> int:
    """By how much the timers of a thread may be late."""
    return int(Path(f"/proc/{thread}/timerslack_ns").read_text())


def may_see_others() -> bool:
    """Whether this process may look at that of another thread (CAP_SYS_NICE)."""
    (effective,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> 23 & 1)


def test_threads_of_gloo_are_few_and_drowsy(hosts_group: None) -> None:
    """A group of this rank alone is made when it is used, and threads of gloo's may be late by more than this one."""
    own, before = slack_ns(threading.get_native_id()), threads()
    membership = join(world())
    groups = membership.groups
    assert threads() <= before
    made = groups.tp.device_group
    assert made is groups.pp.cpu_group is groups.dp.device_group
    started = threads() - before
    if may_see_others():
        assert {10_000_000} == {slack_ns(thread) for thread in started}
    else:
        with pytest.raises(PermissionError):
            slack_ns(started.pop())
    del made
    membership.leave()

    assert own == slack_ns(threading.get_native_id())


def test_several_worlds_of_one_share_the_process() -> None:
    """Several executors of one rank live in one process; the last to leave takes the default group along."""
    first, second = join(world()), join(world())
    first.leave()
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=second.groups.world.device_group)
    assert dist.is_initialized()
    second.leave()

    assert not dist.is_initialized()


def test_hosts_group_is_left_alone(hosts_group: None) -> None:
    """A default group of the host's is neither replaced nor destroyed."""
    before = dist.group.WORLD
    membership = join(world())
    dist.all_reduce(torch.ones(1), group=membership.groups.tp.device_group)
    membership.leave()

    assert dist.group.WORLD is before
    dist.all_reduce(torch.ones(1))


def test_hosts_group_is_refused_for_a_larger_world(hosts_group: None) -> None:
    """A larger world needs the default group for itself, and says what to do."""
    with pytest.raises(ConfigError, match="must not exist yet .*a group of 1.*driver_worker='process'"):
        join(world(size=2))


def test_hosts_group_that_does_not_fit(hosts_group: None) -> None:
    """A host's group can serve only where size and rank are the same."""
    with pytest.raises(ConfigError, match="must be rank 0 of 2, got 'rank 0 of 1'"):
        join(world(size=2, existing="use"))


class Aborted(dist.ProcessGroup):
    """A process group that tells when it is aborted, and takes its time for it, or fails."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg] # the one for classes of one's own, which the stub lacks
        self.store = store
        self.begun, self.may_end = threading.Event(), threading.Event()

    def getBackendName(self) -> str:  # noqa: N802 # torch's name
        return "aborted"

    def abort(self) -> None:
        self.begun.set()
        self.may_end.wait(DEADLINE_S)
        raise RuntimeError("the abort failed")


def test_abort_neither_waits_nor_raises() -> None:
    """All groups that were made are aborted, whatever that takes and leads to, and can be left as ever."""
    if "aborted" not in dist.Backend.backend_list:
        dist.Backend.register_backend("aborted", Aborted, devices=["cpu"])
    membership = join(attrs.evolve(world(), backend="aborted"))
    group = membership.groups.world.device_group
    assert isinstance(group, Aborted)
    membership.abort()

    assert group.begun.wait(DEADLINE_S)
    group.may_end.set()
    membership.leave()
    membership.abort()
    assert not dist.is_initialized()
    eventually(lambda: "exec-abort" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize("refuses", [False, True])
def test_aborted_group_over_nccl_is_given_up(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    """Leaving does not wait for the group's threads, and frees the process for another world, also where torch refuses."""
    may_end = threading.Event()

    class SlowToEnd(Aborted):
        def abort(self) -> None:
            if refuses:
                raise RuntimeError("it cannot be aborted")

        def shutdown(self) -> None:
            if not refuses:
                may_end.wait(DEADLINE_S)

    name = f"slow{refuses}".lower()
    dist.Backend.register_backend(name, SlowToEnd, devices=["cpu"])
    monkeypatch.setattr(dist, "get_backend_config", lambda _group: "cuda:nccl")  # there is none without a device
    membership = join(attrs.evolve(world(), backend=name))
    membership.abort()
    membership.leave()

    assert not dist.is_initialized()
    monkeypatch.undo()
    join(world()).leave()
    assert refuses or "exec-abort" in {thread.name for thread in threading.enumerate()}  # still waiting for the group
    may_end.set()
    eventually(lambda: "exec-abort" not in {thread.name for thread in threading.enumerate()})


def test_who_still_writes_after_an_abort_finds_no_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NCCL's watchdog tells the store of an abort, perhaps when its file is gone: torch would seek that for five minutes."""
    left = threading.Event()

    class Writing(Aborted):
        def abort(self) -> None: ...

        def shutdown(self) -> None:
            assert left.wait(DEADLINE_S)
            self.store.set("aborted", "here")

    dist.Backend.register_backend("writing", Writing, devices=["cpu"])
    monkeypatch.setattr(dist, "get_backend_config", lambda _group: "cuda:nccl")  # there is none without a device
    meeting = tmp_path / "world" / "store"
    meeting.parent.mkdir()
    membership = join(attrs.evolve(world(), backend="writing", init_method=meeting.as_uri()))
    membership.abort()
    membership.leave()
    shutil.rmtree(meeting.parent)
    left.set()

    eventually(lambda: "exec-abort" not in {thread.name for thread in threading.enumerate()})


@pytest.mark.parametrize(("watched", "device"), [(True, "cuda:0"), (False, "cuda:0"), (True, "cpu")])
def test_nccl_spares_the_hosts_process(monkeypatch: pytest.MonkeyPatch, watched: bool, device: str) -> None:
    """Where the executor learns of deaths, groups over NCCL are made so that they do not end its process; what the host has set, holds."""
    seen: list[dict[str, str]] = []

    def make(_world: World) -> None:
        seen.append({name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL")})
        raise OSError("nothing is made here")

    monkeypatch.setattr(distributed, "_init_default", make)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    before = dict(os.environ)
    with pytest.raises(OSError, match="nothing is made here"):
        join(attrs.evolve(world(), device=device, given_up=(lambda: False) if watched else None))

    spared = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    }  # fmt: skip
    expected = spared if watched and device != "cpu" else {}
    assert [{**expected, "TORCH_NCCL_ENABLE_MONITORING": "1"}] == seen
    assert before == dict(os.environ)


def test_abort_leaves_the_hosts_group_alone(hosts_group: None) -> None:
    """What the host has made is not aborted."""
    membership = join(world())
    membership.abort()
    dist.all_reduce(torch.ones(1))

    assert "exec-abort" not in {thread.name for thread in threading.enumerate()}
    membership.leave()
