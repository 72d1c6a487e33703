"""A reply as bytes becomes a value or a failure."""

from __future__ import annotations

import threading

from exec_core import messages
from exec_core.errors import WorkerError
from exec_core.messages import Failure, Status
from exec_mp._channel import Answer


def decoded(answer: Answer, pid: int, name: str) -> tuple[object, Failure | None]:
    """The value in ``answer``, or the error: the worker's, or what unpickling raises.

    Raises:
        KeyboardInterrupt: the user's, on the main thread; nothing else.
    """
    rank = answer.rank
    try:
        if answer.status == Status.VALUE:
            return messages.decode(answer.body, answer.format, answer.owned), None
        error = messages.decode_error(answer.body, answer.format, rank, pid, name)
    except Exception as unloadable:  # of a class that is not here, say
        error = unloadable
        error.add_note(f"while the result was being unpickled in the driver: rank {rank} (pid {pid}) in {name}")
    except BaseException as unloadable:  # a result that exits the interpreter when it is unpickled must not do so here
        if isinstance(unloadable, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        kind, why = type(unloadable).__qualname__, "raised while the result was being unpickled in the driver"
        error = WorkerError(rank, pid, name, kind, str(unloadable), why=why)
    return None, Failure(rank, pid, error, answer.time_ns)
