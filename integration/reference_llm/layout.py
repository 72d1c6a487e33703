"""A step as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from reference_llm.steps import SequenceStep, StepRequest


@attrs.frozen(kw_only=True)
class Layout:
    """The tokens of all sequences of a step, one after the other: whole prompts, then one token of each other sequence.

    Attributes:
        tokens, positions, slots: ``[tokens]`` int64: id, position in its sequence, place in the KV cache.
        prompts: the part of the tokens that each prompt takes.
        continued: the part of the tokens that continues sequences.
        tables: ``[continued, blocks]`` int64, their block tables, padded.
        mask: ``[continued, 1, 1, blocks * block_size]``, 0 where a position exists and -inf elsewhere.
        last: ``[sequences]`` int64, where each sequence's last token is, in the request's order.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    prompts: tuple[slice, ...]
    continued: slice
    tables: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor


def lay_out(request: StepRequest, block_size: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """Lays ``request`` out for a cache with blocks of ``block_size`` tokens; the mask gets ``dtype``.

    Raises:
        ValueError: for several tokens that do not start their sequence: prompts are computed whole.
    """
    sequences = request.sequences
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens) == 1)
    rows: list[tuple[int, int, int]] = []
    prompts: list[slice] = []
    last = [0] * len(sequences)
    for index in order:
        sequence, begin = sequences[index], len(rows)
        rows += _rows(sequence, block_size)
        last[index] = len(rows) - 1
        if len(sequence.tokens) > 1:
            prompts.append(slice(begin, len(rows)))
    continued = [sequences[index] for index in order[len(prompts) :]]
    tables, lengths = _tables(continued, block_size)
    exists = np.arange(tables.shape[1] * block_size) < lengths[:, None]
    mask = np.where(exists, np.float32(0), np.float32(-np.inf))[:, None, None]
    tokens, positions, slots = torch.from_numpy(np.array(rows, dtype=np.int64).T.copy()).to(device)
    return Layout(
        tokens=tokens,
        positions=positions,
        slots=slots,
        prompts=tuple(prompts),
        continued=slice(len(rows) - len(continued), len(rows)),
        tables=torch.from_numpy(tables).to(device),
        mask=torch.from_numpy(mask).to(device=device, dtype=dtype),
        last=torch.tensor(last, dtype=torch.int64).to(device),
    )


def _rows(sequence: SequenceStep, block_size: int) -> list[tuple[int, int, int]]:
    """Id, position and slot of each token."""
    if sequence.start and len(sequence.tokens) > 1:
        raise ValueError(f"{len(sequence.tokens)} tokens from position {sequence.start}; a prompt starts at 0, whole")
    places = enumerate(sequence.tokens, sequence.start)
    return [(token, at, sequence.blocks[at // block_size] * block_size + at % block_size) for at, token in places]


def _tables(
    sequences: Sequence[SequenceStep], block_size: int
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Block tables, padded with their own first block to the longest, and lengths in tokens."""
    used = [sequence.blocks[: sequence.start // block_size + 1] for sequence in sequences]
    widest = max(map(len, used), default=0)
    tables = [(*blocks, *(blocks[0] for _ in range(widest - len(blocks)))) for blocks in used]
    lengths = [sequence.start + 1 for sequence in sequences]
    return np.array(tables, dtype=np.int64).reshape(len(used), widest), np.array(lengths, dtype=np.int64)
