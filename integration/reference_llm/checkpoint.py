"""Reads one rank's slice of the weights from a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES

from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import TensorInfo


class Checkpoint:
    """The tensors of a file, mapped, read and dequantised slice by slice.

    Args:
        path: the file.
        tensors: its table, from `read_gguf`.
        dtype: what weights become.
        device: where they go.

    Raises:
        CheckpointError: when the file cannot be opened, or is shorter than the table says.
    """

    def __init__(self, path: str, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, device: torch.device) -> None:
        self.path = path
        self._tensors = tensors
        self.dtype = dtype
        self.device = device
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(path, str(error), "name a .gguf file that every rank can read") from error
        end = max(info.offset + info.nbytes for info in tensors.values())
        if end > len(self._bytes):
            raise CheckpointError(path, f"has become shorter than {end} bytes", "get the complete file again")

    def vector(self, name: str) -> torch.Tensor:
        """The one-dimensional tensor ``name``, in float32: norms and factors are small, and precious."""
        info = self._tensors[name]
        stored = self._bytes[info.offset : info.offset + info.nbytes]
        return self._dequantized(stored[None], info)[0].to(self.device)

    def rows(self, name: str, part: slice) -> torch.Tensor:
        """Rows ``part`` of the matrix ``name``: a column-parallel shard."""
        return self._place(self._dequantized(self._stored_rows(name)[part], self._tensors[name]))

    def columns(self, name: str, part: slice) -> torch.Tensor:
        """Columns ``part`` of the matrix ``name``: a row-parallel shard.

        Only these columns' blocks are read. A slice that does not start and end with a block of the quantisation is cut
        out of the blocks around it.
        """
        info = self._tensors[name]
        block, size = GGML_QUANT_SIZES[info.kind]
        first, last = part.start // block, -(-part.stop // block)
        stored = self._stored_rows(name)[:, first * size : last * size]
        return self._place(self._dequantized(stored, info)[:, part.start - first * block : part.stop - first * block])

    def _stored_rows(self, name: str) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        info = self._tensors[name]
        return self._bytes[info.offset : info.offset + info.nbytes].reshape(info.shape[0], info.row_bytes)

    def _dequantized(self, stored: np.ndarray[tuple[int, int], np.dtype[np.uint8]], info: TensorInfo) -> torch.Tensor:
        # A private copy: float32 would stay a view of the read-only map, which torch does not take.
        try:
            values = gguf.quants.dequantize(np.array(stored), info.kind)
        except NotImplementedError:
            problem = f"stores tensor {info.name} as {info.kind.name}, which gguf cannot dequantise"
            raise CheckpointError(self.path, problem, "use a file quantised otherwise, or update gguf") from None
        return torch.from_numpy(values)

    def _place(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(device=self.device, dtype=self.dtype).contiguous()
