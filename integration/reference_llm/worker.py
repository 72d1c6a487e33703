"""The worker of one rank: holds its part of the model and of the KV cache, and computes steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from exec_core import Worker, WorkerContext
from reference_llm.checkpoint import Checkpoint
from reference_llm.collectives import Collectives
from reference_llm.gguf_file import TensorInfo
from reference_llm.hparams import Hparams
from reference_llm.kv_cache import PagedKVCache
from reference_llm.layout import lay_out
from reference_llm.memory import available_cuda_bytes, available_host_bytes
from reference_llm.model import Llama
from reference_llm.sampling import choose_tokens
from reference_llm.scoring import log_probabilities
from reference_llm.steps import Sampling, SequenceStep, StepRequest
from reference_llm.weights import update_weight

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LlamaWorker(Worker):
    """Runs a Llama-family GGUF file.

    Every rank gets the same `StepRequest`: the ranks of one stage compute it together, and stages hand hidden states
    on. Several steps may be in flight: each rank computes them in the order in which they were sent.

    Args:
        path: the file, at the same place for every rank.
        tensors: its table, from `read_gguf`.
        hparams: its sizes, from `Hparams.from_gguf`.
        dtype: of weights and computation.

    Raises:
        ConfigError: when the parallel sizes do not fit the model.
    """

    def __init__(
        self,
        context: WorkerContext,
        *,
        path: str,
        tensors: Mapping[str, TensorInfo],
        hparams: Hparams,
        dtype: str = "float32",
    ) -> None:
        super().__init__(context)
        hparams.check_parallel(context.tp_size, context.pp_size)
        self.hparams = hparams
        self.dtype = DTYPES[dtype]
        self._path = path
        self._tensors = tensors
        self._model: Llama | None = None
        self._cache: PagedKVCache | None = None
        self._num_blocks: int | None = None  # of the cache that the engine wants, also while it sleeps

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cpu" if self.context.device is None else self.context.device)

    def load_model(self) -> None:
        """Reads this rank's slice of the weights, telling how far it is."""
        checkpoint = Checkpoint(self._path, self._tensors, self.dtype, self.device)

        def loaded(done: int, total: int) -> None:
            self.context.report_progress(done, total, "weights")

        self._model = Llama(self.hparams, checkpoint, Collectives(self.context), loaded)

    def get_model(self) -> Llama:
        """This rank's part of the model.

        Raises:
            RuntimeError: before `load_model`.
        """
        if self._model is None:
            raise RuntimeError("the model is not loaded: call load_model() first")
        return self._model

    def determine_num_available_blocks(self) -> tuple[int, int]:
        """Blocks that fit on the device beside the model, and blocks that ``CacheConfig.cpu_swap_bytes`` would hold.

        On CUDA: ``gpu_memory_utilization`` of the device, less the peak of a run with the longest prompt. On CPU: that
        share of the memory that is available, divided by the number of ranks. ``CacheConfig.num_gpu_blocks`` and
        ``num_cpu_blocks`` override.
        """
        cache = self.context.config.cache
        gpu, cpu = cache.num_gpu_blocks, cache.num_cpu_blocks
        block_bytes = self._bytes_per_block()
        if gpu is None:
            gpu = max(0, self._available_bytes(cache.gpu_memory_utilization) // block_bytes)
        return gpu, cache.cpu_swap_bytes // block_bytes if cpu is None else cpu

    def _available_bytes(self, utilization: float) -> int:
        if self.device.type == "cpu":
            return int(available_host_bytes() * utilization) // self.context.world_size
        torch.cuda.reset_peak_memory_stats(self.device)
        profiled = self._run_longest_prompt() * self._bytes_per_block()
        torch.cuda.empty_cache()
        return available_cuda_bytes(self.device, utilization) + profiled

    def _run_longest_prompt(self) -> int:
        """A prompt as long as the model's context, which no step of the engine exceeds; returns the blocks it took."""
        length = self.hparams.context_length
        blocks = -(-length // self.context.config.cache.block_size)
        self.initialize_cache(blocks, 0)
        prompt = SequenceStep(tokens=(0,) * length, start=0, blocks=tuple(range(blocks)), sampling=Sampling())
        self.execute_model(StepRequest((prompt,)))
        torch.cuda.synchronize(self.device)
        self._cache = None
        return blocks

    def _bytes_per_block(self) -> int:
        return PagedKVCache.bytes_per_block(
            num_layers=len(self.get_model().layer_range),
            block_size=self.context.config.cache.block_size,
            num_kv_heads=self.hparams.num_kv_heads // self.context.tp_size,
            head_dim=self.hparams.head_dim,
            dtype=self.dtype,
        )

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:  # noqa: ARG002 # nothing is swapped
        """Allocates ``num_gpu_blocks`` on the device.

        Nothing is allocated for ``num_cpu_blocks``: the engine admits only what fits, and never swaps.
        """
        self._cache = PagedKVCache(
            layers=self.get_model().layer_range,
            num_blocks=num_gpu_blocks,
            block_size=self.context.config.cache.block_size,
            num_kv_heads=self.hparams.num_kv_heads // self.context.tp_size,
            head_dim=self.hparams.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        self._num_blocks = num_gpu_blocks

    def execute_model(self, request: StepRequest) -> list[int] | None:
        """Computes one step.

        Returns:
            On the last stage, the next token of each sequence; None before.

        Raises:
            RuntimeError: before `load_model` and `initialize_cache`.
        """
        model, cache = self.get_model(), self._cache
        if cache is None:
            raise RuntimeError("there is no KV cache: call initialize_cache() first")
        with torch.inference_mode():
            layout = lay_out(request, cache.block_size, self.dtype, self.device)
            logits = model(layout, cache)
            if logits is None:
                return None
            return choose_tokens(logits, model, request.sequences)

    def sleep(self, level: int = 1) -> None:
        """Frees the KV cache and the device's memory of the weights: level 1 keeps them on the host, level 2 drops them.

        Raises:
            ValueError: for another level.
        """
        if level not in {1, 2}:
            raise ValueError(f"level must be 1 (weights to the host) or 2 (weights dropped), not {level}")
        self._cache = None
        if level == 2:
            self._model = None
        elif self._model is not None:
            self._model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Brings the weights back, from the file if they were dropped, and allocates the KV cache, which is empty then.

        Whoever pushes new weights wakes up ``weights`` first and ``kv_cache`` after it: the two peaks do not add up.

        Raises:
            ValueError: for a tag that is neither.
        """
        if unknown := set(tags or ()) - {"weights", "kv_cache"}:
            raise ValueError(f"tags must be 'weights' or 'kv_cache', not {sorted(unknown)}")
        if tags is None or "weights" in tags:
            if self._model is None:
                self.load_model()
            else:
                self._model.to(self.device)
        if (tags is None or "kv_cache" in tags) and self._cache is None and self._num_blocks is not None:
            self.initialize_cache(self._num_blocks, 0)

    def update_weight(self, name: str, whole: torch.Tensor) -> None:
        """Takes this rank's part of a tensor of the whole model, in place; see `weights.update_weight`."""
        update_weight(self.get_model(), name, whole)

    def log_probabilities(self, tokens: Sequence[int]) -> list[float] | None:
        """The log-probability of each token after the first, on the last stage; None before."""
        with torch.inference_mode():
            scores = log_probabilities(self.get_model(), tokens)
        return None if scores is None else scores.tolist()

    def held_bytes(self) -> dict[str, int]:
        """Bytes of this rank's ``weights`` and ``kv_cache``; 0 for what is not there."""
        weights = 0 if self._model is None else sum(parameter.nbytes for parameter in self._model.parameters())
        return {"weights": weights, "kv_cache": 0 if self._cache is None else self._cache.nbytes}
