"""Measures tokens per second of the executors against each other and against transformers' generate, greedy decoding.

All cases stay loaded and take turns in each round. Ratios compare the best rounds: whatever else the machine does can
only make a round slower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from exec_core import create_executor
from reference_llm.engine import Engine, GenerationRequest
from reference_llm.gguf_file import GgufFile, read_gguf
from reference_llm.hparams import Hparams
from reference_llm.options import default_model, executor_config, parse, share_threads
from reference_llm.steps import Sampling
from reference_llm.tokenizer import Tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea and the moon.",
    "List three fruits.",
    "Explain in two sentences why the sky is blue, please, for a child of seven years.",
)
CASES = {
    "uniproc": ("--backend", "uniproc"),
    "mp": ("--tensor-parallel-size", "1"),
    "mp-inline": ("--tensor-parallel-size", "1", "--driver-worker", "inline"),
    "mp-pp2": ("--pipeline-parallel-size", "2"),
    "mp-tp3": ("--tensor-parallel-size", "3"),
}
TRANSFORMERS = "transformers"
Generate = Callable[[Sequence[Sequence[int]], int], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints a table."""
    options = _parse(argv)
    file = read_gguf(options.model or default_model())
    tokenizer = Tokenizer(file)
    prompts = [tokenizer.encode_question(question) for question in QUESTIONS]
    batches = [prompts[:size] for size in options.batch_sizes]
    speeds: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        cases = {name: _start(name, options, file, stack) for name in options.cases}
        for generate in cases.values():
            generate(prompts, 2)  # first steps take longer
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for batch in batches:
                for name, generate in cases.items():
                    started = time.perf_counter()
                    generate(batch, options.max_tokens)
                    seconds = time.perf_counter() - started
                    speeds.setdefault((name, len(batch)), []).append(len(batch) * options.max_tokens / seconds)
    _print_table(options, speeds)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_generate", description=__doc__)
    names = (*CASES, TRANSFORMERS)
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--batch-sizes", type=int, nargs="+", choices=range(1, 5), default=(4, 1), help="default: 4 1")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="for each prompt; default: 64")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="of each case; default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--model", metavar="FILE.gguf", help="default: SmolLM2-135M-Instruct")
    return parser.parse_args(argv)


def _start(name: str, options: argparse.Namespace, file: GgufFile, stack: ExitStack) -> Generate:
    """Loads what ``name`` stands for, and returns what generates with it."""
    print(f"loading {name}", file=sys.stderr, flush=True)
    if name == TRANSFORMERS:
        import torch

        from oracle import Oracle

        oracle = Oracle(file.path, options.device)

        def generate(prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
            torch.set_num_threads(options.threads)
            oracle.continue_greedily(prompts, max_tokens)

        return generate
    arguments = parse([*CASES[name], "--device", options.device, "--kv-blocks", "256", "-"], "")
    hparams = Hparams.from_gguf(file)
    arguments.threads = max(1, options.threads // executor_config(arguments, file, hparams).parallel.world_size)
    config = executor_config(arguments, file, hparams)
    engine = Engine(stack.enter_context(create_executor(config)), hparams)

    def generate_with_engine(prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        share_threads(config)
        requests = [
            GenerationRequest(prompt=tuple(prompt), max_tokens=max_tokens, sampling=Sampling()) for prompt in prompts
        ]
        for _ in engine.generate(requests):
            pass

    return generate_with_engine


def _print_table(options: argparse.Namespace, speeds: dict[tuple[str, int], list[float]]) -> None:
    best = {key: max(values) for key, values in speeds.items()}
    print(f"tokens/s of {options.rounds} rounds, {options.threads} threads, float32, {options.device}")
    for size in options.batch_sizes:
        print(f"\n{size} prompts" if size > 1 else "\n1 prompt")
        print(f"{'':14}{'best':>8}{'median':>8}{'worst':>8}{'x uniproc':>12}{'x transformers':>16}")
        for name in options.cases:
            values = speeds[name, size]
            ratios = [best.get((base, size)) for base in ("uniproc", TRANSFORMERS)]
            shown = ["-" if base is None else f"{best[name, size] / base:.2f}" for base in ratios]
            numbers = f"{best[name, size]:8.1f}{statistics.median(values):8.1f}{min(values):8.1f}"
            print(f"{name:14}{numbers}{shown[0]:>12}{shown[1]:>16}")


if __name__ == "__main__":
    main()
