"""A rank's slice of the weights is that part of the whole, however they are stored, and no more of the file is read."""

from __future__ import annotations

from pathlib import Path

import attrs
import gguf
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

from exec_core import ConfigError
from reference_llm.checkpoint import Checkpoint
from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import read_gguf
from reference_llm.hparams import shard
from tiny_gguf import TINY, write_tiny_gguf

NAME = "blk.1.ffn_down.weight"  # 96 rows of 192


def checkpoint(path: str) -> Checkpoint:
    """All of a file's tensors, on the CPU."""
    return Checkpoint(path, read_gguf(path).tensors, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
@pytest.mark.parametrize("part", [slice(0, 64), slice(64, 128), slice(48, 96), slice(7, 9), slice(0, 192)])
def test_a_slice_is_that_part_of_the_whole(kind: Kind, part: slice, tmp_path: Path) -> None:
    """Rows and columns, along the blocks of the quantisation and across them."""
    path = write_tiny_gguf(tmp_path / "model.gguf", kind=kind)
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == NAME)
    whole = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    weights = checkpoint(path)
    assert torch.equal(whole[:, part], weights.columns(NAME, part))
    assert torch.equal(whole[part], weights.rows(NAME, part))


def test_only_the_slice_is_read(tiny_model: str, tmp_path: Path) -> None:
    """A file in which everything else is a hole gives the same slice: the rest was not looked at."""
    tensors = read_gguf(tiny_model).tensors
    info, part = tensors[NAME], shard(192, 1, 3)
    content = Path(tiny_model).read_bytes()
    hollow = bytearray(len(content))
    block_bytes = info.row_bytes // (192 // 32)
    for row in range(96):
        start = info.offset + row * info.row_bytes + part.start // 32 * block_bytes
        stop = info.offset + row * info.row_bytes + part.stop // 32 * block_bytes
        hollow[start:stop] = content[start:stop]
    path = tmp_path / "hollow.gguf"
    path.write_bytes(hollow)
    read = Checkpoint(str(path), tensors, torch.float32, torch.device("cpu"))
    assert torch.equal(checkpoint(tiny_model).columns(NAME, part), read.columns(NAME, part))


def test_a_file_that_became_shorter_is_an_error(tiny_model: str, tmp_path: Path) -> None:
    """Between the driver's look at its header and a worker's at its weights."""
    path = tmp_path / "shorter.gguf"
    path.write_bytes(Path(tiny_model).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"shorter\.gguf: has become shorter"):
        Checkpoint(str(path), read_gguf(tiny_model).tensors, torch.float32, torch.device("cpu"))


def test_shards_are_even_and_cover_everything() -> None:
    """A vocabulary need not be divisible."""
    parts = [shard(258, rank, 4) for rank in range(4)]
    assert list(range(258)) == [item for part in parts for item in range(part.start, part.stop)]
    assert {64, 65} == {part.stop - part.start for part in parts}


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_layer_is_in_one_stage(stages: int) -> None:
    """Each stage has at least one, and together they have all in order."""
    ranges = [TINY.stage_layers(stage, stages) for stage in range(stages)]
    assert list(range(TINY.num_layers)) == [layer for layers in ranges for layer in layers]
    assert all(ranges)


def test_a_large_head_makes_the_last_stage_shorter() -> None:
    """Stages read about the same number of weights in a step, the output projection included."""
    per_layer = 96 * (2 * 16 * (6 + 3) + 3 * 192)
    wide = attrs.evolve(TINY, num_layers=12, vocab_size=4 * per_layer // 96)
    assert [8, 4] == [len(wide.stage_layers(stage, 2)) for stage in range(2)]


def test_sizes_that_do_not_fit_the_model_are_config_errors() -> None:
    """They name the field, the value, and what would work."""
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size must divide.*6 heads, 3 KV heads.*got 2; 1 or 3 would work"
    ):
        TINY.check_parallel(2, 1)
    with pytest.raises(
        ConfigError, match=r"pipeline_parallel_size must be at most.*4 layers, got 5; 1 to 4 would work"
    ):
        TINY.check_parallel(1, 5)
