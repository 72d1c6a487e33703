"""An executor in a program that has a process group already, and starts that cannot work."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def job(torchrun: Any) -> Any:
    """`programs/host_group.py` on two ranks."""
    return torchrun(2, "host_group.py")


def test_the_programs_group_is_used(job: Any) -> None:
    """The executor's world is the program's group, its subgroups are its own, and both can be used side by side."""
    assert [[[True, True]]] * 2 == job.of_all("groups")
    assert [[1.0, 1.0]] * 2 == job.of_all("sums")
    assert [3.0] * 2 == job.of_all("total")


def test_the_programs_group_is_not_destroyed(job: Any) -> None:
    """After the executors are closed, in any order, the program's group is the same and works."""
    assert [1.0] * 2 == job.of_all("second_after_first")
    assert [(True, 3.0)] * 2 == list(zip(job.of_all("still_there"), job.of_all("total_after"), strict=True))


def test_the_programs_group_is_not_left_for_another(job: Any) -> None:
    """``reinitialize_distributed`` is refused there, and nothing has changed."""
    for outcome in job.of_all("may_not_leave"):
        assert "ConfigError" == outcome["type"]
        assert "the default process group must be this executor's own" in outcome["text"]
    assert [[1.0]] * 2 == [outcome["value"] for outcome in job.of_all("after_may_not")]


def test_executors_share_a_group_of_ours(job: Any) -> None:
    """Two executors of one program share the group that the first makes; the last one to close destroys it."""
    assert [1.0] * 2 == job.of_all("shared")
    assert [True] * 2 == job.of_all("gone")


def test_a_group_of_another_size_is_an_error(job: Any) -> None:
    """A program's group that is not the world of the environment is one clear error on every rank."""
    for rank, outcome in enumerate(job.of_all("other_world")):
        assert "ConfigError" == outcome["type"]
        assert (
            f"the default process group must be rank {rank} of 2, as the environment says, got 'rank 0 of 1'"
            in (outcome["text"])
        )


@pytest.mark.parametrize("name", ["too_few", "second_too_few"])
def test_too_few_devices_are_an_error_on_every_rank(job: Any, name: str) -> None:
    """A LOCAL_RANK beyond the devices is every rank's `DeviceError`, also where one rank alone can know."""
    for outcome in job.of_all(name):
        assert ("DeviceError", 2, 1) == (outcome["type"], outcome["requested"], outcome["found"])
        assert (
            "tensor_parallel_size=2 needs as many CUDA devices on this machine: 2 requested, 1 found" in outcome["text"]
        )


def test_a_world_size_that_is_not_dp_x_tp_x_pp_is_an_error(job: Any) -> None:
    """WORLD_SIZE that does not fit the parallel sizes: one clear error on every rank, with the command line."""
    for outcome in job.of_all("other_world_size"):
        assert "ConfigError" == outcome["type"]
        assert (
            "WORLD_SIZE must be 2 (data parallel) x 2 (tensor parallel) x 1 (pipeline parallel) = 4" in outcome["text"]
        )
        assert "torchrun --nproc-per-node 4 host_group.py" in outcome["text"]


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_variable_that_is_wrong_on_one_rank_is_every_ranks_error(job: Any, wrong: int) -> None:
    """The others hear of it soon instead of waiting for that rank, and a later start works."""
    for outcome in job.of_all(f"wrong_on_{wrong}"):
        assert "ConfigError" == outcome["type"]
        assert f"LOCAL_RANK must be an integer from 0 to {wrong}, got '7'" in outcome["text"]
        assert outcome["seconds"] < 5.0
    assert [None] * 2 == [outcome.get("value", "raised") for outcome in job.of_all("after_wrong")]


def test_a_worker_that_handles_devices_itself_needs_no_groups(job: Any) -> None:
    """With ``device="none"`` there are no process groups, and the guard and the minimum work all the same."""
    assert [[99, 10]] * 2 == [outcome["value"] for outcome in job.of_all("no_groups")]
    assert [True] * 2 == job.of_all("nothing")
