"""What the program prints: text as it comes for a person, or one JSON object a line for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

import attrs


@attrs.frozen(kw_only=True)
class Answer:
    """One prompt's outcome.

    Attributes:
        text, tokens: the answer and its ids, without the stop token.
        finish: ``stop``, ``length`` or ``refused``.
        error: why it was refused, or None.
    """

    index: int
    prompt: str
    text: str
    tokens: list[int]
    finish: str
    error: str | None


@attrs.frozen(kw_only=True)
class Summary:
    """One run.

    Attributes:
        tokens: generated, of all prompts.
        seconds: from the first step to the last token, in seconds; loading is not in it.
        first_token_s: from the program's start to the first token, in seconds; None without a token.
        ranks: worker processes, or 1 in the program's own.
        kv_blocks, block_size: blocks of each rank's KV cache, and tokens in each.
    """

    tokens: int
    seconds: float
    first_token_s: float | None
    backend: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    driver_worker: str
    kv_blocks: int
    block_size: int

    @property
    def ranks(self) -> int:
        """Workers."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, of all prompts together."""
        return self.tokens / self.seconds

    def __str__(self) -> str:
        ranks = f"{self.ranks} ranks (TP {self.tensor_parallel_size} x PP {self.pipeline_parallel_size})"
        first = "" if self.first_token_s is None else f", first token {self.first_token_s:.1f} s after start"
        return (
            f"{self.tokens} tokens, {self.tokens_per_s:.1f} tokens/s{first}; backend {self.backend}, {ranks}, "
            f"{self.kv_blocks} KV blocks of {self.block_size} tokens"
        )


class Output(Protocol):
    """Takes what happens in the order in which it happens."""

    def add(self, index: int, text: str) -> None:
        """The answer to prompt ``index`` goes on with ``text``."""

    def finish(self, answer: Answer) -> None:
        """A prompt is done with."""

    def end(self, summary: Summary) -> None:
        """All are."""


class TextOutput:
    """Answers on ``stdout``, as they come; refusals and the summary on ``stderr``.

    Of several answers the first that is unfinished is streamed, and what comes for the others waits for its turn.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO, prompts: Sequence[str]) -> None:
        self._stdout, self._stderr = stdout, stderr
        self._prompts = prompts
        self._pending = [""] * len(prompts)
        self._finished = [False] * len(prompts)
        self._current = 0
        self._open()

    def add(self, index: int, text: str) -> None:
        """See `Output`."""
        if index == self._current:
            self._print(text)
        else:
            self._pending[index] += text

    def finish(self, answer: Answer) -> None:
        """See `Output`."""
        if answer.error is not None:
            print(f"generate: prompt {answer.index + 1}: {answer.error}", file=self._stderr, flush=True)
        self._finished[answer.index] = True
        while self._current < len(self._prompts) and self._finished[self._current]:
            self._print("\n")
            self._current += 1
            self._open()

    def end(self, summary: Summary) -> None:
        """See `Output`."""
        print(summary, file=self._stderr, flush=True)

    def _open(self) -> None:
        """Starts with the current prompt: its heading, where there are several, and what came before its turn."""
        if self._current < len(self._prompts):
            heading = f"> {self._prompts[self._current]}\n" if len(self._prompts) > 1 else ""
            self._print(heading + self._pending[self._current])

    def _print(self, text: str) -> None:
        print(text, end="", file=self._stdout, flush=True)


class SilentOutput:
    """Nothing: for the ranks of a launched job that leave printing to rank 0."""

    def add(self, index: int, text: str) -> None:
        """See `Output`."""

    def finish(self, answer: Answer) -> None:
        """See `Output`."""

    def end(self, summary: Summary) -> None:
        """See `Output`."""


class JsonOutput:
    """One object a line on ``stdout``: each answer when it is complete, then the summary."""

    def __init__(self, stdout: TextIO) -> None:
        self._stdout = stdout

    def add(self, index: int, text: str) -> None:
        """An answer is printed when it is complete."""

    def finish(self, answer: Answer) -> None:
        """See `Output`."""
        self._print(attrs.asdict(answer))

    def end(self, summary: Summary) -> None:
        """See `Output`."""
        derived = {"tokens_per_s": summary.tokens_per_s, "ranks": summary.ranks}
        self._print({"summary": attrs.asdict(summary) | derived})

    def _print(self, record: dict[str, Any]) -> None:
        print(json.dumps(record, ensure_ascii=False), file=self._stdout, flush=True)
