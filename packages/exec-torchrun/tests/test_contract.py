"""The torchrun executor keeps the contract that all executors share."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


def passed(torchrun: Any, ranks: int, program: str, directory: Path) -> list[int]:
    """How many tests have passed on each rank of a job of pytests; a rank that fails or skips one fails the job."""
    env = {"PYTEST_DEBUG_TEMPROOT": os.fspath(directory)}  # not --basetemp: the ranks would remove each other's
    job = torchrun(ranks, program, "-q", "-p", "no:cacheprovider", options=("-m", "pytest"), env=env, timeout_s=120.0)
    assert "skipped" not in job.output
    return [int(count) for count in re.findall(r"(\d+) passed in", job.output)]


@pytest.fixture(scope="module")
def of_one_rank(torchrun: Any, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many tests `ExecutorContract` has, counted where all of them run."""
    (count,) = passed(torchrun, 1, "contract_one.py", tmp_path_factory.mktemp("one"))
    return count


def not_here() -> dict[str, str]:
    """What `programs/contract_all.py` leaves out, and why."""
    (value,) = [
        node.value
        for node in ast.parse((PROGRAMS / "contract_all.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NOT_HERE"
    ]
    named: dict[str, str] = ast.literal_eval(value)
    return named


def test_contract_of_one_rank(of_one_rank: int) -> None:
    """All of `ExecutorContract`, run by pytest in a process that torchrun has started."""
    assert of_one_rank > 200


@pytest.mark.parametrize("ranks", [2, 4])
def test_contract_of_several_ranks(torchrun: Any, tmp_path: Path, of_one_rank: int, ranks: int) -> None:
    """All of it but what is named with its reason, by as many pytests in lock-step."""
    assert len(not_here()) < 0.1 * of_one_rank
    assert [of_one_rank - len(not_here())] * ranks == passed(torchrun, ranks, "contract_all.py", tmp_path)
