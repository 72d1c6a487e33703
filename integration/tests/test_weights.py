"""New weights for workers that run: pushed tensor by tensor, refused where they do not fit, and through any sleep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest
import torch

from exec_core import Executor, create_executor
from reference_llm.checkpoint import Checkpoint
from reference_llm.collectives import Collectives
from reference_llm.engine import Engine, GenerationRequest
from reference_llm.gguf_file import read_gguf
from reference_llm.hparams import Hparams
from reference_llm.model import Llama
from reference_llm.options import executor_config, parse
from reference_llm.scoring import log_probabilities
from reference_llm.steps import Sampling
from tiny_gguf import TINY, write_tiny_gguf

TOKENS = (7, 77, 177, 3, 9)
LAYOUTS = {
    "one": ("--backend", "uniproc"),
    "tp3": ("--backend", "mp", "--tensor-parallel-size", "3"),
    "pp2": ("--backend", "mp", "--pipeline-parallel-size", "2"),
}


class Pair(NamedTuple):
    """An executor, and the whole model with other weights."""

    executor: Executor
    trainer: Llama

    def scores(self) -> Any:
        """The executor's log-probabilities of `TOKENS`."""
        (scores,) = self.executor.collective_rpc(
            "log_probabilities", args=(TOKENS,), reply_ranks=[self.executor.output_rank]
        )
        return pytest.approx(scores, abs=1e-3)

    def trainers_scores(self) -> list[float]:
        """The trainer's."""
        with torch.no_grad():
            scores = log_probabilities(self.trainer, TOKENS)
        assert scores is not None  # it has all stages
        return list(scores.tolist())

    def push(self) -> None:
        """Gives the executor the trainer's weights."""
        for name, parameter in self.trainer.named_parameters():
            self.executor.collective_rpc("update_weight", args=(name, parameter.detach()))

    def held(self, what: str) -> list[int]:
        """Bytes that each rank holds of it."""
        return [held[what] for held in self.executor.collective_rpc("held_bytes")]

    def answer(self) -> list[int | None]:
        """Six tokens, by way of the KV cache."""
        request = GenerationRequest(prompt=TOKENS, max_tokens=6, sampling=Sampling())
        return [event.token for event in Engine(self.executor, self.trainer.hparams).generate([request])]


@pytest.fixture(params=["tied", "untied"])
def hparams(request: pytest.FixtureRequest) -> Hparams:
    """With one table for both ends, or two."""
    return attrs.evolve(TINY, tied=request.param == "tied")


@pytest.fixture(
    params=["one", *(pytest.param(name, marks=pytest.mark.cuda_devices(int(name[2:]))) for name in ("tp3", "pp2"))]
)
def pair(request: pytest.FixtureRequest, hparams: Hparams, tmp_path: Path, device: str) -> Iterator[Pair]:
    """An executor of a tiny model, and a trainer whose weights are half as large."""
    file = read_gguf(write_tiny_gguf(tmp_path / "model.gguf", hparams))
    checkpoint = Checkpoint(file.path, file.tensors, torch.float32, torch.device("cpu"))
    trainer = Llama(hparams, checkpoint, Collectives(None), lambda done, total: None)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(0.5)
    options = ["--device", device, "--threads", "1", "--kv-blocks", "8", *LAYOUTS[request.param], "-"]
    with create_executor(executor_config(parse(options, ""), file, hparams)) as executor:
        yield Pair(executor, trainer)


def test_pushed_weights_are_used(pair: Pair) -> None:
    """Every part of every tensor arrives: the executor then scores as the trainer does, and did not before."""
    assert pair.trainers_scores() != pair.scores()
    pair.push()
    assert pair.trainers_scores() == pair.scores()


