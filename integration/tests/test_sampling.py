"""Draws follow the model's distribution and depend on nothing but seed and position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from reference_llm.engine import GenerationRequest
from reference_llm.sampling import gumbel_noise
from reference_llm.steps import Sampling

PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 1, 17)]


def requests(prompts: list[list[int]], seed: int, temperature: float = 1.5) -> list[GenerationRequest]:
    """Requests with one seed for all."""
    sampling = Sampling(temperature=temperature, seed=seed)
    return [GenerationRequest(prompt=tuple(prompt), max_tokens=20, sampling=sampling) for prompt in prompts]


def test_the_largest_of_logits_and_noise_follows_the_softmax() -> None:
    """20,000 draws from five tokens, each within five standard deviations of what is expected."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    draws = 20_000
    noise = np.stack([gumbel_noise(Sampling(temperature=1.0, seed=3), position, 5) for position in range(draws)])
    counts = Counter((logits + torch.from_numpy(noise)).argmax(dim=1).tolist())
    for token, share in enumerate(logits.softmax(0).tolist()):
        assert abs(counts[token] - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5


def test_noise_differs_between_seeds_and_positions_and_not_between_calls() -> None:
    """Seed and position make a stream of their own."""
    one, two = Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2)
    assert np.array_equal(gumbel_noise(one, 7, 100), gumbel_noise(one, 7, 100))
    assert not np.array_equal(gumbel_noise(one, 7, 100), gumbel_noise(one, 8, 100))
    assert not np.array_equal(gumbel_noise(one, 7, 100), gumbel_noise(two, 7, 100))


def test_a_sequence_draws_the_same_tokens_alone_and_in_a_batch(tiny_model: str, answer: Callable[..., Any]) -> None:
    """What else is in the batch does not matter; the seed does."""
    together = answer(tiny_model, ["--backend", "uniproc"], requests(PROMPTS, seed=1))
    alone = [answer(tiny_model, ["--backend", "uniproc"], requests([prompt], seed=1))[0] for prompt in PROMPTS]
    assert together == alone
    assert together != answer(tiny_model, ["--backend", "uniproc"], requests(PROMPTS, seed=2))


@pytest.mark.cuda_devices(6)
def test_shards_and_stages_draw_what_one_rank_draws(tiny_model: str, answer: Callable[..., Any]) -> None:
    """Each shard of the vocabulary has its part of the same noise."""
    layout = ["--tensor-parallel-size", "3", "--pipeline-parallel-size", "2"]
    expected = answer(tiny_model, ["--backend", "uniproc"], requests(PROMPTS, seed=5))
    assert expected == answer(tiny_model, layout, requests(PROMPTS, seed=5))


def test_a_temperature_near_zero_is_greedy(tiny_model: str, answer: Callable[..., Any]) -> None:
    """The limit of cold sampling is the most likely token."""
    cold = answer(tiny_model, ["--backend", "uniproc"], requests(PROMPTS, seed=1, temperature=1e-6))
    assert cold == answer(tiny_model, ["--backend", "uniproc"], requests(PROMPTS, seed=9, temperature=0.0))
