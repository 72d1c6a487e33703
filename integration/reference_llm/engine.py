"""A small engine: turns requests into steps for an executor, and the steps' tokens into events.

    requests ─ admit ─ lanes ─ StepRequest ─> executor ─ tokens ─ events
               (KV blocks)  (one for each pipeline stage, all in flight)

The running sequences are split into as many lanes as there are pipeline stages. A lane's next step needs the tokens of
its last one, but not those of the others: while one lane is in the first stage another is in the second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import attrs

from exec_core import ConfigError, Executor
from reference_llm.hparams import Hparams
from reference_llm.steps import Sampling, SequenceStep, StepRequest


@attrs.frozen(kw_only=True)
class GenerationRequest:
    """What to continue, and how far.

    Attributes:
        prompt: token ids.
        max_tokens: length of the answer in tokens, at most; less where the context or the KV cache ends.
        sampling: how to choose tokens.
        stop_tokens: ids that end the answer; the one that did is not part of it.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened to one request: a token, the end, or both.

    Attributes:
        index: of the request.
        token: the next token of its answer, or None.
        finish: why it is over, or None while it goes on: a stop token, the allowed length, or refused before it began.
        error: why it was refused, for a person.
    """

    index: int
    token: int | None = None
    finish: Literal["stop", "length", "refused"] | None = None
    error: str | None = None


class _Running:
    """An admitted request."""

    def __init__(self, index: int, request: GenerationRequest, blocks: tuple[int, ...], max_tokens: int) -> None:
        self.index = index
        self.request = request
        self.blocks = blocks
        self.max_tokens = max_tokens
        self.next_tokens = request.prompt
        self.computed = 0  # tokens that are in the KV cache
        self.generated = 0

    def step(self) -> SequenceStep:
        return SequenceStep(
            tokens=self.next_tokens, start=self.computed, blocks=self.blocks, sampling=self.request.sampling
        )

    def advance(self, token: int) -> Event:
        self.computed += len(self.next_tokens)
        self.next_tokens = (token,)
        if token in self.request.stop_tokens:
            return Event(index=self.index, finish="stop")
        self.generated += 1
        return Event(index=self.index, token=token, finish="length" if self.generated == self.max_tokens else None)


class Engine:
    """Generates with an executor of `LlamaWorker`s, which is ready. It sizes and allocates the KV cache.

    Attributes:
        num_blocks: blocks of the KV cache of each rank.

    Raises:
        ConfigError: when not even one block fits into memory.
    """

    def __init__(self, executor: Executor, hparams: Hparams) -> None:
        self._executor = executor
        self._hparams = hparams
        self._block_size = executor.config.cache.block_size
        gpu, cpu = executor.determine_num_available_blocks()
        if gpu < 1:
            remedy = "raise CacheConfig.gpu_memory_utilization, or use more ranks or a smaller model"
            raise ConfigError("KV cache", "must have room for at least one block beside the model", gpu, remedy)
        executor.initialize_cache(gpu, cpu)
        self.num_blocks = gpu

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Event]:
        """Answers ``requests`` together and yields what happens, as it happens.

        A request waits while too few blocks are free for its longest answer. One that can never fit is refused; the
        others go on. Abandoning the iterator is fine: on every rank the steps under way come before the next ones, so
        that what they still write into the cache is written over.

        Raises:
            Exception: what the executor raises when a step fails.
        """
        return _Generation(self._executor, self._hparams, self._block_size, self.num_blocks).run(requests)


class _Generation:
    """The state of one `Engine.generate`."""

    def __init__(self, executor: Executor, hparams: Hparams, block_size: int, num_blocks: int) -> None:
        self.executor = executor
        self.context_length = hparams.context_length
        self.block_size = block_size
        self.capacity = num_blocks * block_size
        self.free = list(reversed(range(num_blocks)))
        self.waiting: deque[tuple[int, GenerationRequest]] = deque()
        self.lanes: list[list[_Running]] = [[] for _ in range(executor.config.parallel.pipeline_parallel_size)]
        self.idle = set(range(len(self.lanes)))
        self.in_flight: deque[tuple[int, Callable[[], list[int]]]] = deque()  # steps in order, and what waits for each

    def run(self, requests: Sequence[GenerationRequest]) -> Iterator[Event]:
        for index, request in enumerate(requests):
            error = self.refusal(request)
            if error is None:
                self.waiting.append((index, request))
            else:
                yield Event(index=index, finish="refused", error=error)
        self.advance_lanes()
        while self.in_flight:
            lane, wait = self.in_flight.popleft()
            tokens = wait()
            running = self.lanes[lane]
            events = [sequence.advance(token) for sequence, token in zip(running, tokens, strict=True)]
            self.lanes[lane] = [s for s, event in zip(running, events, strict=True) if event.finish is None]
            for sequence, event in zip(running, events, strict=True):
                if event.finish is not None:
                    self.free.extend(reversed(sequence.blocks))
            self.idle.add(lane)
            self.advance_lanes()
            yield from events

    def refusal(self, request: GenerationRequest) -> str | None:
        """Why ``request`` can never run, or None."""
        length = len(request.prompt)
        if not length:
            return "the prompt is empty; ask something"
        for what, limit in (("the model's context", self.context_length), ("the KV cache", self.capacity)):
            if length >= limit:
                return f"the prompt has {length} tokens, {what} holds {limit}, answer included; shorten the prompt"
        return None

    def advance_lanes(self) -> None:
        """Admits what fits and sends a step for each lane that has sequences and none under way."""
        self.admit()
        for lane in sorted(self.idle, key=lambda lane: len(self.lanes[lane]), reverse=True):
            if self.lanes[lane]:
                self.in_flight.append((lane, self.send(StepRequest(tuple(s.step() for s in self.lanes[lane])))))
                self.idle.discard(lane)

    def send(self, step: StepRequest) -> Callable[[], list[int]]:
        """Starts ``step`` and returns what waits for its tokens."""
        if len(self.lanes) == 1:  # nothing to overlap with: a blocking call saves a change of threads
            return partial(self.executor.execute_model, step)
        return self.executor.execute_model(step, non_block=True).result

    def admit(self) -> None:
        """Moves waiting requests, oldest first, into the shortest idle lanes while there are blocks for them."""
        while self.waiting and self.idle:
            index, request = self.waiting[0]
            length = len(request.prompt)
            longest = min(length + request.max_tokens, self.context_length, self.capacity)
            count = -(-longest // self.block_size)
            lane = min((self.lanes[number] for number in self.idle), key=len)
            # A step computes no more tokens than the context has: memory was profiled with that many.
            if count > len(self.free) or length + sum(len(s.next_tokens) for s in lane) > self.context_length:
                return
            self.waiting.popleft()
            blocks = tuple(self.free.pop() for _ in range(count))
            lane.append(_Running(index, request, blocks, longest - length))