def test_sleep_of_level_2_drops_the_weights_too(pair: Pair) -> None:
    """Nothing is held; awake by tags the weights are the file's, until new ones are pushed, and only then comes the cache."""
    old, tokens, awake = pair.scores(), pair.answer(), (pair.held("weights"), pair.held("kv_cache"))
    pair.executor.sleep(level=2)
    nothing = [0] * pair.executor.world_size
    assert (nothing, nothing) == (pair.held("weights"), pair.held("kv_cache"))
    pair.executor.wake_up(["weights"])
    assert (awake[0], nothing) == (pair.held("weights"), pair.held("kv_cache"))
    assert old == pair.scores().expected
    pair.push()
    pair.executor.wake_up(["kv_cache"])
    assert awake == (pair.held("weights"), pair.held("kv_cache"))
    assert not pair.executor.is_sleeping
    assert pair.trainers_scores() == pair.scores()
    assert len(tokens) == len(pair.answer())


def test_sleep_of_level_1_keeps_what_was_pushed(pair: Pair) -> None:
    """The weights of before the sleep are those of after it, also where they were pushed and are not the file's."""
    pair.push()
    tokens = pair.answer()
    pair.executor.sleep()
    assert [0] * pair.executor.world_size == pair.held("kv_cache")
    pair.executor.wake_up()
    assert (pair.trainers_scores(), tokens) == (pair.scores(), pair.answer())


def push(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[str, tuple[str, torch.Tensor]]:
    """The call that pushes a tensor of that name."""
    return "update_weight", (name, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("sleep", (3,)), "level must be 1 (weights to the host) or 2 (weights dropped), not 3"),
        (("wake_up", (["weight"],)), "tags must be 'weights' or 'kv_cache', not ['weight']"),
        (push("head.bias", 96), "the model has no parameter 'head.bias'"),
        (push("layers.1.attention.q", 96, 96), "the model has no parameter 'layers.1.attention.q'"),
        (push("layers.4.mlp.down", 96, 192), "the model has no parameter 'layers.4.mlp.down'"),
        (push("layers.-1.mlp.down", 96, 192), "the model has no parameter 'layers.-1.mlp.down'"),
        (push("layers", 1), "the model has no parameter 'layers'"),
        (push("embedding.weight", 300, 96), "embedding.weight: expected shape (258, 96), the whole tensor's, got (300, 96)"),
        (push("layers.3.mlp.down", 96, 1), "layers.3.mlp.down: expected shape (96, 192), the whole tensor's, got (96, 1)"),
        (push("layers.0.attention.qkv", 191, 96), "layers.0.attention.qkv: expected shape (192, 96), the whole tensor's"),
        (push("head.norm.weight", 96, dtype=torch.int64), "head.norm.weight: expected a floating-point type, to convert"),
    ],
    ids=lambda value: str(value[1][0]) if isinstance(value, tuple) else "",
)  # fmt: skip
@pytest.mark.parametrize("hparams", ["tied"], indirect=True)
@pytest.mark.parametrize("pair", [pytest.param("pp2", marks=pytest.mark.cuda_devices(2))], indirect=True)
def test_what_does_not_fit_is_refused(pair: Pair, call: tuple[str, tuple[Any, ...]], words: str) -> None:
    """A level, tag, name, shape or type that cannot be: an error that names it, and what was expected; nothing has changed.

    The first stage says so, also where the last one has the parameter.
    """
    method, args = call
    before, tokens = pair.scores(), pair.answer()
    with pytest.raises((KeyError, ValueError)) as caught:
        pair.executor.collective_rpc(method, args=args, ranks=[0])
    assert words in caught.value.args[0]
    assert (before.expected, tokens) == (pair.scores(), pair.answer())


def test_other_floating_point_types_are_converted(pair: Pair) -> None:
    """A trainer may push bfloat16 into a float32 worker."""
    with torch.no_grad():
        for name, parameter in pair.trainer.named_parameters():
            rounded = parameter.to(torch.bfloat16)
            pair.executor.collective_rpc("update_weight", args=(name, rounded))
            parameter.copy_(rounded)
    assert pair.trainers_scores() == pair.scores()
