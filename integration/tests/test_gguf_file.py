"""The header of a GGUF file is read as `gguf` reads it, and what is wrong with a file is said."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import pytest

from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import read_gguf
from reference_llm.hparams import Hparams
from tiny_gguf import write_tiny_gguf


def test_metadata_and_tensors_are_those_of_gguf_reader(tiny_model: str) -> None:
    """The same keys and values, the same tensors at the same places."""
    theirs = gguf.GGUFReader(tiny_model)
    ours = read_gguf(tiny_model)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == ours.metadata
    places = {t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors}
    assert places == {t.name: (t.shape, t.kind, t.offset, t.nbytes) for t in ours.tensors.values()}


def test_a_file_cut_short_anywhere_is_an_error_that_names_it(tiny_model: str, tmp_path: Path) -> None:
    """Wherever it is cut, in the header or in the weights."""
    whole = Path(tiny_model).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 64), *range(64, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: is cut short.*get the complete file again"):
            read_gguf(str(cut))


def test_a_damaged_header_is_an_error_and_never_something_else(tiny_model: str, tmp_path: Path) -> None:
    """Counts, lengths and types overwritten with all ones; the value of a key that does not matter may pass."""
    whole = Path(tiny_model).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for at in range(8, 400, 4):
        damaged.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        try:
            Hparams.from_gguf(read_gguf(str(damaged)))
        except CheckpointError:  # anything else fails the test
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04 some archive", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "has GGUF version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has architecture None"),
    ],
)
def test_what_is_no_model_is_an_error(content: bytes, problem: str, tmp_path: Path) -> None:
    """Empty, of another format, of another version, without a model."""
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        Hparams.from_gguf(read_gguf(str(path)))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """Missing, or a directory."""
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(CheckpointError, match=os.fspath(path)):
            read_gguf(os.fspath(path))


def test_tensors_that_are_no_plain_llama_are_an_error(tmp_path: Path) -> None:
    """One missing, one too many, or another architecture."""
    missing = write_tiny_gguf(tmp_path / "missing.gguf", without="blk.2.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"has no tensor blk\.2\.ffn_up\.weight"):
        Hparams.from_gguf(read_gguf(missing))
    extra = write_tiny_gguf(tmp_path / "extra.gguf", extra="blk.0.attn_q.bias")
    with pytest.raises(CheckpointError, match=r"such as blk\.0\.attn_q\.bias"):
        Hparams.from_gguf(read_gguf(extra))
    other = write_tiny_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(CheckpointError, match="has architecture 'qwen2', not 'llama'"):
        Hparams.from_gguf(read_gguf(other))
