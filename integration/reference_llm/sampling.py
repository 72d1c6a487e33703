"""Chooses tokens from logits that are spread over the shards of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from reference_llm.model import Llama
from reference_llm.steps import Sampling, SequenceStep


def choose_tokens(logits: torch.Tensor, model: Llama, sequences: Sequence[SequenceStep]) -> list[int]:
    """The next token of each sequence; the same list on every shard.

    Only the best candidate of each shard travels, not its logits: drawing from softmax(logits / T) is taking the
    largest of logits / T + Gumbel noise, and a largest of largest ones is easily found. (The "Gumbel-max trick".)

    Args:
        logits: ``[sequences, vocabulary of this shard]``, float32. Overwritten.
        model: where they come from.
    """
    for row, sequence in zip(logits, sequences, strict=True):
        if sequence.sampling.temperature > 0:
            position = sequence.start + len(sequence.tokens)
            noise = gumbel_noise(sequence.sampling, position, model.hparams.vocab_size)[model.vocabulary]
            row.div_(sequence.sampling.temperature).add_(torch.from_numpy(noise).to(row.device))
    scores, tokens = logits.max(dim=-1)
    # float64 holds every score and every token id exactly: one message instead of two.
    best = model.collectives.stack_shards(torch.stack([scores.double(), tokens.double() + model.vocabulary.start]))
    shards = best[:, 0].argmax(dim=0, keepdim=True)
    chosen: list[int] = best[:, 1].gather(0, shards)[0].long().tolist()
    return chosen


def gumbel_noise(sampling: Sampling, position: int, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Noise for the token at ``position``: a function of seed and position alone, on any device and in any batch."""
    generator = np.random.Generator(np.random.Philox(key=sampling.seed, counter=[0, 0, 0, position]))
    return generator.gumbel(size=vocab_size).astype(np.float32)
