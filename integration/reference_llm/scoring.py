"""How likely the model finds a sequence that it is given, for training and for comparing models."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from reference_llm.layout import lay_out
from reference_llm.model import Llama
from reference_llm.steps import Sampling, SequenceStep, StepRequest


def log_probabilities(model: Llama, tokens: Sequence[int]) -> torch.Tensor | None:
    """The log-probability of each token after the first, given those before it. Needs no KV cache.

    Gradients flow where the model is on one rank.

    Returns:
        On the last stage ``[tokens - 1]`` float32, the same on every shard; None before.

    Raises:
        ValueError: for fewer than two tokens.
    """
    length = len(tokens)
    if length < 2:
        raise ValueError(f"{length} tokens: the first is given, so there must be two or more")
    step = StepRequest((SequenceStep(tokens=tuple(tokens), start=0, blocks=(0,), sampling=Sampling()),))
    layout = lay_out(step, length, model.dtype, model.device)
    logits = model(attrs.evolve(layout, last=torch.arange(length - 1, device=model.device)), None)
    if logits is None:
        return None
    targets = layout.tokens[1:] - model.vocabulary.start
    mine = (targets >= 0) & (targets < logits.shape[-1])
    picked = logits.gather(-1, torch.where(mine, targets, 0)[:, None])[:, 0].masked_fill(~mine, -torch.inf)
    # Two numbers of each shard travel, not its logits: softmax's denominator, and the token's logit where it is known.
    shards = model.collectives.stack_shards(torch.stack([logits.logsumexp(-1), picked]))
    denominator, score = shards.logsumexp(0).unbind()
    return torch.sub(score, denominator)
