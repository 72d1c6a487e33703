"""Takes over weights that are in memory already: those of a trainer, which has the whole model, one tensor at a time.

    whole tensor (a trainer's) ─ views of this rank's part ─ copied into the parameter, in place

Names are those of the whole model, `Llama.named_parameters` where there is one rank.
"""

from __future__ import annotations

import torch

from reference_llm.hparams import shard
from reference_llm.model import Llama

TABLE, FINAL_NORM, OUTPUT = "embedding.weight", "head.norm.weight", "head.weight"


def update_weight(model: Llama, name: str, whole: torch.Tensor) -> None:
    """Copies this rank's part of ``whole`` into the parameter that it replaces; nothing if that is another stage's.

    Raises:
        KeyError: the model has no such parameter.
        ValueError: ``whole`` has another shape than the model's parameter.
    """
    target = _parameter(model, name)
    if target is None:
        return
    parts = _parts(model, name, whole)
    # Checked because copy_ would broadcast.
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if tuple(target.shape) != shape:
        raise ValueError(f"{name}: this rank's part of {tuple(whole.shape)} is {shape}, not {tuple(target.shape)}")
    with torch.no_grad():
        for mine, part in zip(torch.split(target, [part.shape[0] for part in parts]), parts, strict=True):
            mine.copy_(part)


def _parameter(model: Llama, name: str) -> torch.nn.Parameter | None:
    """This rank's parameter of that name in the whole model, or None if another stage has it."""
    mine = dict(model.named_parameters(remove_duplicate=False))
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        if int(layer) in model.layer_range:
            return mine[f"layers.{int(layer) - model.layer_range.start}.{rest}"]
        if int(layer) < model.hparams.num_layers:
            return None
    elif name in {TABLE, FINAL_NORM, OUTPUT}:
        # Where one table serves both ends, the last stage knows it as its output alone.
        return mine.get(name, mine.get(OUTPUT) if name == TABLE and model.hparams.tied else None)
    raise KeyError(name)


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
