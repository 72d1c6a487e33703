"""Takes over weights that are in memory already: those of a trainer, which has the whole model, one tensor at a time.

    whole tensor (a trainer's) ─ views of this rank's part ─ copied into the parameter, in place

Names are those of the whole model, `Llama.named_parameters` where there is one rank.
"""

from __future__ import annotations

import torch

from reference_llm.hparams import Hparams, shard
from reference_llm.model import Llama

TABLE, FINAL_NORM, OUTPUT = "embedding.weight", "head.norm.weight", "head.weight"


def update_weight(model: Llama, name: str, whole: torch.Tensor) -> None:
    """Copies this rank's part of ``whole`` into the parameter that it replaces; nothing if that is another stage's.

    Every rank checks ``name`` and ``whole``, whether it has a part of it or not, so that all ranks refuse the same.

    Args:
        whole: of any floating-point type; it is converted to the model's.

    Raises:
        KeyError: the model has no such parameter.
        ValueError: ``whole`` has another shape than the model's parameter, or is not of floating point.
    """
    local = _local_name(model, name)
    expected = _whole_shape(model.hparams, name.split(".", 2)[-1] if name.startswith("layers.") else name)
    if expected is None or local is None:
        raise KeyError(f"the model has no parameter {name!r}; names are those of Llama.named_parameters() on one rank")
    if tuple(whole.shape) != expected:  # copy_ would broadcast, and a slice hides rows that are too many
        raise ValueError(f"{name}: expected shape {expected}, the whole tensor's, got {tuple(whole.shape)}")
    if not whole.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point type, to convert to {model.dtype}, got {whole.dtype}")
    target = dict(model.named_parameters(remove_duplicate=False)).get(local)
    if target is None:
        return
    parts = _parts(model, name, whole)
    with torch.no_grad():
        for mine, part in zip(torch.split(target, [part.shape[0] for part in parts]), parts, strict=True):
            mine.copy_(part)


def _local_name(model: Llama, name: str) -> str | None:
    """How the rank that has it calls the parameter of that name in the whole model; None where there is no such layer."""
    if name == TABLE and model.hparams.tied and model.embedding is None:
        return OUTPUT  # one table serves both ends: the last stage knows it as its output alone
    if not name.startswith("layers."):
        return name
    _, number, rest = (*name.split(".", 2), "", "")[:3]
    if not (number.isascii() and number.isdigit() and int(number) < model.hparams.num_layers):
        return None
    return f"layers.{int(number) - model.layer_range.start}.{rest}"


def _whole_shape(hparams: Hparams, name: str) -> tuple[int, ...] | None:
    """Shape of the whole model's parameter, its layer's number left out of ``name``; None if there is none."""
    hidden, inner = hparams.hidden_size, hparams.intermediate_size
    heads, kv_heads = hparams.num_heads * hparams.head_dim, hparams.num_kv_heads * hparams.head_dim
    return {
        TABLE: (hparams.vocab_size, hidden),
        OUTPUT: (hparams.vocab_size, hidden),
        FINAL_NORM: (hidden,),
        "attention_norm.weight": (hidden,),
        "mlp_norm.weight": (hidden,),
        "attention.qkv": (heads + 2 * kv_heads, hidden),
        "attention.out": (hidden, heads),
        "mlp.gate_up": (2 * inner, hidden),
        "mlp.down": (hidden, inner),
    }.get(name)


def _parts(model: Llama, name: str, whole: torch.Tensor) -> list[torch.Tensor]:
    """Views of what this shard has of ``whole``, in the order in which its parameter has them."""
    hparams, rank, size = model.hparams, model.collectives.tp_rank, model.collectives.tp_size
    q_rows, kv_rows = hparams.num_heads * hparams.head_dim, hparams.num_kv_heads * hparams.head_dim
    if name.endswith("attention.qkv"):
        return [rows[shard(rows.shape[0], rank, size)] for rows in torch.split(whole, [q_rows, kv_rows, kv_rows])]
    if name.endswith("mlp.gate_up"):
        return [rows[shard(rows.shape[0], rank, size)] for rows in whole.chunk(2)]
    if name.endswith(("attention.out", "mlp.down")):
        return [whole[:, shard(whole.shape[1], rank, size)]]
    return [whole[model.vocabulary] if name in {TABLE, OUTPUT} else whole]
