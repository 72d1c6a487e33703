"""Logs: one JSON object a line, and the host's own configuration wins."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from exec_core import LogConfig, logs

KEYS = ["timestamp", "level", "event", "logger", "executor", "backend", "generation", "rank", "pid"]
BOUND: dict[str, object] = {"executor": "exec-1-0", "backend": "mp", "generation": 0, "rank": 2, "pid": 4711}


@pytest.fixture(autouse=True)
def _structlog_is_not_configured() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Each line on standard error so far as a JSON object."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def run(program: str) -> list[str]:
    """Lines on standard error of a program in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_json_event_has_all_keys_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """An event in JSON begins with the same keys, whatever else it has."""
    logs.driver_logger(LogConfig(format="json"), "exec_core.executor", **BOUND).info("ready", duration_ms=1.5)
    (event,) = events(capsys)

    assert KEYS == list(event)[: len(KEYS)]
    assert ("info", "ready", "exec_core.executor", 2, 4711, 1.5) == tuple(
        event[key] for key in ("level", "event", "logger", "rank", "pid", "duration_ms")
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", event["timestamp"])


def test_exception_is_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback does not break the line."""
    log = logs.driver_logger(LogConfig(format="json"), "x")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    (event,) = events(capsys)

    assert "ValueError: two\nlines" in event["exception"]


def test_anything_can_be_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """A value that JSON does not know is written as its repr."""
    logs.driver_logger(LogConfig(format="json"), "x").info("odd", value={1, 2}, kind=int)
    (event,) = events(capsys)

    assert ("{1, 2}", "<class 'int'>") == (event["value"], event["kind"])


def test_level_is_respected(capsys: pytest.CaptureFixture[str]) -> None:
    """Events below the level are not written."""
    log = logs.driver_logger(LogConfig(format="json", level="warning"), "x")
    log.info("quiet")
    log.warning("loud")

    assert ["loud"] == [event["event"] for event in events(capsys)]


def test_auto_is_json_where_nobody_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal ``auto`` is JSON; ``console`` is for a person, with the rank in front."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logs.driver_logger(LogConfig(), "x", rank=2).info("one")
    logs.driver_logger(LogConfig(format="console"), "x", rank=2).info("two")
    logs.driver_logger(LogConfig(format="console"), "x", rank=None).info("three")
    one, two, three = capsys.readouterr().err.splitlines()

    assert "one" == json.loads(one)["event"]
    assert "[rank 2] two" in two
    assert "[driver] three" in three


def test_console_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal ``auto`` is for a person."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())

    assert ("console", "json") == (logs.resolve_format(LogConfig()), logs.resolve_format(LogConfig(format="json")))


def test_hosts_structlog_wins(capsys: pytest.CaptureFixture[str]) -> None:
    """A host that has configured structlog gets our events through its own processors, whatever our format says."""
    seen: list[dict[str, Any]] = []

    def keep(_: Any, __: str, event: Any) -> Any:
        seen.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    logs.driver_logger(LogConfig(format="json"), "exec_core.executor", rank=2).info("ready")

    assert [{"event": "ready", "rank": 2, "logger": "exec_core.executor"}] == seen
    assert "" == capsys.readouterr().err


def test_hosts_logging_wins_by_default(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """With ``auto`` and handlers on the root logger, events are its records; with ``json`` they are not."""
    caplog.set_level("INFO")
    logs.driver_logger(LogConfig(), "exec_core.executor", rank=2).info("ready")
    logs.driver_logger(LogConfig(format="json"), "exec_core.executor", rank=2).info("json")

    assert [("exec_core.executor", "INFO", "ready")] == [
        (record.name, record.levelname, record.message) for record in caplog.records
    ]
    assert ["json"] == [event["event"] for event in events(capsys)]


# All but stack_info, which may be anything that is true or false.
TAKEN = sorted({*vars(logging.makeLogRecord({})), "message", "asctime", "stacklevel"} - {"stack_info"})


@pytest.mark.parametrize("key", TAKEN)
def test_keys_of_a_record_arrive_in_hosts_logging(caplog: pytest.LogCaptureFixture, key: str) -> None:
    """A key that a `logging.LogRecord` has already, or that its methods take otherwise, arrives and raises nothing."""
    caplog.set_level("INFO")
    logs.driver_logger(LogConfig(), "exec_core.worker", rank=2).info("ready", **{key: "given", f"{key}_": "other"})
    (record,) = caplog.records

    assert ("exec_core.worker", "INFO", "ready") == (record.name, record.levelname, record.message)
    assert 2 == vars(record)["rank"]
    assert {"given", "other"} <= {value for name, value in vars(record).items() if name.startswith(key)}


def test_attributes_of_hosts_own_records(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose records all have an attribute of its own keeps it, and gets our key of that name beside it."""
    plain = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        record.request_id = "the host's"
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", factory)
    logs.driver_logger(LogConfig(), "exec_core.executor").warning("late reply dropped", request_id=7)
    (record,) = caplog.records

    assert ("the host's", 7) == (vars(record)["request_id"], vars(record)["request_id_"])


def test_exceptions_in_hosts_logging(caplog: pytest.LogCaptureFixture) -> None:
    """The exception being handled, or a given one, is the record's; what is none arrives as an attribute."""
    log = logs.driver_logger(LogConfig(), "exec_core.worker")
    error = ValueError("why")
    try:
        raise error
    except ValueError:
        log.exception("handled")
    log.error("given", exc_info=error)
    log.error("none", exc_info=("not", "one"))
    handled, given, none = caplog.records

    assert (error, error, None) == tuple(r.exc_info and r.exc_info[1] for r in (handled, given, none))
    assert ("not", "one") == vars(none)["exc_info_"]


def test_exception_in_console_may_be_anything(capsys: pytest.CaptureFixture[str]) -> None:
    """In console format, the text of an exception stands below its event; so does what is not a text."""
    log = logs.driver_logger(LogConfig(format="console"), "x")
    log.error("failed", exception="ValueError: two\nlines")
    log.error("failed", exception=ValueError("as it is"))

    assert ["ValueError: two", "lines", "as it is"] == [
        line for line in capsys.readouterr().err.splitlines() if "failed" not in line
    ]


def test_import_configures_nothing() -> None:
    """Importing the package changes neither structlog nor logging."""
    program = (
        "import exec_core, exec_core.testing.workers, logging, structlog, sys; "
        "print(structlog.is_configured(), logging.getLogger().handlers, logging.getLogger().level, file=sys.stderr)"
    )

    assert ["False [] 30"] == run(program)


def test_workers_process_writes_json_only() -> None:
    """In a worker's process structlog, `logging` and warnings all become JSON with the worker's keys."""
    program = f"""
import logging, structlog, warnings
from exec_core import logs
logs.configure_worker("json", "info", logger="worker", **{BOUND!r})
structlog.get_logger().info("by structlog", step=1)
structlog.get_logger().debug("too quiet")
logging.getLogger("library").warning("by %s", "logging")
logging.getLogger("library").info("info")
try:
    raise ValueError("why")
except ValueError:
    logging.getLogger("library").exception("with a traceback")
warnings.warn("by warnings")
"""
    found = [json.loads(line) for line in run(program)]

    assert ["by structlog", "by logging", "info", "with a traceback"] == [event["event"] for event in found[:-1]]
    assert "by warnings" in found[-1]["event"]
    assert [["worker", "library", "library", "library", "py.warnings"]] == [[event["logger"] for event in found]]
    assert "ValueError: why" in found[3]["exception"]
    assert [(2, 4711, "mp", "exec-1-0")] * len(found) == [
        (event["rank"], event["pid"], event["backend"], event["executor"]) for event in found
    ]
    assert ["info", "warning", "info", "error", "warning"] == [event["level"] for event in found]


def test_bad_record_is_reported_not_raised() -> None:
    """A record whose arguments do not fit is the logging library's matter, never an error in the program."""
    program = """
import logging
from exec_core import logs
logs.configure_worker("json", "info")
logging.getLogger("library").warning("%d", "x")
logging.getLogger("library").warning("after")
"""

    assert "after" == json.loads(run(program)[-1])["event"]


def test_threads_do_not_mix_lines() -> None:
    """Events of many threads are each one whole line."""
    program = """
import threading
from exec_core import LogConfig, logs
log = logs.driver_logger(LogConfig(format="json"), "x")
def write(n):
    for i in range(50):
        log.info("event", text="x" * 5000, n=n)
threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    lines = run(program)

    assert 400 == len(lines)
    assert {"event"} == {json.loads(line)["event"] for line in lines}


def test_no_standard_error_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without standard error (a service that closed it) is not stopped by a log event."""
    nothing: Any = None
    monkeypatch.setattr(sys, "stderr", nothing)
    logs.driver_logger(LogConfig(format="json"), "x").info("nobody reads this")
