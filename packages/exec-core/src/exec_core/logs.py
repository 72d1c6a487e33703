"""Logs: structlog events of driver and workers, one JSON object a line or for a person.

In the driver nothing is configured globally: if the host has configured structlog, its configuration takes our events;
with ``format="auto"`` and handlers on the standard root logger, these take them; otherwise they go to ``sys.stderr``.
A worker process is ours, so there structlog and the standard `logging` are both configured, and a library's records
look like ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from exec_core.config import LogConfig

RELAY_MARK = "\x1e"  # begins a line of JSON that the driver turns into the event it was (a record separator, RFC 7464)
_KEYS = ("timestamp", "level", "event", "logger", "executor", "backend", "generation", "rank", "pid")


class LineWriter:
    """Writes each event as one line with one system call, so that processes sharing a stderr do not mix lines."""

    def __init__(self, stream: Callable[[], TextIO | None] = lambda: sys.stderr, mark: str = "") -> None:
        self._stream = stream  # looked up at each event: hosts and tests replace sys.stderr
        self._mark = mark
        self._lock = threading.Lock()

    def msg(self, line: str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # closed or broken: a log line must not fail a call
            self._write(self._stream(), f"{self._mark}{line}\n")

    @staticmethod
    def _write(stream: TextIO | None, line: str) -> None:
        if stream is None:  # a host without standard error
            return
        try:
            number = stream.fileno()
        except (OSError, ValueError, AttributeError):  # not a real file
            stream.write(line)
            return
        stream.flush()
        data = memoryview(line.encode(errors="backslashreplace"))
        while data:
            data = data[os.write(number, data) :]

    debug = info = warning = error = critical = exception = msg


def resolve_format(config: LogConfig) -> str:
    """``json`` or ``console``: what ``auto`` means for this process's stderr."""
    if config.format != "auto":
        return config.format
    return "console" if sys.stderr is not None and sys.stderr.isatty() else "json"


def driver_logger(config: LogConfig, name: str, **bound: object) -> structlog.typing.FilteringBoundLogger:
    """A logger for the driver's events, which leaves the host's configuration as it is."""
    if structlog.is_configured():
        logger = structlog.get_logger(name)
        return logger.bind(logger=name, **bound)  # type: ignore[no-any-return] # whatever the host's is
    if config.format == "auto" and logging.getLogger().handlers:
        processors: list[Processor] = [_to_record]
        sink: WrappedLogger = logging.getLogger(name)
    else:
        processors = [*_common(), *_renderers(resolve_format(config))]
        sink = LineWriter()
    return structlog.wrap_logger(  # type: ignore[no-any-return] # typed Any by structlog
        sink,
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(config.level),
        context_class=dict,
    ).bind(logger=name, **bound)


def _to_record(logger: logging.Logger, _: str, event: EventDict) -> EventDict:
    """The arguments for a method of the host's logger: what is none of them becomes an attribute of its record.

    Keys that every record has get an underscore: `logging` raises for them, and a log line must not fail a call.
    """
    valid: dict[str, Callable[[object], bool]] = {
        "exc_info": _is_exc_info,
        "stack_info": lambda wanted: True,  # anything is true or false
        "stacklevel": lambda level: isinstance(level, int),
    }
    arguments = {key: event.pop(key) for key, test in valid.items() if key in event and test(event[key])}
    arguments["msg"] = event.pop("event")
    # The record of a factory of the host's, which may have given it attributes of its own.
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, "", (), None)
    taken = {*vars(record), "message", "asctime"}
    extra = {key: value for key, value in event.items() if key not in taken}
    for key in event.keys() - extra.keys():
        name = f"{key}_"
        while name in taken or name in extra:
            name += "_"
        extra[name] = event[key]
    return {**arguments, "extra": extra}


def _is_exc_info(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) == 3 and isinstance(value[1], BaseException | None)  # as of sys.exc_info
    return isinstance(value, BaseException | int | None)


def configure_worker(fmt: str, level: str, **bound: object) -> None:
    """Sends every structlog event and every `logging` record of this process to stderr, with ``bound`` keys.

    Args:
        fmt: ``json``, ``console``, or ``relay``: JSON that the driver reads and writes in its own format.
    """
    mark = RELAY_MARK if fmt == "relay" else ""

    def add_bound(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        for key, value in bound.items():
            event.setdefault(key, value)
        return event

    common = [add_bound, *_common()]
    structlog.configure(
        processors=[*common, *_renderers(fmt)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: LineWriter(mark=mark),
        cache_logger_on_first_use=True,
    )
    handler = _RecordHandler(LineWriter(mark=mark))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, *common],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(fmt)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)


class _RecordHandler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.msg(self.format(record))
        except Exception:  # as logging's own handlers do: a bad record is reported, never raised into the program
            self.handleError(record)


def _common() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _timestamp,
    ]


_now = structlog.processors.TimeStamper(fmt="iso", utc=True)


def _timestamp(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Now, unless a worker's event brings its own time."""
    return event if "timestamp" in event else _now(logger, name, event)


def _renderers(fmt: str) -> list[Processor]:
    if fmt in ("json", "relay"):
        return [
            _stack_text,
            structlog.processors.format_exc_info,
            _in_order,
            structlog.processors.JSONRenderer(default=repr),
        ]
    colors = sys.stderr is not None and sys.stderr.isatty()
    # Plainly: an exception may be text already, from another process, which a formatter of tracebacks warns about.
    formatter = structlog.dev.plain_traceback
    return [_rank_prefix, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=formatter)]


_stack_text = structlog.processors.StackInfoRenderer()


def _in_order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {**{key: event.get(key) for key in _KEYS}, **event}


def _rank_prefix(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    who = "driver" if event.get("rank") is None else f"rank {event['rank']}"
    for key in ("rank", "executor", "backend", "generation"):
        event.pop(key, None)
    for key in ("exception", "stack"):  # which the renderer takes for text
        if event.get(key) is not None:
            event[key] = str(event[key])
    return {**event, "event": f"[{who}] {event.get('event')}"}
