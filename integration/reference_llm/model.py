"""One rank's part of a Llama-family transformer: the layers of its pipeline stage, its shard of each.

A step goes through as ``[tokens, hidden]``: the sequences lie one after the other, see `layout`.

    tokens ─ embedding ┬─ layers ─┬ head ─ logits        the first stage embeds, the last has the head
              received ┘          └ sent
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from reference_llm.checkpoint import Checkpoint
from reference_llm.collectives import Collectives
from reference_llm.hparams import EMBEDDING, FINAL_NORM, HEAD, ROPE_FACTORS, Hparams, shard
from reference_llm.kv_cache import PagedKVCache
from reference_llm.layers import Layer, RmsNorm, linear
from reference_llm.layout import Layout


class Embedding(nn.Module):
    """The rows of the embedding table that belong to this shard's part of the vocabulary."""

    def __init__(self, weight: nn.Parameter, vocabulary: slice, collectives: Collectives) -> None:
        super().__init__()
        self.weight = weight
        self.vocabulary = vocabulary
        self.collectives = collectives

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[tokens]`` ids to ``[tokens, hidden]``."""
        if self.collectives.tp_size == 1:
            return functional.embedding(tokens, self.weight)
        mine = (tokens >= self.vocabulary.start) & (tokens < self.vocabulary.stop)
        rows = functional.embedding(torch.where(mine, tokens - self.vocabulary.start, 0), self.weight)
        return self.collectives.sum_over_shards(rows * mine[:, None])


class Head(nn.Module):
    """The final norm and the output projection to this shard's part of the vocabulary."""

    def __init__(self, norm: RmsNorm, weight: nn.Parameter) -> None:
        super().__init__()
        self.norm = norm
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[sequences, hidden]`` to logits ``[sequences, vocabulary of this shard]``, float32."""
        return linear(self.norm(hidden), self.weight).float()


class Llama(nn.Module):
    """This rank's part of the model.

    Args:
        loaded: called after each part, with the number of parts loaded and the number there are.
    """

    frequencies: torch.Tensor

    def __init__(
        self,
        hparams: Hparams,
        checkpoint: Checkpoint,
        collectives: Collectives,
        loaded: Callable[[int, int], None],
    ) -> None:
        super().__init__()
        self.hparams = hparams
        self.collectives = collectives
        self.dtype, self.device = checkpoint.dtype, checkpoint.device
        self.layer_range = hparams.stage_layers(collectives.pp_rank, collectives.pp_size)
        self.vocabulary = shard(hparams.vocab_size, collectives.tp_rank, collectives.tp_size)
        parts = len(self.layer_range) + 1
        self.layers = nn.ModuleList()
        for layer in self.layer_range:
            self.layers.append(Layer(hparams, layer, checkpoint, collectives))
            loaded(len(self.layers), parts)
        self.embedding, self.head = self._ends(checkpoint)
        self.register_buffer("frequencies", self._frequencies(checkpoint), persistent=False)
        loaded(parts, parts)

    def _ends(self, checkpoint: Checkpoint) -> tuple[Embedding | None, Head | None]:
        """What the first and the last stage have besides layers; one table serves both where it is tied."""
        first, last, tied = self.collectives.is_first_stage, self.collectives.is_last_stage, self.hparams.tied
        table = output = None
        if first or (last and tied):
            table = nn.Parameter(checkpoint.rows(EMBEDDING, self.vocabulary), requires_grad=False)
        if last:
            output = table if tied else nn.Parameter(checkpoint.rows(HEAD, self.vocabulary), requires_grad=False)
        embedding = Embedding(table, self.vocabulary, self.collectives) if first and table is not None else None
        norm = RmsNorm(FINAL_NORM, self.hparams, checkpoint)
        return embedding, None if output is None else Head(norm, output)

    def _frequencies(self, checkpoint: Checkpoint) -> torch.Tensor:
        exponents = torch.arange(0, self.hparams.head_dim, 2, device=self.device) / self.hparams.head_dim
        frequencies = 1.0 / self.hparams.rope_base**exponents
        return frequencies / checkpoint.vector(ROPE_FACTORS) if self.hparams.rope_factors else frequencies

    def forward(self, layout: Layout, cache: PagedKVCache | None) -> torch.Tensor | None:
        """Computes this stage's part of a step; without a cache, of whole prompts alone.

        Returns:
            On the last stage, logits ``[sequences, vocabulary of this shard]`` in float32; None before.
        """
        if self.embedding is not None:
            x = self.embedding(layout.tokens)
        else:
            shape = (len(layout.tokens), self.hparams.hidden_size)
            x = self.collectives.receive_from_previous_stage(torch.empty(shape, dtype=self.dtype, device=self.device))
        angles = layout.positions[:, None, None] * self.frequencies
        turns = torch.polar(torch.ones_like(angles), angles)
        for layer in self.layers:
            x = layer(x, turns, layout, cache)
        if self.head is not None:
            logits: torch.Tensor = self.head(x[layout.last])
            return logits
        self.collectives.send_to_next_stage(x)
        return None
