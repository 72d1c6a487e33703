"""vLLM's engine on exec-mp: its tokens, and what its user sees when a process dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from exec_core.testing import eventually
from oracle import Oracle
from reference_llm.tokenizer import Tokenizer

QUESTIONS = ("What is the capital of France?", "List three fruits.")
MAX_TOKENS = 24
LONG = ("--tensor-parallel-size", "3", "--max-tokens", "900", "Write a long story about the sea.")
Start = Callable[..., Any]


@pytest.mark.parametrize("ranks", [1, 3])
def test_tokens_are_those_of_transformers(ranks: int, start: Start, oracle: Oracle, tokenizer: Tokenizer) -> None:
    """Two questions in one batch, tensor parallel, with the engine in a process of its own as vLLM has it by default.

    Stages are not tested: on CPU vLLM 0.32 takes no tokens from the last one, with its own executor neither.
    """
    prompts = [tokenizer.encode_question(question) for question in QUESTIONS]
    expected = [
        tokens[: next((i + 1 for i, token in enumerate(tokens) if token in tokenizer.stop_tokens), MAX_TOKENS)]
        for tokens in oracle.continue_greedily(prompts, MAX_TOKENS)
    ]
    program = start("--tensor-parallel-size", str(ranks), "--max-tokens", str(MAX_TOKENS), *QUESTIONS)
    answer = program.answer()
    assert expected == answer["tokens"]
    assert "The capital of France is Paris." in answer["texts"][0]
    assert set(range(ranks)) == answer["ranks"]
    names = [f"Worker_TP{rank}" for rank in range(ranks)] if ranks > 1 else ["Worker"]
    assert all(f"({name} pid=" in program.log for name in names)


def test_a_worker_that_is_killed_is_named(start: Start) -> None:
    """The engine ends with rank, pid and signal in its log, and takes everything along."""
    program = start(*LONG)
    program.generates()
    pid = program.pid_of(1)
    os.kill(pid, signal.SIGKILL)
    log = program.fails()
    assert f"rank 1 (pid {pid})" in log
    assert "SIGKILL" in log


def test_workers_end_with_a_killed_engine(start: Start) -> None:
    """The process that vLLM runs its engine in, which is the executor's driver."""
    program = start(*LONG)
    program.generates()
    engine = psutil.Process(program.pid_of(0)).parents()[1]  # above the fork server
    assert program.process.pid != engine.pid
    children = engine.children(recursive=True)
    assert {program.pid_of(rank) for rank in range(3)} <= {child.pid for child in children}
    engine.kill()
    eventually(lambda: not any(child.is_running() for child in children), deadline_s=10.0)
