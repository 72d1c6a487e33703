"""Monarch actors on this machine."""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

from monarch.actor import Actor, endpoint, this_host

from bench.peer import Peer
from bench.work import Work


class BenchActor(Actor):  # type: ignore[misc] # not installed where types are checked
    """Runs the methods of `Work`."""

    def __init__(self) -> None:
        self._work = Work()

    @endpoint  # type: ignore[untyped-decorator] # likewise
    def run(self, method: str, args: tuple[Any, ...]) -> Any:
        """One call."""
        return self._work.run(method, args)


class MonarchPeer(Peer):
    """One process per worker, one mesh of actors over them."""

    distribution: ClassVar[str | None] = "torchmonarch"

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._processes = this_host().spawn_procs(per_host={"workers": n})
        self._actors = self._processes.spawn("bench", BenchActor)
        self._actors.run.call("give", (1,)).get()  # they have torch now

    def call(self, method: str, *args: Any, one_reply: bool = False) -> list[Any]:
        """A call of the mesh; with ``one_reply`` it waits for all as well: the mesh is called as one."""
        values = [value for _, value in self._actors.run.call(method, args).get().items()]
        return values[:1] if one_reply else values

    def in_flight(self, count: int, window: int) -> None:
        """Futures."""
        under_way: deque[Any] = deque()
        for _ in range(count):
            if len(under_way) == window:
                under_way.popleft().get()
            under_way.append(self._actors.run.call("noop", ()))
        for future in under_way:
            future.get()

    def stop(self) -> None:
        """Ends the processes."""
        self._processes.stop().get()
