"""The layers of a Llama-family transformer, one tensor-parallel shard of each.

A layer is x + attention(norm(x)), then x + mlp(norm(x)); both attention and mlp end in a sum over the shards.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from reference_llm.checkpoint import Checkpoint
from reference_llm.collectives import Collectives
from reference_llm.hparams import Hparams, shard
from reference_llm.kv_cache import PagedKVCache
from reference_llm.layout import Layout


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` for ``x`` ``[tokens, in]`` and ``weight`` ``[out, in]``."""
    if x.device.type == "cpu" and 1 < x.shape[0] <= 5:
        # For so few tokens MKL is two to three times as fast with the large matrix on the left, if x lies row by row.
        return torch.mm(weight, x.t()).t().contiguous()
    return functional.linear(x, weight)


def rotate_(x: torch.Tensor, turns: torch.Tensor) -> None:
    """Turns each pair of neighbours in ``x`` ``[tokens, heads, head_dim]``, in place.

    GGUF files keep the rows of the query and key projections in the order that makes the pairs neighbours.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    x.copy_(torch.view_as_real(pairs * turns).flatten(-2))


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache, with the heads of this shard."""

    def __init__(self, hparams: Hparams, layer: int, checkpoint: Checkpoint, collectives: Collectives) -> None:
        super().__init__()
        self.layer = layer
        self.collectives = collectives
        self.head_dim = hparams.head_dim
        self.num_heads = hparams.num_heads // collectives.tp_size
        self.num_kv_heads = hparams.num_kv_heads // collectives.tp_size
        heads = shard(hparams.num_heads * hparams.head_dim, collectives.tp_rank, collectives.tp_size)
        kv_heads = shard(hparams.num_kv_heads * hparams.head_dim, collectives.tp_rank, collectives.tp_size)
        qkv = [
            checkpoint.rows(f"blk.{layer}.attn_{name}.weight", part)
            for name, part in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        ]
        self.qkv = nn.Parameter(torch.cat(qkv), requires_grad=False)
        self.out = nn.Parameter(checkpoint.columns(f"blk.{layer}.attn_output.weight", heads), requires_grad=False)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, layout: Layout, cache: PagedKVCache | None) -> torch.Tensor:
        """``[tokens, hidden]`` to the same; ``turns`` is ``[tokens, 1, head_dim / 2]``, complex.

        Without a cache nothing is kept, and only whole prompts can be computed.
        """
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = linear(x, self.qkv).view(-1, heads, self.head_dim)
        rotate_(qkv[:, : -self.num_kv_heads], turns)
        q, k, v = torch.split(qkv, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            cache.write(self.layer, layout.slots, qkv[:, self.num_heads :])
        parts = [self._attend_prompt(q[part], k[part], v[part]) for part in layout.prompts]
        if layout.tables.shape[0] and cache is not None:
            parts.append(self._attend_cached(q[layout.continued], layout, cache))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.collectives.sum_over_shards(linear(attended, self.out))

    def _attend_prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A whole prompt: each token sees itself and those before it. ``[tokens, heads, head_dim]`` each."""
        # Repeated here: told of grouped heads, CUDA would make the whole matrix of scores in float32.
        k, v = (heads.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for heads in (k, v))
        q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended[0].transpose(0, 1).reshape(-1, self.num_heads * self.head_dim)

    def _attend_cached(self, q: torch.Tensor, layout: Layout, cache: PagedKVCache) -> torch.Tensor:
        """One token of each sequence: it sees what the cache holds of its own."""
        k, v = cache.read(self.layer, layout.tables).transpose(1, 2).chunk(2, dim=1)
        # The query heads that share a KV head stand as its rows: nothing is repeated.
        grouped = q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim)
        attended = functional.scaled_dot_product_attention(grouped, k, v, attn_mask=layout.mask)
        return attended.reshape(-1, self.num_heads * self.head_dim)


class Mlp(nn.Module):
    """SwiGLU, with the inner dimensions of this shard."""

    def __init__(self, hparams: Hparams, layer: int, checkpoint: Checkpoint, collectives: Collectives) -> None:
        super().__init__()
        self.collectives = collectives
        inner = shard(hparams.intermediate_size, collectives.tp_rank, collectives.tp_size)
        gate_up = [checkpoint.rows(f"blk.{layer}.ffn_{name}.weight", inner) for name in ("gate", "up")]
        self.gate_up = nn.Parameter(torch.cat(gate_up), requires_grad=False)
        self.down = nn.Parameter(checkpoint.columns(f"blk.{layer}.ffn_down.weight", inner), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)
        return self.collectives.sum_over_shards(linear(functional.silu(gate) * up, self.down))


class RmsNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, name: str, hparams: Hparams, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.weight = nn.Parameter(checkpoint.vector(name), requires_grad=False)
        self.epsilon = hparams.rms_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon).to(x.dtype)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, hparams: Hparams, layer: int, checkpoint: Checkpoint, collectives: Collectives) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(f"blk.{layer}.attn_norm.weight", hparams, checkpoint)
        self.attention = Attention(hparams, layer, checkpoint, collectives)
        self.mlp_norm = RmsNorm(f"blk.{layer}.ffn_norm.weight", hparams, checkpoint)
        self.mlp = Mlp(hparams, layer, checkpoint, collectives)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, layout: Layout, cache: PagedKVCache | None) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        x = x + self.attention(self.attention_norm(x), turns, layout, cache)
        out: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return out
