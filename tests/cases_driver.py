"""Cards, drivers and a torch that sees them, played for tests on machines that have none."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

GIB = 1 << 30


class FakeNVMLError(Exception):
    pass


def a_card(name, uuid, bus, total, free, capability=(9, 0)):
    return SimpleNamespace(name=name, uuid=uuid, bus=bus, total=total, free=free, capability=capability, millijoules=0)


def fake_nvml(cards, *, fault=None):
    """A module with the calls of pynvml that gpuclust makes; ``fault`` names one that fails."""
    opened = []

    def call(name, value):
        def function(*args):
            if name == fault:
                raise FakeNVMLError(f"{name} failed\nwith detail")
            return value(*args)

        return function

    def memory(card):
        if card.total is None:
            raise FakeNVMLError("Not Supported")
        return SimpleNamespace(total=card.total, free=card.free)

    def found(key):
        for card in cards:
            if key in (f"GPU-{card.uuid}", f"00000000:{card.bus:02x}:00.0"):
                return card
        raise FakeNVMLError("Not Found")

    calls = {
        "nvmlInit": lambda: opened.append(True),
        "nvmlSystemGetDriverVersion": lambda: b"580.65.06",
        "nvmlSystemGetCudaDriverVersion": lambda: 13020,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetHandleByUUID": found,
        "nvmlDeviceGetHandleByPciBusId": found,
        "nvmlDeviceGetTotalEnergyConsumption": lambda card: card.millijoules,
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetUUID": lambda card: f"GPU-{card.uuid}",
        "nvmlDeviceGetPciInfo": lambda card: SimpleNamespace(domain=0, bus=card.bus, device=0),
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetCudaComputeCapability": lambda card: card.capability,
    }
    module = ModuleType("pynvml")
    module.NVMLError = FakeNVMLError
    for name, value in calls.items():
        setattr(module, name, call(name, value))
    module.opened = opened
    return module


def fake_torch(monkeypatch, cards, *, uuids=True, slices=None):
    """Let torch see ``cards`` in this order."""

    def properties(device):
        card = cards[getattr(device, "index", device)]
        return SimpleNamespace(
            name=card.name,
            uuid=card.uuid if uuids else "0000",
            pci_domain_id=0,
            pci_bus_id=card.bus,
            pci_device_id=0,
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=slices or card.total or 128 * GIB,
        )

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 * GIB, 10 * GIB))


BIG = a_card("NVIDIA H200", "aaaa", 0x41, 140 * GIB, 139 * GIB)
SMALL = a_card("NVIDIA RTX A2000", "bbbb", 0x02, 12 * GIB, 3 * GIB, (8, 6))
