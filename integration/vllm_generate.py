"""Answers questions with vLLM's engine on exec-mp, or on vLLM's own executor to compare with.

python integration/vllm_generate.py "What is the capital of France?"
python integration/vllm_generate.py --executor mp --tensor-parallel-size 3 --json "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the engine's process and the workers get this path from it

from reference_llm.gguf_file import read_gguf
from reference_llm.options import default_model
from reference_llm.tokenizer import Tokenizer

EXECUTORS = ("exec-mp", "mp")
# vLLM computes on CPU as it would in its own tests: nothing is compiled, and threads are not bound to NUMA nodes, of
# which it would want one for each rank.
SETTINGS = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    options = _parse(argv)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    tokenizer = Tokenizer(read_gguf(default_model()))
    prompts = [tokenizer.encode_question(question) for question in options.questions]
    with tempfile.TemporaryDirectory(prefix="vllm-generate-") as directory:
        started = time.monotonic()
        llm = load(options.model or write_checkpoint(directory), options)
        ready_s = time.monotonic() - started
        print("ready", file=sys.stderr, flush=True)
        answers, seconds = generate(llm, prompts, options.max_tokens, tokenizer.stop_tokens)
        llm.llm_engine.engine_core.shutdown()
    texts = [tokenizer.decode(answer) for answer in answers]
    if options.json:
        print(json.dumps({"tokens": answers, "texts": texts, "ready_s": ready_s, "seconds": seconds}))
    else:
        print("\n\n".join(texts))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm_generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("questions", nargs="+", metavar="QUESTION")
    add("--executor", choices=EXECUTORS, default="exec-mp", help="default: exec-mp")
    add("--model", metavar="DIRECTORY", help="as transformers saves it; default: SmolLM2-135M-Instruct, converted")
    add("--tensor-parallel-size", type=int, default=1, metavar="N")
    add("--pipeline-parallel-size", type=int, default=1, metavar="N")
    add("--max-tokens", type=int, default=64, metavar="N", help="length of an answer at most; default: 64")
    add("--json", action="store_true", help="print one JSON object, with token ids and seconds")
    return parser.parse_args(argv)


def write_checkpoint(directory: str) -> str:
    """SmolLM2-135M-Instruct in the format that vLLM reads."""
    from oracle import Oracle

    Oracle(default_model()).model.save_pretrained(directory)
    return directory


def load(model: str, options: argparse.Namespace) -> Any:
    """The engine, ready."""
    from vllm import LLM

    from vllm_backend.executor import ExecMpExecutor

    return LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=256 << 20,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        distributed_executor_backend=ExecMpExecutor if options.executor == "exec-mp" else options.executor,
        enforce_eager=True,
    )


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int, stop_tokens: Collection[int]
) -> tuple[list[list[int]], float]:
    """Greedy answers as token ids, all prompts in one batch, and how many seconds they took."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, stop_token_ids=list(stop_tokens), detokenize=False
    )
    started = time.monotonic()
    llm.enqueue([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    outputs = llm.llm_engine.step()
    print("generating", file=sys.stderr, flush=True)
    outputs += llm.wait_for_completion(use_tqdm=False)
    seconds = time.monotonic() - started
    outputs.sort(key=lambda output: int(output.request_id))  # which are in the order of the prompts
    return [list(output.outputs[0].token_ids) for output in outputs], seconds


if __name__ == "__main__":
    main()
