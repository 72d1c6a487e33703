"""Writes very small Llama GGUF files with random weights, for tests that need a model but not its answers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, TokenType
from tokenizers.pre_tokenizers import ByteLevel

from reference_llm.hparams import Hparams

END = "<|end|>"
TINY = Hparams(
    vocab_size=258,
    hidden_size=96,
    intermediate_size=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    context_length=96,
    rope_base=10000.0,
    rms_epsilon=1e-5,
    tied=True,
    rope_factors=False,
)


def write_tiny_gguf(
    path: Path,
    hparams: Hparams = TINY,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    architecture: str = "llama",
    without: str = "",
    extra: str = "",
) -> str:
    """Writes a file and returns its path. The same arguments give the same weights.

    Args:
        kind: how matrices are stored.
        without: name of a tensor to leave out.
        extra: name of a tensor to add.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(hparams.num_layers)
    writer.add_context_length(hparams.context_length)
    writer.add_embedding_length(hparams.hidden_size)
    writer.add_feed_forward_length(hparams.intermediate_size)
    writer.add_head_count(hparams.num_heads)
    writer.add_head_count_kv(hparams.num_kv_heads)
    writer.add_layer_norm_rms_eps(hparams.rms_epsilon)
    writer.add_rope_freq_base(hparams.rope_base)
    writer.add_rope_dimension_count(hparams.head_dim)
    _add_vocabulary(writer)
    random = np.random.default_rng(0)
    for name, shape in [*hparams.tensor_shapes(), *([(extra, (hparams.hidden_size,))] if extra else [])]:
        values = random.normal(0.0, 0.2, shape).astype(np.float32)
        if name == without:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, np.abs(values) + np.float32(0.5))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """One token for each byte, one merge, and one token that ends an answer."""
    tokens = [*sorted(ByteLevel.alphabet()), "he", END]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
