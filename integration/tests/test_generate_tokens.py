"""Every backend and layout generates the tokens that transformers generates from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oracle import Oracle
from reference_llm.engine import GenerationRequest
from reference_llm.gguf_file import read_gguf
from reference_llm.steps import Sampling
from reference_llm.tokenizer import Tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea and the moon.",
    "List three fruits.",
    "Explain in two sentences why the sky is blue, please, for a child of seven years.",
)
MAX_TOKENS = 64
MAX_TOKENS_SHARDED = 24  # enough for a second block of the KV cache; three ranks and more on two cores take their time
SIZES = ((1, 1), (3, 1), (1, 2), (1, 3), (3, 2))


@pytest.fixture(scope="module")
def prompts(model: str) -> list[list[int]]:
    """Four prompts of different lengths."""
    tokenizer = Tokenizer(read_gguf(model))
    prompts = [tokenizer.encode_question(question) for question in QUESTIONS]
    assert len(set(map(len, prompts))) == 4
    return prompts


@pytest.fixture(scope="module")
def expected(oracle: Oracle, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers continues them with."""
    return oracle.continue_greedily(prompts, MAX_TOKENS)


def layouts() -> list[Any]:
    """Options of the program for each layout, with the number of devices that it takes."""
    cases = [pytest.param(["--backend", "uniproc"], id="uniproc")]
    for driver in ("process", "inline"):
        for tensor, pipeline in SIZES:
            sizes = ["--tensor-parallel-size", str(tensor), "--pipeline-parallel-size", str(pipeline)]
            marks = [pytest.mark.cuda_devices(tensor * pipeline)] if tensor * pipeline > 1 else []
            options = [*sizes, "--driver-worker", driver]
            cases.append(pytest.param(options, id=f"mp-{driver}-tp{tensor}-pp{pipeline}", marks=marks))
    return cases


@pytest.mark.parametrize("options", layouts())
def test_greedy_tokens_are_those_of_transformers(
    options: list[str], model: str, prompts: list[list[int]], expected: list[list[int]], answer: Callable[..., Any]
) -> None:
    """Four prompts of different lengths in one batch, as many tokens each, whatever comes."""
    many = MAX_TOKENS_SHARDED if ["--tensor-parallel-size", "3"] == options[:2] else MAX_TOKENS
    requests = [GenerationRequest(prompt=tuple(p), max_tokens=many, sampling=Sampling()) for p in prompts]
    outcomes = answer(model, options, requests)
    assert [tokens[:many] for tokens in expected] == [outcome.tokens for outcome in outcomes]
    assert ["length"] * 4 == [outcome.finish for outcome in outcomes]
