"""Cores: near a rank's device, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exec_core import affinity
from exec_core.devices import Placement

CORES = {2, 3, 4, 5, 8, 9}
LISTING = """torch says something
device 0 aaaa-1 0000:1b:00.0
device 1 bbbb-2 0000:af:00.0
device 2 cccc-3 0000:1b:00.0
"""


@pytest.fixture
def sysfs(tmp_path: Path) -> str:
    """Two NUMA nodes: devices at 1b are near cores 0 to 3 and 8 to 11, the one at af is near 4 to 7."""
    for address, cpulist in {"0000:1b:00.0": "0-3,8-11\n", "0000:af:00.0": "4-7\n"}.items():
        (tmp_path / address).mkdir()
        (tmp_path / address / "local_cpulist").write_text(cpulist)
    return os.fspath(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cores_are_shared_out(size: int) -> None:
    """Ranks get disjoint neighbouring cores, and together all of them."""
    shares = affinity.cores_of_ranks(Placement("cpu"), size, allowed=CORES)

    assert CORES == frozenset().union(*shares)
    assert 6 == sum(map(len, shares))


def test_cores_fewer_than_ranks() -> None:
    """With fewer cores than ranks they take turns, one core each."""
    assert [{4}, {7}, {4}] == list(affinity.cores_of_ranks(Placement("cpu"), 3, allowed={4, 7}))


def test_cores_are_those_of_this_process() -> None:
    """No rank gets a core that the driver may not use."""
    assert (frozenset(os.sched_getaffinity(0)),) == affinity.cores_of_ranks(Placement("cpu"), 1)


def test_cores_near_the_device(sysfs: str) -> None:
    """Ranks whose devices hang on one NUMA node share its cores; a rank alone on its node has all of them."""
    placement = Placement("cuda", ("0", "1", "2"), (0, 1, 2))
    shares = affinity.cores_of_ranks(placement, 3, LISTING, allowed=range(12), sysfs=sysfs)

    assert [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}] == list(shares)


def test_device_given_by_name(sysfs: str) -> None:
    """A device named by its UUID is found by it."""
    placement = Placement("cuda", ("GPU-bbbb",), (None,))

    (cores,) = affinity.cores_of_ranks(placement, 1, LISTING, allowed=range(12), sysfs=sysfs)

    assert cores == {4, 5, 6, 7}


@pytest.mark.parametrize(
    ("listing", "allowed"),
    [("", range(4)), ("device 0 aaaa-1 0000:99:00.0\n", range(4)), (LISTING, {4, 5})],
    ids=["an old torch", "no such device in sysfs", "none of the near cores is allowed"],
)
def test_what_is_not_known_makes_all_cores_near(sysfs: str, listing: str, allowed: set[int]) -> None:
    """Without knowledge of the topology, or when it cannot be followed, the allowed cores are shared out."""
    placement = Placement("cuda", ("0",), (0,))

    assert (frozenset(allowed),) == affinity.cores_of_ranks(placement, 1, listing, allowed=allowed, sysfs=sysfs)


def test_cpulist() -> None:
    """The kernel's notation, also of an empty set."""
    assert {0, 1, 2, 8, 10, 11} == affinity.parse_cpulist("0-2,8,10-11\n")
    assert set() == affinity.parse_cpulist("\n")
