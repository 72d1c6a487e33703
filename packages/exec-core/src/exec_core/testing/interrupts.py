"""Ctrl-C at every point of a call, one after the other: what signals find only by chance."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType


def interrupted(call: Callable[[], object], at: int) -> str | None:
    """Runs ``call`` with a KeyboardInterrupt at its ``at``-th point, from 1. Where that is; None when there are fewer points.

    Points are where the interpreter looks for signals: the start of a function, and the end of one written in C. Not those in
    what `threading` itself leaves undone if it is cut short: a thread being started, which stays in its list for ever, and
    a `threading.Condition`, whose lock stays taken.
    """
    interrupter = _Interrupter(at, sys._getframe().f_code)  # noqa: SLF001 # the frame that everything of interest is above
    sys.setprofile(interrupter)
    try:
        call()
    except KeyboardInterrupt:
        if interrupter.where is None:  # the user's own
            raise
    finally:
        sys.setprofile(None)
    return interrupter.where


_NOT_IN = {threading.Thread.start.__code__} | {
    method.__code__ for method in vars(threading.Condition).values() if isinstance(method, FunctionType)
}


class _Interrupter:
    """A profile function: an exception raised by it comes out of the very instruction that a signal's would come out of."""

    def __init__(self, at: int, below: CodeType) -> None:
        self._points, self._below = at, below
        self.where: str | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event in {"call", "c_return"} and self._is_point(frame):
            self._points -= 1
            if not self._points:
                stack = traceback.extract_stack(frame)
                self.where = " > ".join(f"{one.name}:{one.lineno}" for one in stack).rpartition("interrupted:")[2]
                raise KeyboardInterrupt

    def _is_point(self, frame: FrameType) -> bool:
        if frame.f_code is self._below:
            return False
        back: FrameType | None = frame
        while back is not None and back.f_code is not self._below:
            if back.f_code in _NOT_IN:
                return False
            back = back.f_back
        return True
