"""What is measured on a peer, in its own process: functions of a `Peer` and parameters that return metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from bench import procfs, work
from bench.peer import Peer
from bench.stats import STOLEN, Metrics

_OTHERS_MIN_S = 0.3  # the machine's clock counts in ticks of 10 ms: less is too coarse


def _latency(call: Callable[[], object], calls: int, limit_s: float, warm_up_s: float) -> Metrics:
    """Round trips, one after the other: ``calls`` of them, or as many as ``limit_s`` allows, but at least three."""
    clock = time.perf_counter_ns
    warm_until = clock() + warm_up_s * 1e9
    for _ in range(max(2, calls // 10)):
        call()
        if clock() > warm_until:
            break
    samples: list[int] = []
    until = clock() + int(limit_s * 1e9)
    while len(samples) < calls:
        began = clock()
        call()
        ended = clock()
        samples.append(ended - began)
        if ended > until and len(samples) >= 3:
            break
    return {"us": [sample / 1e3 for sample in samples]}


def noop(peer: Peer, *, calls: int, limit_s: float) -> Metrics:
    """Nothing to all and back."""
    return _latency(lambda: peer.call("noop"), calls, limit_s, limit_s / 4)


def send(peer: Peer, *, kind: str, nbytes: int, one_reply: bool, calls: int, limit_s: float) -> Metrics:
    """A payload to all; all acknowledge, or the first one only."""
    payload = work.payload(kind, nbytes)
    expected = work.checksum(payload)
    if (found := peer.call("checksum", payload)) != [expected] * peer.n:
        raise ValueError(f"the payload arrived with checksums {found}, not {expected}")
    return _latency(lambda: peer.call("take", payload, one_reply=one_reply), calls, limit_s, limit_s / 2)


def fetch(peer: Peer, *, nbytes: int, calls: int, limit_s: float) -> Metrics:
    """A tensor back from all."""
    sizes = [result.numel() for result in peer.call("give", nbytes)]
    if sizes != [nbytes] * peer.n:
        raise ValueError(f"{peer.n} workers were asked for {nbytes} bytes each, and gave {sizes}")
    return _latency(lambda: peer.call("give", nbytes), calls, limit_s, limit_s / 2)


def cadence(peer: Peer, *, nbytes: int, busy_s: float, pause_s: float, steps: int, one_reply: bool) -> Metrics:
    """Steps as decoding makes them: how long they take beyond the work itself, and their cost in processor time."""
    payload = bytes(nbytes)
    for _ in range(5):
        peer.step(busy_s, payload, one_reply)
    driver = os.getpid()
    workers = [pid for pid in procfs.tree(driver) if pid != driver]
    cpu = procfs.cpu_seconds([driver]), procfs.cpu_seconds(workers)
    started = time.perf_counter()
    added = []
    for _ in range(steps):
        began = time.perf_counter()
        peer.step(busy_s, payload, one_reply)
        added.append((time.perf_counter() - began - busy_s) * 1e6)
        time.sleep(pause_s)
    seconds = time.perf_counter() - started
    driver_cores = (procfs.cpu_seconds([driver]) - cpu[0]) / seconds
    worker_cores = (procfs.cpu_seconds(workers) - cpu[1]) / seconds
    cores = {"cores": driver_cores + worker_cores, "driver_cores": driver_cores, "worker_cores": worker_cores}
    return {"added_us": added, **cores}


def in_flight(peer: Peer, *, calls: int, window: int, limit_s: float) -> Metrics:
    """Calls per second with many under way."""
    peer.in_flight(window, window)
    done, started, seconds = 0, time.perf_counter(), 0.0
    while done < calls and seconds < limit_s:
        batch = min(4 * window, calls - done)
        peer.in_flight(batch, window)
        done += batch
        seconds = time.perf_counter() - started
    return {"calls_per_s": done / seconds, "samples": done}


def idle(peer: Peer, *, seconds: float, settle_s: float) -> Metrics:
    """Processor time of all processes while nothing is asked of them."""
    peer.call("noop")
    time.sleep(settle_s)
    pids = procfs.tree(os.getpid())
    cpu = procfs.cpu_seconds(pids)
    time.sleep(seconds)
    return {"cores": (procfs.cpu_seconds(pids) - cpu) / seconds}


def memory(peer: Peer) -> Metrics:
    """Memory of all processes together."""
    peer.call("noop")
    held = procfs.held(procfs.tree(os.getpid()))
    return {"pss_mb": held.pss / 1e6, "descriptors": held.descriptors}


WORKLOADS: dict[str, Callable[..., Metrics]] = {
    function.__name__: function for function in (noop, send, fetch, cadence, in_flight, idle, memory)
}


def measure(peer: Peer, workload: str, params: dict[str, Any]) -> Metrics:
    """Runs a workload, and adds how busy the machine was with other things meanwhile, and its host with other machines."""
    (machine, stolen), ours = procfs.machine_cpu_seconds(), procfs.cpu_seconds(procfs.tree(os.getpid()))
    started = time.perf_counter()
    metrics = {**(peer.measure(workload, params) or WORKLOADS[workload](peer, **params))}
    seconds = time.perf_counter() - started
    machine_now, stolen_now = procfs.machine_cpu_seconds()
    ours = procfs.cpu_seconds(procfs.tree(os.getpid())) - ours
    if seconds < _OTHERS_MIN_S:
        return metrics
    others = max(0.0, (machine_now - machine - ours) / seconds)
    return {**metrics, "other_cores": others, STOLEN: (stolen_now - stolen) / seconds}
