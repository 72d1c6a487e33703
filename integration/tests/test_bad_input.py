"""Bad input is one clear line on stderr, a code other than 0, and nothing left behind."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import exec_core
import generate
from exec_core import WorkerStartupError, create_executor
from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import read_gguf
from reference_llm.hparams import Hparams
from reference_llm.options import executor_config, parse

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs the program with bad input: it must end with ``code`` and one line on stderr, which is returned."""

    def run(*arguments: str, code: int = 2) -> str:
        assert code == generate.main(arguments)
        out, err = capsys.readouterr()
        assert not out
        (line,) = err.splitlines()
        return line

    return run


def test_files_that_are_no_models(refuse: Refuse, tiny_model: str, tmp_path: Path) -> None:
    """Missing, something else, or cut short."""
    assert "missing.gguf: No such file or directory" in refuse("--model", str(tmp_path / "missing.gguf"), "hi")
    other = tmp_path / "other.gguf"
    other.write_text("not a model")
    assert "other.gguf: is not a GGUF file" in refuse("--model", str(other), "hi")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Path(tiny_model).read_bytes()[:-1])
    assert "cut.gguf: is cut short: tensor" in refuse("--model", str(cut), "hi")


def test_prompt_files_without_prompts(refuse: Refuse, tmp_path: Path) -> None:
    """Missing, blank, or no text."""
    assert "No such file" in refuse("--prompts", str(tmp_path / "missing.txt"), code=1)
    path = tmp_path / "prompts.txt"
    path.write_text("\n  \n")
    assert "must be a file with a question on each line" in refuse("--prompts", str(path))
    path.write_bytes(b"\xff\xfe\x00")
    assert "must be a text file in UTF-8" in refuse("--prompts", str(path))


def test_sizes_that_do_not_fit_the_model(refuse: Refuse) -> None:
    """They name what would work, before a worker starts."""
    line = refuse("--tensor-parallel-size", "2", "hi")
    assert "ParallelConfig.tensor_parallel_size must divide the model's 9 heads, 3 KV heads" in line
    assert "got 2; 1 or 3 would work" in line
    line = refuse("--pipeline-parallel-size", "31", "hi")
    assert "ParallelConfig.pipeline_parallel_size must be at most the model's 30 layers, got 31" in line


def test_uniproc_with_several_ranks(refuse: Refuse, tiny_model: str) -> None:
    """It says which backend to use."""
    line = refuse("--model", tiny_model, "--backend", "uniproc", "--pipeline-parallel-size", "2", "hi")
    assert "use backend 'mp'" in line


def test_a_cache_without_room(refuse: Refuse, tiny_model: str) -> None:
    """No block fits: found when the workers run, and they are gone afterwards."""
    arguments = ("--model", tiny_model, "--device", "cpu", "--json", "--kv-blocks", "0", "hi")
    assert "KV cache must have room for at least one block" in refuse(*arguments)


def test_more_ranks_than_gpus(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for, what was found, and what hides devices."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = refuse("--device", "cuda", "--tensor-parallel-size", "3", "hi")
    assert "tensor_parallel_size=3" in line
    assert "3 requested, 0 found" in line
    assert "CUDA_VISIBLE_DEVICES=" in line


def test_a_backend_that_is_not_installed(refuse: Refuse, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    assert "pip install exec-uniproc" in refuse("--model", tiny_model, "--backend", "uniproc", "hi")
    monkeypatch.setitem(sys.modules, "exec_mp", None)
    assert "pip install exec-mp" in refuse("--model", tiny_model, "--backend", "mp", "hi")


def test_a_model_package_that_is_not_installed(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install, or to name a file."""
    monkeypatch.setattr("reference_llm.options.DEFAULT_MODEL_PACKAGE", "llm_of_nobody")
    line = refuse("hi")
    assert "--model" in line
    assert "pip install" in line


@pytest.mark.parametrize("arguments", [(), ("hi", "--prompts", "x"), ("--max-tokens", "0", "hi"), ("--nope", "hi")])
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to ask, two things to ask, a bad number, an unknown option."""
    with pytest.raises(SystemExit, match="2"):
        generate.main(arguments)
    assert "usage: generate" in capsys.readouterr().err


def test_a_file_that_breaks_off_while_workers_load(tiny_model: str, tmp_path: Path) -> None:
    """The driver has seen all of it, the workers have not: rank, phase and cause arrive in the driver."""
    path = tmp_path / "model.gguf"
    path.write_bytes(Path(tiny_model).read_bytes())
    file = read_gguf(str(path))
    hparams = Hparams.from_gguf(file)
    config = executor_config(parse(["--device", "cpu", "-"], ""), file, hparams)
    path.write_bytes(Path(tiny_model).read_bytes()[:-100])
    with pytest.raises(WorkerStartupError, match=r"in load_model: CheckpointError: .*has become shorter") as raised:
        create_executor(config)
    assert isinstance(raised.value.__cause__, CheckpointError)
    assert raised.value.__cause__.path == str(path)


def test_the_worker_checks_the_sizes_too(tiny_model: str) -> None:
    """For drivers that do not."""
    file = read_gguf(tiny_model)
    config = exec_core.ExecutorConfig(
        worker_cls="reference_llm.worker:LlamaWorker",
        worker_kwargs={"path": file.path, "tensors": file.tensors, "hparams": Hparams.from_gguf(file)},
        parallel=exec_core.ParallelConfig(tensor_parallel_size=2),
        device=exec_core.DeviceConfig(device="cpu"),
    )
    with pytest.raises(WorkerStartupError, match=r"in init_worker: ConfigError: .*1 or 3 would work"):
        create_executor(config)


def test_a_prompt_that_is_too_long_does_not_stop_the_others(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused by name, the other is answered, and the program's code says that not all went well."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"short\n{'long ' * 100}\n")
    arguments = ["--model", tiny_model, "--device", "cpu", "--prompts", str(path), "--max-tokens", "5", "--json"]
    assert generate.main(arguments) == 1
    refused, answered, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert (1, "refused", []) == (refused["index"], refused["finish"], refused["tokens"])
    assert "has 501 tokens, the model's context holds 96" in refused["error"]
    assert (0, "length", 5) == (answered["index"], answered["finish"], len(answered["tokens"]))
    arguments.remove("--json")
    assert generate.main(arguments) == 1
    assert "generate: prompt 2: the prompt has 501 tokens" in capsys.readouterr().err
