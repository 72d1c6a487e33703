"""The program, run as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "generate.py"
QUESTION = "What is the capital of France?"


@contextmanager
def start(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The running program, with pipes for its output; killed if the test leaves it running."""
    command = [sys.executable, str(PROGRAM), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(*arguments: str) -> tuple[str, str]:
    """What the program prints on stdout and stderr; it must end with 0."""
    with start(*arguments) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


def run_json(*arguments: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answers and the summary that the program prints with --json."""
    out, err = run("--json", *arguments)
    assert not err
    *answers, summary = map(json.loads, out.splitlines())
    return sorted(answers, key=lambda answer: answer["index"]), summary["summary"]


def test_the_default_layout_answers_with_progress_and_a_summary(device: str) -> None:
    """The answer on stdout; how loading went on all ranks, and one line that sums up, on stderr."""
    out, err = run(QUESTION)
    assert "Paris" in out
    *progress, summary = err.splitlines()
    assert "weights 100% loaded on" in progress[-1]
    assert "tokens/s" in summary
    assert "KV blocks" in summary
    if device == "cpu":
        assert "backend mp, 2 ranks (TP 1 x PP 2)" in summary


@pytest.mark.parametrize("options", [("--backend", "uniproc"), ("--driver-worker", "inline")])
def test_other_backends_answer_too(options: tuple[str, ...]) -> None:
    """Through the same options."""
    assert "Paris" in run(*options, "--threads", "1", QUESTION)[0]


def test_json_has_an_object_for_each_prompt_and_a_summary(tmp_path: Path) -> None:
    """With --json there is one object for each prompt, in order, and one that sums up."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{QUESTION}\n\nList three fruits.\n")
    answers, summary = run_json("--prompts", str(prompts), "--max-tokens", "12", "--threads", "1")
    assert [QUESTION, "List three fruits."] == [answer["prompt"] for answer in answers]
    assert "Paris" in answers[0]["text"]
    assert summary["tokens"] == sum(len(answer["tokens"]) for answer in answers)
    assert summary["tokens_per_s"] > 0
    assert summary["kv_blocks"] > 0
    assert 0 < summary["first_token_s"]  # how short it is, bench_generate.py says


def test_seeded_sampling_repeats_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    """The same seed gives the same text, alone and beside another prompt; another seed gives another."""
    options = ("--temperature", "1.0", "--max-tokens", "12", "--threads", "1")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{QUESTION}\nTell me a story.\n")
    together = run_json(*options, "--seed", "7", "--prompts", str(prompts))[0]
    alone = run_json(*options, "--seed", "7", "Tell me a story.")[0]
    other = run_json(*options, "--seed", "8", "Tell me a story.")[0]
    assert together[1]["tokens"] == alone[0]["tokens"]
    assert other[0]["tokens"] != alone[0]["tokens"]


def test_tokens_come_as_they_are_made() -> None:
    """Not all at the end: many pieces, the first while the program is still at work."""
    pieces = []
    with start("--threads", "1", "--max-tokens", "40", "Tell me a story.") as process:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            pieces.append(piece)
            if len(pieces) == 1:
                assert process.poll() is None
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(pieces) > 10


def test_several_answers_come_in_order(tmp_path: Path) -> None:
    """Each under its question, none mixed into another."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"Tell me a story.\n{QUESTION}\n")
    out, _ = run("--threads", "1", "--max-tokens", "12", "--prompts", str(prompts))
    story, capital = out.split(f"> {QUESTION}\n")
    assert story.startswith("> Tell me a story.\n")
    assert story.endswith("\n")
    assert capital == "The capital of France is Paris.\n"


def test_ctrl_c_ends_with_one_line() -> None:
    """While tokens come: code 130, no traceback, no worker left."""
    with start("--threads", "1", "--max-tokens", "4000", "Tell me a long story.") as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 1)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "generate: interrupted"
    assert "Traceback" not in err.decode()


def test_logs_are_json_objects() -> None:
    """With --log-level info and no terminal: each line of driver and workers, with when, what and who."""
    _, err = run("--json", "--log-level", "info", "--threads", "1", "--max-tokens", "1", QUESTION)
    events = [json.loads(line) for line in err.splitlines()]
    assert events
    assert all({"timestamp", "level", "event", "rank", "pid"} <= event.keys() for event in events)
    assert "executor ready" in {event["event"] for event in events}
