"""Answers questions with a Llama-family GGUF file, on one device or several.

python integration/generate.py "What is the capital of France?"
torchrun --nproc-per-node 2 integration/generate.py --backend torchrun "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

STARTED = time.monotonic()  # before the imports that take time
sys.path.insert(0, str(Path(__file__).parent))  # the program runs from anywhere, and workers get this path from it

from exec_core import BackendNotFoundError, ConfigError, DeviceError, ExecutorError, create_executor  # noqa: E402
from reference_llm.engine import Engine, Event, GenerationRequest  # noqa: E402
from reference_llm.errors import CheckpointError  # noqa: E402
from reference_llm.gguf_file import read_gguf  # noqa: E402
from reference_llm.hparams import Hparams  # noqa: E402
from reference_llm.options import default_model, executor_config, parse, prints, share_threads  # noqa: E402
from reference_llm.output import Answer, JsonOutput, Output, SilentOutput, Summary, TextOutput  # noqa: E402
from reference_llm.progress import ProgressBar  # noqa: E402
from reference_llm.steps import Sampling  # noqa: E402
from reference_llm.tokenizer import Tokenizer  # noqa: E402

FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # exit codes
RANK_0_S = 10.0  # for rank 0 of a launched job to say what all ranks have met


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
        0; 1 when something failed or a prompt was refused; 2 for bad input; 130 after Ctrl-C.
    """
    options = parse(argv, str(__doc__))
    try:
        if options.backend == "mp":
            warm_up()
        return run(options)
    except KeyboardInterrupt:
        return complain(options, "interrupted", INTERRUPTED)
    except (CheckpointError, ConfigError, DeviceError, BackendNotFoundError) as error:
        return complain(options, error, USAGE)
    except (ExecutorError, OSError) as error:
        return complain(options, error, FAILURE)


def complain(options: argparse.Namespace, why: object, code: int) -> int:
    """Says in one line why the program ends."""
    first_line, *_ = [*str(why).splitlines(), type(why).__name__]
    if not prints(options):
        # The launcher ends all ranks when the first one has failed: the one that prints comes first, if it fails too.
        time.sleep(RANK_0_S)
        first_line = f"rank {os.environ['RANK']}: {first_line}"
    print(f"generate: {first_line}", file=sys.stderr)
    return code


def warm_up() -> None:
    """Starts what the workers will be forked from, so that it imports torch while the model file is being read."""
    try:
        import exec_mp
    except ImportError:
        return  # create_executor says what to install
    exec_mp.prestart(preload=("torch",))


def run(options: argparse.Namespace) -> int:
    """Loads the model, answers, and sums up."""
    file = read_gguf(options.model or default_model())
    hparams = Hparams.from_gguf(file)
    config = executor_config(options, file, hparams)
    tokenizer = Tokenizer(file)
    prompts = read_prompts(options)
    requests = [
        GenerationRequest(
            prompt=tuple(tokenizer.encode_question(prompt)),
            max_tokens=options.max_tokens,
            sampling=Sampling(temperature=options.temperature, seed=options.seed),
            stop_tokens=tokenizer.stop_tokens,
        )
        for prompt in prompts
    ]
    share_threads(config)
    bar = ProgressBar(sys.stderr, 1 if options.backend == "torchrun" else config.parallel.world_size)
    with create_executor(config, on_progress=bar.update if prints(options) and not options.json else None) as executor:
        engine = Engine(executor, hparams)
        bar.close()
        output = open_output(options, prompts)
        started = time.monotonic()
        answers, first_token_s = answer_all(engine.generate(requests), prompts, tokenizer, output)
        seconds = time.monotonic() - started
    output.end(
        Summary(
            tokens=sum(len(answer.tokens) for answer in answers),
            seconds=seconds,
            first_token_s=first_token_s,
            backend=options.backend,
            tensor_parallel_size=config.parallel.tensor_parallel_size,
            pipeline_parallel_size=config.parallel.pipeline_parallel_size,
            driver_worker=config.parallel.driver_worker,
            kv_blocks=engine.num_blocks,
            block_size=config.cache.block_size,
        )
    )
    return FAILURE if any(answer.error for answer in answers) else 0


def open_output(options: argparse.Namespace, prompts: Sequence[str]) -> Output:
    """Where the answers go."""
    if not prints(options):
        return SilentOutput()
    return JsonOutput(sys.stdout) if options.json else TextOutput(sys.stdout, sys.stderr, prompts)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The question, or the lines of the file that are not blank."""
    if options.prompts is None:
        return [options.question]
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError("--prompts", "must be a text file in UTF-8", options.prompts) from error
    if not (prompts := [line for line in lines if line.strip()]):
        raise ConfigError("--prompts", "must be a file with a question on each line", options.prompts)
    return prompts


def answer_all(
    events: Iterable[Event], prompts: Sequence[str], tokenizer: Tokenizer, output: Output
) -> tuple[list[Answer], float | None]:
    """Turns events into text for ``output`` as they come.

    Returns:
        The answers, in the order in which they were complete, and the seconds from the program's start to the first
        token.
    """
    streams = [tokenizer.stream() for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    answers: list[Answer] = []
    first_token_s = None
    for event in events:
        index = event.index
        if event.token is not None:
            if first_token_s is None:
                first_token_s = time.monotonic() - STARTED
            tokens[index].append(event.token)
            output.add(index, streams[index].add(event.token))
        if event.finish is not None:
            answer = Answer(
                index=index,
                prompt=prompts[index],
                text=tokenizer.decode(tokens[index]),
                tokens=tokens[index],
                finish=event.finish,
                error=event.error,
            )
            answers.append(answer)
            output.finish(answer)
    return answers, first_token_s


if __name__ == "__main__":
    sys.exit(main())
