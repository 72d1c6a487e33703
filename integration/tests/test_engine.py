"""The engine admits what fits, refuses what never will, and keeps every pipeline stage busy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

from exec_core import CacheConfig, ConfigError, Executor, ExecutorConfig, ParallelConfig, WorkerContext, create_executor
from oracle import Oracle
from reference_llm.checkpoint import Checkpoint
from reference_llm.collectives import Collectives
from reference_llm.engine import Engine, GenerationRequest
from reference_llm.gguf_file import read_gguf
from reference_llm.hparams import ROPE_FACTORS, Hparams
from reference_llm.model import Llama
from reference_llm.options import executor_config, parse
from reference_llm.steps import Sampling, StepRequest
from tiny_gguf import TINY, write_tiny_gguf

PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 30, 1, 17, 16, 48)]
UNIPROC = ("--backend", "uniproc")


def request(prompt: tuple[int, ...], max_tokens: int = 20, stop: int | None = None) -> GenerationRequest:
    """A greedy request."""
    stops = frozenset() if stop is None else frozenset({stop})
    return GenerationRequest(prompt=prompt, max_tokens=max_tokens, sampling=Sampling(), stop_tokens=stops)


@pytest.mark.parametrize(
    ("hparams", "kind"),
    [
        pytest.param(TINY, Kind.Q8_0, id="grouped heads, tied"),
        pytest.param(attrs.evolve(TINY, tied=False), Kind.F16, id="output projection of its own"),
        pytest.param(attrs.evolve(TINY, num_kv_heads=6), Kind.BF16, id="as many KV heads as heads"),
        pytest.param(attrs.evolve(TINY, num_kv_heads=1, num_layers=1), Kind.Q4_1, id="one KV head, one layer"),
    ],
)
def test_tokens_are_those_of_transformers(
    hparams: Hparams, kind: Kind, tmp_path: Path, device: str, answer: Callable[..., Any]
) -> None:
    """For models of other shapes, six prompts of one to three blocks in one batch."""
    path = write_tiny_gguf(tmp_path / "model.gguf", hparams, kind=kind)
    expected = Oracle(path, device).continue_greedily(PROMPTS, 20)
    assert expected == [outcome.tokens for outcome in answer(path, UNIPROC, [request(p) for p in PROMPTS])]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_compute(dtype: str, tiny_model: str, answer: Callable[..., Any]) -> None:
    """Most first tokens are those of float32: rounding changes the close calls only."""
    requests = [request((start, start + 1), max_tokens=1) for start in range(0, 200, 10)]
    exact = answer(tiny_model, UNIPROC, requests)
    rounded = answer(tiny_model, (*UNIPROC, "--dtype", dtype), requests)
    assert sum(one == other for one, other in zip(exact, rounded, strict=True)) > 15


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """As Llama 3.1 files have them."""
    hparams = attrs.evolve(TINY, rope_factors=True)
    file = read_gguf(write_tiny_gguf(tmp_path / "model.gguf", hparams))
    checkpoint = Checkpoint(file.path, file.tensors, torch.float32, torch.device("cpu"))
    alone = SimpleNamespace(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, groups=None)
    collectives = Collectives(cast("WorkerContext", alone))
    model = Llama(Hparams.from_gguf(file), checkpoint, collectives, lambda done, total: None)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / checkpoint.vector(ROPE_FACTORS), model.frequencies)


def test_requests_wait_for_blocks_and_get_the_same_tokens(tiny_model: str, answer: Callable[..., Any]) -> None:
    """With room for one or two at a time, and with room for all."""
    requests = [request(prompt) for prompt in PROMPTS]
    assert answer(tiny_model, UNIPROC, requests) == answer(tiny_model, (*UNIPROC, "--kv-blocks", "5"), requests)


def test_a_prompt_that_never_fits_is_refused_and_the_others_finish(tiny_model: str, answer: Callable[..., Any]) -> None:
    """Longer than the KV cache, longer than the context, or empty: each says which."""
    prompts = [(1,) * 64, PROMPTS[0], (1,) * 96, PROMPTS[1], ()]
    outcomes = answer(tiny_model, (*UNIPROC, "--kv-blocks", "4"), [request(prompt) for prompt in prompts])
    assert ["refused", "length", "refused", "length", "refused"] == [outcome.finish for outcome in outcomes]
    assert [0, 20, 0, 20, 0] == [len(outcome.tokens) for outcome in outcomes]
    assert "has 64 tokens, the KV cache holds 64" in outcomes[0].error
    assert "has 96 tokens, the model's context holds 96" in outcomes[2].error
    assert "is empty" in outcomes[4].error


def test_an_answer_ends_where_the_context_ends(tiny_model: str, answer: Callable[..., Any]) -> None:
    """It is shorter than asked for, and the last token is still computed."""
    (outcome,) = answer(tiny_model, UNIPROC, [request((1,) * 90, max_tokens=20)])
    assert (6, "length") == (len(outcome.tokens), outcome.finish)


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(tiny_model: str, answer: Callable[..., Any]) -> None:
    """The other sequences of the batch go on."""
    free, other = answer(tiny_model, UNIPROC, [request(PROMPTS[0]), request(PROMPTS[1])])
    stop = free.tokens[7]
    stopped, same = answer(tiny_model, UNIPROC, [request(PROMPTS[0], stop=stop), request(PROMPTS[1])])
    assert ("stop", free.tokens[: free.tokens.index(stop)]) == (stopped.finish, stopped.tokens)
    assert other == same


@pytest.mark.cuda_devices(2)
def test_an_abandoned_generation_does_not_disturb_the_next(tiny_model: str, device: str) -> None:
    """Steps that are still under way finish first, and their blocks are written over."""
    file = read_gguf(tiny_model)
    hparams = Hparams.from_gguf(file)
    layout = ("--pipeline-parallel-size", "2", "--device", device, "-")
    with create_executor(executor_config(parse(layout, ""), file, hparams)) as executor:
        engine = Engine(executor, hparams)
        requests = [request(prompt) for prompt in PROMPTS]
        expected = list(engine.generate(requests))
        abandoned = engine.generate([request((9,) * 40, max_tokens=50)] * 4)
        for _ in range(6):
            next(abandoned)
        assert expected == list(engine.generate(requests))


def test_no_room_for_a_block_is_a_config_error(tiny_model: str, answer: Callable[..., Any]) -> None:
    """It says what to change."""
    with pytest.raises(ConfigError, match=r"must have room for at least one block.*gpu_memory_utilization"):
        answer(tiny_model, (*UNIPROC, "--kv-blocks", "0"), [request(PROMPTS[0])])


class RecordingExecutor:
    """Answers each step with zeros when it is waited for, and remembers what was sent."""

    def __init__(self, stages: int) -> None:
        parallel = ParallelConfig(pipeline_parallel_size=stages)
        self.config = ExecutorConfig(worker_cls="a:B", parallel=parallel, cache=CacheConfig(num_gpu_blocks=100))
        self.steps: list[StepRequest] = []
        self.under_way = 0
        self.most_under_way = 0

    def determine_num_available_blocks(self) -> tuple[int, int]:
        return 100, 0

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        pass

    def execute_model(self, step: StepRequest, non_block: bool = False) -> Any:
        self.steps.append(step)
        if not non_block:
            return [0] * len(step.sequences)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        recorder = self

        class Step(Future[list[int]]):
            def result(self, timeout: float | None = None) -> list[int]:
                recorder.under_way -= 1
                return [0] * len(step.sequences)

        return Step()


@pytest.mark.parametrize("stages", [2, 3])
def test_as_many_steps_are_in_flight_as_there_are_stages(stages: int) -> None:
    """Each with its share of the sequences, and none with the same one."""
    executor = RecordingExecutor(stages)
    requests = [request(prompt) for prompt in PROMPTS]
    events = list(Engine(cast("Executor", executor), TINY).generate(requests))
    assert stages == executor.most_under_way
    assert [len(PROMPTS) // stages] * stages == [len(step.sequences) for step in executor.steps[:stages]]
    assert [20] * len(PROMPTS) == [sum(e.index == i for e in events) for i in range(len(PROMPTS))]


def test_one_stage_is_called_without_futures() -> None:
    """There is nothing to overlap with."""
    executor = RecordingExecutor(1)
    list(Engine(cast("Executor", executor), TINY).generate([request(PROMPTS[0], max_tokens=3)]))
    assert (3, 0) == (len(executor.steps), executor.most_under_way)


def test_a_step_never_computes_more_prompt_tokens_than_the_context_has() -> None:
    """That is what the memory was profiled with."""
    executor = RecordingExecutor(1)
    list(Engine(cast("Executor", executor), TINY).generate([request((1,) * 60, max_tokens=3)] * 3))
    assert max(step.num_tokens for step in executor.steps) <= TINY.context_length
