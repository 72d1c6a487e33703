"""The training loop under torchrun: workers get new weights in memory, and their KV cache makes room meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from rl_loop import POLICY
from tiny_gguf import write_tiny_gguf

PROGRAM = Path(__file__).parents[1] / "rl_loop.py"
Rounds = list[list[dict[str, Any]]]  # of each round, what each rank saw


LAYOUTS = {"tp2": ("1", True), "pp2": ("2", True), "pp2-untied": ("2", False)}


@pytest.fixture(scope="module", params=LAYOUTS)
def rounds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str) -> Rounds:
    """Three rounds on two ranks, of a model with one table for both ends, or two."""
    pipeline, tied = LAYOUTS[request.param]
    path = tmp_path_factory.mktemp("policy") / "policy.gguf"
    model = [] if tied else ["--model", write_tiny_gguf(path, attrs.evolve(POLICY, tied=False))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--json", "--rounds", "3", "--device", device, "--pipeline-parallel-size", pipeline, *model]
    environ = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("job"))}
    done = subprocess.run(
        [*command, str(PROGRAM), *options], env=environ, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


pytestmark = pytest.mark.cuda_devices(2)


def test_workers_have_the_trainers_weights_after_each_push(rounds: Rounds) -> None:
    """The log-probability of a fixed sample changes in each push, to the trainer's, and stays until the next."""
    first = [ranks[0] for ranks in rounds]
    assert 3 == len(first)
    for seen in first:
        assert abs(seen["log_p_after"] - seen["log_p_before"]) > 1e-2
        assert seen["log_p_trainer"] == pytest.approx(seen["log_p_after"], abs=1e-2)
    assert [seen["log_p_after"] for seen in first[:-1]] == [seen["log_p_before"] for seen in first[1:]]


@pytest.mark.parametrize("what", ["answers", "reward_before", "reward_after", "log_p_before", "log_p_after"])
def test_ranks_agree(rounds: Rounds, what: str) -> None:
    """Both ranks see the same answers, rewards and log-probabilities."""
    for one, other in rounds:
        assert one[what] == other[what]


def test_the_kv_cache_is_released_in_sleep(rounds: Rounds) -> None:
    """Each worker holds none of it while the trainer computes, and all of it again afterwards."""
    for seen in (rank for ranks in rounds for rank in ranks):
        assert seen["kv_awake"] > 0
        assert (0, seen["kv_awake"]) == (seen["kv_asleep"], seen["kv_again"])


def test_a_push_makes_no_second_copy_of_the_weights(rounds: Rounds) -> None:
    """The peak of a rank grows by less than its worker's part of them."""
    for seen in (rank for ranks in rounds for rank in ranks):
        assert seen["peak_growth"] < seen["weights_worker"] <= seen["weights_trainer"]
