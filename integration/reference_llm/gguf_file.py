"""The header of a GGUF file: metadata and a table of tensors.

`gguf.GGUFReader` builds several numpy arrays for each of the 98,000 strings of a vocabulary: 3 s and more to open a
small model. Here the header is one pass over a memory map, 0.1 s. What its numbers mean (types, block sizes) comes from
`gguf`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from typing import Any

import attrs
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from reference_llm.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_GET_COMPLETE = "get the complete file again"
_CONVERT = "convert it again with llama.cpp"


@attrs.frozen
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name in the file.
        shape: in elements, rows first (the file has it the other way round); a vector has one dimension.
        kind: how its elements are stored.
        offset: first byte, counted from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last dimension."""
        elements, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // elements * size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * self.row_bytes


@attrs.frozen
class GgufFile:
    """The header of a file.

    Attributes:
        path: the file.
        metadata: its key-value pairs; an array is a list.
        tensors: its tensors by name.
    """

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_gguf(path: str) -> GgufFile:
    """Reads the header of ``path`` and checks that the tensors it announces are all there.

    Raises:
        CheckpointError: for a file that is missing, is not a GGUF, is of an unknown version or kind, or is cut short.
    """
    try:
        with open(path, "rb") as file:  # mmap wants the file itself
            start = file.read(8)
            if start[:4] != MAGIC:
                raise CheckpointError(path, f"is not a GGUF file (it starts with {start[:4]!r})", "name a .gguf file")
            if len(start) < 8:
                raise CheckpointError(path, "is cut short within its header", _GET_COMPLETE)
            version = int.from_bytes(start[4:], "little")
            if version not in VERSIONS:
                raise CheckpointError(path, f"has GGUF version {version}, not 2 or 3", _CONVERT)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error), "name a .gguf file that can be read") from error


class _Header:
    """A cursor over the header's bytes."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 8

    def read(self) -> GgufFile:
        try:
            tensor_count, pair_count = self._unpack(struct.Struct("<QQ"))
            metadata = dict(self._pair() for _ in range(pair_count))
            described = [self._tensor() for _ in range(tensor_count)]
            alignment = int(metadata.get("general.alignment", 32))
            base = -(-self.at // alignment) * alignment
        except CheckpointError:
            raise
        except (struct.error, ValueError, TypeError, ZeroDivisionError) as error:
            problem = f"is cut short or damaged within its header, at byte {self.at} of {len(self.data)}"
            raise CheckpointError(self.path, problem, _GET_COMPLETE) from error
        tensors = {name: TensorInfo(name, shape, kind, base + offset) for name, shape, kind, offset in described}
        for info in tensors.values():
            self._check_extent(info)
        return GgufFile(self.path, metadata, tensors)

    def _check_extent(self, info: TensorInfo) -> None:
        end = info.offset + info.nbytes
        if end > len(self.data):
            problem = f"is cut short: tensor {info.name} ends at byte {end}, the file has {len(self.data)}"
            raise CheckpointError(self.path, problem, _GET_COMPLETE)

    def _unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def _scalar(self, kind: GGUFValueType) -> Any:
        return self._unpack(_SCALARS[kind])[0]

    def _count(self) -> int:
        count = int(self._scalar(GGUFValueType.UINT64))
        if count > len(self.data) - self.at:
            raise struct.error(f"{count} items in {len(self.data) - self.at} bytes")
        return count

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        # Inlined on purpose: this loop runs for each token and each merge of a vocabulary.
        data, at, length = self.data, self.at, _SCALARS[GGUFValueType.UINT64].unpack_from
        strings = []
        for _ in range(count):
            begin = at + 8
            at = begin + length(data, at)[0]
            strings.append(data[begin:at].decode())
        if at > len(data):
            raise struct.error("a string ends beyond the file")
        self.at = at
        return strings

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        kind = GGUFValueType(self._scalar(GGUFValueType.UINT32))
        if kind is GGUFValueType.STRING:
            return key, self._string()
        if kind is not GGUFValueType.ARRAY:
            return key, self._scalar(kind)
        item = GGUFValueType(self._scalar(GGUFValueType.UINT32))
        count = self._count()
        if item is GGUFValueType.STRING:
            return key, self._strings(count)
        if item is GGUFValueType.ARRAY:
            raise CheckpointError(self.path, f"has nested arrays in {key}", _CONVERT)
        return key, list(self._unpack(struct.Struct(f"<{count}{_SCALARS[item].format[1:]}")))

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        dimensions = int(self._scalar(GGUFValueType.UINT32))
        if not 1 <= dimensions <= 4:
            raise struct.error(f"tensor {name} has {dimensions} dimensions")
        shape = self._unpack(struct.Struct(f"<{dimensions}Q"))
        number = int(self._scalar(GGUFValueType.UINT32))
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            problem = f"stores tensor {name} in unknown type {number}"
            raise CheckpointError(self.path, problem, "update the gguf package") from None
        return name, tuple(reversed(shape)), kind, int(self._scalar(GGUFValueType.UINT64))
