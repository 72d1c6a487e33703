"""The shape of a Llama-family model, and how it is cut into tensor-parallel shards and pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from exec_core import ConfigError
from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import GgufFile

EMBEDDING = "token_embd.weight"
FINAL_NORM = "output_norm.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
_ANOTHER = "use a Llama-family file"


@attrs.frozen(kw_only=True)
class Hparams:
    """Sizes of a model, in elements.

    Attributes:
        tied: whether the output projection is the embedding table itself.
        rope_factors: whether the file has a divisor for each rotary frequency.
        context_length: tokens of a sequence, at most.
        rope_base: base of the rotary frequencies.
        rms_epsilon: added to the mean square in RMSNorm.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_base: float
    rms_epsilon: float
    tied: bool
    rope_factors: bool

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Hparams:
        """Reads and checks the sizes and the presence and shape of every tensor.

        Raises:
            CheckpointError: for another architecture, or metadata or tensors that are missing or do not fit.
        """
        architecture = file.metadata.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(file.path, f"has architecture {architecture!r}, not 'llama'", _ANOTHER)
        if file.metadata.get("llama.rope.scaling.type", "none") != "none":
            raise CheckpointError(file.path, "scales its rotary embeddings, which is not supported", _ANOTHER)
        hparams = cls._from_metadata(file)
        _check(file, hparams)
        return hparams

    @classmethod
    def _from_metadata(cls, file: GgufFile) -> Hparams:
        heads = _int(file, "llama.attention.head_count")
        hidden = _int(file, "llama.embedding_length")
        embedding = file.tensors.get(EMBEDDING)
        return cls(
            vocab_size=embedding.shape[0] if embedding else 0,
            hidden_size=hidden,
            intermediate_size=_int(file, "llama.feed_forward_length"),
            num_layers=_int(file, "llama.block_count"),
            num_heads=heads,
            num_kv_heads=_int(file, "llama.attention.head_count_kv", heads),
            head_dim=_int(file, "llama.attention.key_length", hidden // max(1, heads)),
            context_length=_int(file, "llama.context_length"),
            rope_base=float(file.metadata.get("llama.rope.freq_base", 10000.0)),
            rms_epsilon=float(file.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
            tied=HEAD not in file.tensors,
            rope_factors=ROPE_FACTORS in file.tensors,
        )

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the model with its shape, rows first."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield EMBEDDING, (self.vocab_size, hidden)
        yield FINAL_NORM, (hidden,)
        if not self.tied:
            yield HEAD, (self.vocab_size, hidden)
        if self.rope_factors:
            yield ROPE_FACTORS, (self.head_dim // 2,)
        for index in range(self.num_layers):
            block = f"blk.{index}"
            yield f"{block}.attn_norm.weight", (hidden,)
            yield f"{block}.attn_q.weight", (q_rows, hidden)
            yield f"{block}.attn_k.weight", (kv_rows, hidden)
            yield f"{block}.attn_v.weight", (kv_rows, hidden)
            yield f"{block}.attn_output.weight", (hidden, q_rows)
            yield f"{block}.ffn_norm.weight", (hidden,)
            yield f"{block}.ffn_gate.weight", (inner, hidden)
            yield f"{block}.ffn_up.weight", (inner, hidden)
            yield f"{block}.ffn_down.weight", (hidden, inner)

    @property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """The sizes that divide heads, KV heads and the inner dimension, ascending."""
        cut = (self.num_heads, self.num_kv_heads, self.intermediate_size)
        return tuple(n for n in range(1, self.num_kv_heads + 1) if all(size % n == 0 for size in cut))

    def check_parallel(self, tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
        """Checks that the model can be cut this way.

        Raises:
            ConfigError: when tensor parallelism does not divide the heads, or there are more stages than layers.
        """
        fitting = self.tensor_parallel_sizes
        if tensor_parallel_size not in fitting:
            cut = f"{self.num_heads} heads, {self.num_kv_heads} KV heads and {self.intermediate_size} MLP units"
            raise ConfigError(
                "ParallelConfig.tensor_parallel_size",
                f"must divide the model's {cut}",
                tensor_parallel_size,
                remedy=f"{' or '.join(map(str, fitting))} would work",
            )
        if pipeline_parallel_size > self.num_layers:
            raise ConfigError(
                "ParallelConfig.pipeline_parallel_size",
                f"must be at most the model's {self.num_layers} layers",
                pipeline_parallel_size,
                remedy=f"1 to {self.num_layers} would work",
            )

    def stage_layers(self, stage: int, stages: int) -> range:
        """The layers of one pipeline stage, so that all stages read about the same number of weights in a step.

        The last stage also reads the output projection, which in a small model weighs as much as several layers.
        """
        per_layer = self.hidden_size * (
            2 * self.head_dim * (self.num_heads + self.num_kv_heads) + 3 * self.intermediate_size
        )
        head = self.hidden_size * self.vocab_size
        share = (self.num_layers + head / per_layer) / stages
        cuts = [0]
        for number in range(1, stages):
            # At least one layer for each stage, before this cut and after it.
            cuts.append(min(max(round(number * share), cuts[-1] + 1), self.num_layers - (stages - number)))
        cuts.append(self.num_layers)
        return range(cuts[stage], cuts[stage + 1])


def shard(extent: int, rank: int, size: int) -> slice:
    """The part of ``extent`` items that belongs to ``rank`` of ``size``: contiguous, and even to within one item."""
    return slice(extent * rank // size, extent * (rank + 1) // size)


def _int(file: GgufFile, key: str, default: int | None = None) -> int:
    metadata: Mapping[str, Any] = file.metadata
    value = metadata.get(key, default)
    if isinstance(value, int) and value > 0:
        return value
    problem = f"has no {key}" if value is None else f"has {key} {value!r}, which is no positive number"
    raise CheckpointError(file.path, problem, _ANOTHER)


def _check(file: GgufFile, hparams: Hparams) -> None:
    """Raises CheckpointError where sizes contradict each other, or the tensors are not the ones that they ask for."""
    heads, kv_heads, head_dim = hparams.num_heads, hparams.num_kv_heads, hparams.head_dim
    if head_dim % 2 or heads % kv_heads:
        sizes = f"{heads} heads of {head_dim} with {kv_heads} KV heads"
        raise CheckpointError(file.path, f"has {sizes}, which do not go together", _ANOTHER)
    if (rotary := _int(file, "llama.rope.dimension_count", head_dim)) != head_dim:
        raise CheckpointError(file.path, f"rotates {rotary} of {head_dim} dimensions, not all", _ANOTHER)
    expected = dict(hparams.tensor_shapes())
    for name, shape in expected.items():
        if name not in file.tensors:
            raise CheckpointError(file.path, f"has no tensor {name}", "get the complete file again")
        if (found := file.tensors[name].shape) != shape:
            raise CheckpointError(file.path, f"has tensor {name} of shape {found}, not {shape}", _ANOTHER)
    if unknown := sorted(set(file.tensors).difference(expected)):
        problem = f"has {len(unknown)} tensors that a plain Llama model has not, such as {unknown[0]}"
        raise CheckpointError(file.path, problem, _ANOTHER)
