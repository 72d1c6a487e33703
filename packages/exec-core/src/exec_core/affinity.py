"""Which cores a rank may use: near its GPU where there is one, and nobody else's as long as there are enough.

Memory follows by itself: the kernel gives a page to the NUMA node of the core that first writes to it, and the affinity
is set before a worker's imports.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from exec_core.devices import Placement

PCI_DEVICES = "/sys/bus/pci/devices"
# One line a device: index, UUID, PCI address. Run in a child, since asking for properties initialises CUDA.
LIST_PROGRAM = """
import torch
for index in range(torch.cuda.device_count()):
    found = torch.cuda.get_device_properties(index)
    if hasattr(found, "pci_bus_id"):
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        print("device", index, getattr(found, "uuid", "-"), address)
"""


def cores_of_ranks(
    placement: Placement,
    local_size: int,
    listing: str = "",
    *,
    allowed: Iterable[int] | None = None,
    sysfs: str = PCI_DEVICES,
) -> tuple[frozenset[int], ...]:
    """The cores of each of ``local_size`` ranks of this machine.

    Args:
        listing: what `LIST_PROGRAM` has printed; without it, or for a device that it does not name, all cores are near.
        allowed: the cores to divide; default: those of this process.
        sysfs: where the kernel says which cores are near a PCI device (``local_cpulist``).
    """
    cores = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    addresses = _addresses(placement, listing)
    near = [_near(addresses.get(rank), sysfs) & cores or cores for rank in range(local_size)]
    chosen = []
    for rank, mine in enumerate(near):
        sharing = [other for other in range(local_size) if near[other] == mine]
        chosen.append(_share(sorted(mine), sharing.index(rank), len(sharing)))
    return tuple(chosen)


def _addresses(placement: Placement, listing: str) -> Mapping[int, str]:
    """PCI address of each local rank's device, as far as known."""
    lines = [line.split()[1:] for line in listing.splitlines() if line.startswith("device ") and len(line.split()) == 4]
    found = {}
    for rank, (device_id, index) in enumerate(zip(placement.ids, placement.indices, strict=True)):
        for number, uuid, address in lines:
            if number == str(index) or (index is None and uuid.startswith(device_id.removeprefix("GPU-"))):
                found[rank] = address
    return found


def _near(address: str | None, sysfs: str) -> frozenset[int]:
    if address is None:
        return frozenset()
    try:
        with open(os.path.join(sysfs, address, "local_cpulist"), encoding="ascii") as file:
            return parse_cpulist(file.read())
    except (OSError, ValueError):  # a container without sysfs, or a virtual device
        return frozenset()


def parse_cpulist(text: str) -> frozenset[int]:
    """The kernel's notation of a set of cores: ``0-3,8,10-11``."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def _share(cores: Sequence[int], number: int, sharers: int) -> frozenset[int]:
    """Disjoint parts, neighbours together; with fewer cores than sharers, one core, shared in turn."""
    if len(cores) < sharers:
        return frozenset({cores[number % len(cores)]})
    return frozenset(cores[number * len(cores) // sharers : (number + 1) * len(cores) // sharers])
