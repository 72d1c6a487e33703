"""The launcher's variables: each that is missing or wrong is one clear error."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from exec_core import ConfigError, ParallelConfig
from exec_torchrun._env import LauncherEnv, read_env

GOOD = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
WORLD = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=2)


def test_good_variables() -> None:
    """Everything a rank has to know of its place."""
    env = read_env(WORLD, GOOD)

    assert LauncherEnv(5, 8, 1, 4, "node0", 29500, 4) == env
    assert (1, 1, False, 4) == (env.replica, env.index, env.is_one_machine, env.least_local_size)


def test_the_launcher_need_not_say_how_many_ranks_are_here() -> None:
    """Without LOCAL_WORLD_SIZE there are at least as many as LOCAL_RANK says."""
    env = read_env(WORLD, {name: value for name, value in GOOD.items() if name != "LOCAL_WORLD_SIZE"})

    assert (None, 2, False) == (env.local_world_size, env.least_local_size, env.is_one_machine)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_a_missing_variable_is_named(name: str, how: str) -> None:
    """A variable that is not set, or empty, is named with a command line that would work."""
    env = {k: v for k, v in GOOD.items() if k != name} if how == "unset" else {**GOOD, name: ""}
    with pytest.raises(ConfigError, match=rf"^environment variable {name} must be set .*torchrun --nproc-per-node 8 "):
        read_env(WORLD, env)


def test_all_missing_variables_are_one_error() -> None:
    """A program started without a launcher hears of all five at once."""
    with pytest.raises(ConfigError, match="RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT must be set"):
        read_env(WORLD, {})


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("RANK", "one", "an integer from 0 to 7"),
        ("RANK", "8", "an integer from 0 to 7"),
        ("RANK", "-1", "an integer from 0 to 7"),
        ("RANK", "٣", "an integer from 0 to 7"),
        ("WORLD_SIZE", "0", "an integer >= 1"),
        ("WORLD_SIZE", "7", "2 .data parallel. x 2 .tensor parallel. x 2 .pipeline parallel. = 8"),
        ("LOCAL_WORLD_SIZE", "9", "an integer from 1 to 8"),
        ("LOCAL_RANK", "4", "an integer from 0 to 3"),
        ("LOCAL_RANK", "", "set by a launcher"),
        ("MASTER_PORT", "0", "an integer from 1 to 65535"),
        ("MASTER_PORT", "http", "an integer from 1 to 65535"),
    ],
)
def test_a_contradiction_is_named(name: str, value: str, rule: str) -> None:
    """A variable that is no number, or out of range of the others, is named with the rule and the value."""
    with pytest.raises(ConfigError, match=rf"environment variable {name} must be {rule}, got") as caught:
        read_env(WORLD, {**GOOD, name: value})

    assert value in str(caught.value)


def test_a_local_rank_above_the_rank_is_a_contradiction() -> None:
    """Rank 0 is the first rank of its machine, whatever the launcher says."""
    with pytest.raises(ConfigError, match="LOCAL_RANK must be an integer from 0 to 0"):
        read_env(WORLD, {**GOOD, "RANK": "0"})


def test_other_launchers_ranks_hear_of_a_missing_variable(torchrun: Any) -> None:
    """Where rank 0 hosts the store, a variable that another rank lacks is both ranks' error, and soon."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    job = torchrun(2, "other_launcher.py", str(port))

    for start in job.of_all("start"):
        assert "ConfigError" == start["type"]
        assert "environment variable LOCAL_RANK must be set by a launcher" in start["text"]
        assert start["seconds"] < 20.0
