"""Reinforcement learning in a job that owns its processes: every rank trains, and samples with an executor.

torchrun --nproc-per-node 2 integration/rl_loop.py

    sample ─ sleep ─ policy-gradient step ─ wake weights ─ push, tensor by tensor ─ wake KV cache ─ sample again
    (executor: tensor parallel)  (trainer: data parallel, gradients summed in the same process group)

The reward of an answer is the share of its tokens in the lower half of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import attrs
import torch
import torch.distributed as dist

from exec_core import (
    CacheConfig,
    DeviceConfig,
    Executor,
    ExecutorConfig,
    ExecutorError,
    LogConfig,
    ParallelConfig,
    create_executor,
)
from reference_llm.checkpoint import Checkpoint
from reference_llm.collectives import Collectives
from reference_llm.engine import Engine, GenerationRequest
from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import GgufFile, read_gguf
from reference_llm.hparams import Hparams
from reference_llm.memory import peak_bytes, reset_peak
from reference_llm.model import Llama
from reference_llm.options import WORKER
from reference_llm.scoring import log_probabilities
from reference_llm.steps import Sampling
from tiny_gguf import TINY, write_tiny_gguf

# Large enough for a second copy of the weights to stand out in the memory of a process.
POLICY = attrs.evolve(TINY, hidden_size=256, intermediate_size=1024, num_heads=8, num_kv_heads=4, head_dim=32)
PROMPT = (7, 77, 177)
FIXED = (*PROMPT, *range(16))  # the sample whose log-probability tells whose weights the worker has
MIB = 1 << 20


@attrs.frozen(kw_only=True)
class Round:
    """What one rank saw in one round; log-probabilities are of the sequence `FIXED`, sizes in bytes.

    Attributes:
        reward_before, reward_after: mean over the same seeds, before and after the push.
        log_p_before, log_p_after: by the executor.
        log_p_trainer: by the trainer, whose weights were pushed.
        kv_awake, kv_asleep, kv_again: KV cache of this rank's worker, before, during and after its sleep.
        weights_trainer, weights_worker: of the whole model, and of this rank's part.
        peak_before, peak_growth: peak memory of this rank just before the push, and how much more the push took.
        answers: tokens of all samples before the push.
    """

    number: int
    reward_before: float
    reward_after: float
    log_p_before: float
    log_p_after: float
    log_p_trainer: float
    kv_awake: int
    kv_asleep: int
    kv_again: int
    weights_trainer: int
    weights_worker: int
    peak_before: int
    peak_growth: int
    answers: list[list[int]]


class Trainer:
    """The policy and its optimizer: the whole model on every rank, which share out the samples.

    Args:
        file, hparams: the weights to begin with.
    """

    def __init__(self, file: GgufFile, hparams: Hparams, device: torch.device, learning_rate: float) -> None:
        checkpoint = Checkpoint(file.path, file.tensors, torch.float32, device)
        self.model = Llama(hparams, checkpoint, Collectives(None), lambda _done, _total: None)
        self.model.requires_grad_(True)
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def log_p(self, tokens: Sequence[int]) -> torch.Tensor:
        """The log-probability of each token after the first."""
        scores = log_probabilities(self.model, tokens)
        assert scores is not None  # this model has all stages
        return scores

    def step(self, answers: Sequence[Sequence[int]], rewards: Sequence[float]) -> None:
        """One step of REINFORCE, with the mean reward as the baseline; this rank computes its share of the answers."""
        baseline = sum(rewards) / len(rewards)
        for index in range(dist.get_rank(), len(answers), dist.get_world_size()):
            scores = self.log_p([*PROMPT, *answers[index]])[len(PROMPT) - 1 :]
            loss = -(rewards[index] - baseline) * scores.sum() / len(answers)
            torch.autograd.backward(loss)
        for parameter in self.model.parameters():
            if parameter.grad is None:  # no sample was this rank's
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def push(self, executor: Executor) -> None:
        """Gives the executor's workers the weights: each copies its part of one tensor after the other, in place.

        The tensors are passed as they are, worker and trainer being one process. The guard compares them between ranks.
        """
        for name, parameter in self.model.named_parameters():
            executor.collective_rpc("update_weight", args=(name, parameter.detach()))


class Loop:
    """The rounds of one rank."""

    def __init__(self, executor: Executor, trainer: Trainer, options: argparse.Namespace) -> None:
        self.executor = executor
        self.trainer = trainer
        self.options = options
        self.engine = Engine(executor, trainer.model.hparams)

    def sample(self, number: int) -> list[list[int]]:
        """Answers of the policy as the workers have it; one round has its own seeds."""
        count = self.options.samples
        requests = [
            GenerationRequest(
                prompt=PROMPT,
                max_tokens=self.options.max_tokens,
                sampling=Sampling(temperature=1.0, seed=number * count + index),
            )
            for index in range(count)
        ]
        answers: list[list[int]] = [[] for _ in requests]
        for event in self.engine.generate(requests):
            if event.token is not None:
                answers[event.index].append(event.token)
        return answers

    def rewards(self, answers: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each answer, from 0 to 1."""
        half = self.trainer.model.hparams.vocab_size // 2
        return [sum(token < half for token in answer) / len(answer) for answer in answers]

    def log_p(self) -> float:
        """The log-probability of `FIXED` by the executor; the rank that knows it tells the others."""
        last = self.executor.output_rank
        (scores,) = self.executor.collective_rpc("log_probabilities", args=(FIXED,), reply_ranks=[last])
        return float(sum(scores))

    def held(self) -> dict[str, int]:
        """Bytes that this rank's worker holds."""
        (held,) = self.executor.collective_rpc("held_bytes")
        return dict(held)

    def run(self, number: int) -> Round:
        """One round."""
        device = self.trainer.model.device
        answers, log_p_before, awake = self.sample(number), self.log_p(), self.held()
        rewards = self.rewards(answers)
        self.executor.sleep()
        asleep = self.held()
        self.trainer.step(answers, rewards)
        self.executor.wake_up(["weights"])
        peak_before = reset_peak(device)
        self.trainer.push(self.executor)
        peak_growth = peak_bytes(device) - peak_before
        self.executor.wake_up(["kv_cache"])
        after = self.rewards(self.sample(number))
        with torch.no_grad():
            log_p_trainer = float(self.trainer.log_p(FIXED).sum())
        return Round(
            number=number,
            reward_before=sum(rewards) / len(rewards),
            reward_after=sum(after) / len(after),
            log_p_before=log_p_before,
            log_p_after=self.log_p(),
            log_p_trainer=log_p_trainer,
            kv_awake=awake["kv_cache"],
            kv_asleep=asleep["kv_cache"],
            kv_again=self.held()["kv_cache"],
            weights_trainer=self.trainer.nbytes,
            weights_worker=awake["weights"],
            peak_before=peak_before,
            peak_growth=peak_growth,
            answers=answers,
        )


