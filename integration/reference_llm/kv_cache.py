"""The paged KV cache: keys and values of all sequences in blocks of equal size, found through block tables."""

from __future__ import annotations

import numpy as np
import torch


class PagedKVCache:
    """The blocks of this rank's layers and KV heads.

    Args:
        num_blocks, block_size: blocks, and tokens in each.
        num_kv_heads, head_dim: of this rank's shard.
    """

    def __init__(
        self,
        *,
        layers: range,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._token_shape = (2 * num_kv_heads, head_dim)
        shape = (num_blocks * block_size, *self._token_shape)
        self._slots = {layer: _zeros(shape, dtype, device) for layer in layers}

    @property
    def nbytes(self) -> int:
        """Bytes of all its blocks."""
        return sum(slots.nbytes for slots in self._slots.values())

    @staticmethod
    def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block over ``num_layers`` layers."""
        return num_layers * block_size * 2 * num_kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Stores keys and values.

        Args:
            slots: ``[tokens]``, where each token goes.
            kv: ``[tokens, 2 * num_kv_heads, head_dim]``, keys before values.
        """
        self._slots[layer].index_copy_(0, slots, kv)

    def read(self, layer: int, tables: torch.Tensor) -> torch.Tensor:
        """The contents of whole blocks, ``[sequences, blocks * block_size, 2 * num_kv_heads, head_dim]``.

        Args:
            tables: ``[sequences, blocks]``, padded with any block.
        """
        blocks = self._slots[layer].view(self.num_blocks, -1).index_select(0, tables.flatten())
        return blocks.view(tables.shape[0], -1, *self._token_shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: what was never written is read under a mask, and must not be NaN there."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # calloc, where torch.zeros would write: pages of blocks that are never used are never touched.
    raw = np.zeros(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
