"""Ray actors on this machine, payloads put into its object store once per call."""

from __future__ import annotations

from typing import Any, ClassVar

import ray

from bench.peer import Peer
from bench.work import Work

_LARGE = 100_000  # bytes; Ray passes smaller arguments along with the call


class RayPeer(Peer):
    """One actor per worker, each with a processor of its own as far as Ray is concerned."""

    distribution: ClassVar[str | None] = "ray"

    def __init__(self, n: int) -> None:
        super().__init__(n)
        ray.init(num_cpus=n, include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
        actor = ray.remote(Work)
        self._actors = [actor.options(num_cpus=1).remote() for _ in range(n)]
        ray.get([actor.give.remote(1) for actor in self._actors])  # they have torch now

    def _send(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        args = tuple(ray.put(arg) if _nbytes(arg) > _LARGE else arg for arg in args)
        return [getattr(actor, method).remote(*args) for actor in self._actors]

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """Remote calls, then `ray.get`."""
        sent = self._send(method, args)
        return list(ray.get(sent[:1] if one_reply else sent))

    def in_flight(self, count: int, window: int) -> None:
        """References, read a window at a time."""
        for start in range(0, count, window):
            sent = [self._send("noop", ()) for _ in range(min(window, count - start))]
            ray.get([reference for references in sent for reference in references])

    def stop(self) -> None:
        """`ray.shutdown`."""
        ray.shutdown()


def _nbytes(arg: Any) -> int:
    return len(arg) if isinstance(arg, bytes) else int(getattr(arg, "nbytes", 0))