def report(ranks: Sequence[Round], as_json: bool) -> None:
    """Prints a round, as rank 0 saw it unless the ranks are asked for."""
    if as_json:
        print(json.dumps([attrs.asdict(rank) for rank in ranks]), flush=True)
        return
    seen = ranks[0]
    print(
        f"round {seen.number}: mean reward {seen.reward_before:.3f} -> {seen.reward_after:.3f}"
        f"  log p of a fixed sample {seen.log_p_before:.3f} -> {seen.log_p_after:.3f}"
        f" (trainer {seen.log_p_trainer:.3f})"
        f"  KV {(seen.kv_awake - seen.kv_asleep) / MIB:.1f} of {seen.kv_awake / MIB:.1f} MiB freed"
        f"  peak {max(rank.peak_before for rank in ranks) / MIB:.1f} MiB,"
        f" push +{max(rank.peak_growth for rank in ranks) / MIB:.1f} MiB"
        f" (weights {seen.weights_trainer / MIB:.1f} MiB, {seen.weights_worker / MIB:.1f} MiB a worker)",
        flush=True,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="rl_loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="FILE.gguf", help="default: a small model with random weights")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--samples", type=int, default=8, help="answers in each round; default: 8")
    add("--max-tokens", type=int, default=12, help="length of an answer; default: 12")
    add("--learning-rate", type=float, default=0.003, help="default: 0.003")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N", help="the rest is tensor parallel; default: 1")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", action="store_true", help="print a list for each round, with an object for each rank")
    return parser.parse_args(argv)


def train(options: argparse.Namespace, path: str) -> None:
    """All rounds, in the process group that exists."""
    file = read_gguf(path)
    hparams = Hparams.from_gguf(file)
    device = torch.device(options.device, *([torch.cuda.current_device()] if options.device == "cuda" else []))
    trainer = Trainer(file, hparams, device, options.learning_rate)
    pipeline = options.pipeline_parallel_size
    config = ExecutorConfig(
        worker_cls=WORKER,
        worker_kwargs={"path": file.path, "tensors": file.tensors, "hparams": hparams},
        backend="torchrun",
        parallel=ParallelConfig(
            tensor_parallel_size=dist.get_world_size() // pipeline, pipeline_parallel_size=pipeline
        ),
        device=DeviceConfig(device=options.device),
        cache=CacheConfig(num_gpu_blocks=64),
        log=LogConfig(level="error"),
    )
    with create_executor(config) as executor:
        loop = Loop(executor, trainer, options)
        for number in range(options.rounds):
            ranks: list[Round | None] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, loop.run(number))
            if dist.get_rank() == 0:
                report([rank for rank in ranks if rank is not None], options.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program: 0, 1 when something failed, 2 for bad input."""
    options = parse(argv)
    if "RANK" not in os.environ:
        print("rl_loop: start it with: torchrun --nproc-per-node 2 integration/rl_loop.py", file=sys.stderr)
        return 2
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    try:
        with tempfile.TemporaryDirectory() as directory:
            train(options, options.model or write_tiny_gguf(Path(directory) / "policy.gguf", POLICY))
    except (ExecutorError, CheckpointError) as error:
        print(f"rl_loop: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


def leave(code: int) -> NoReturn:
    """Ends this process, but not the interpreter: a thread that gloo still has, holding a tensor, would abort its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
