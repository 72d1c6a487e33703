"""The benchmark program: what the control plane costs, next to its peers under the same payloads in the same run.

    __main__ -> plan (cases) -> campaign: PeerProcess.ask ==JSON lines==> serve -> workloads -> a Peer and its workers
                                own programs (startup, upkeep), each in a fresh interpreter
             -> results -> targets, report, plots

Each peer is a program of its own, in its own interpreter and, where it needs other packages, its own environment. All
peers take turns within a case, round after round, so that what else the machine does hits all alike: compare ratios.
What runs on the peers' side (`serve`, `workloads`, `work`, `peer`, `peers`) imports no more than each peer needs.
"""
