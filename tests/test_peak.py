"""Peak memory of a call: what it takes above what was held, on a CPU by the kernel's record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpuclust import peak
from gpuclust.peak import PeakMemory

CPU = torch.device("cpu")
SIZE = 48 << 20


def taken(call, device=CPU):
    held = PeakMemory(device, by_torch=True)
    result = call()
    return held.peak_bytes(), result


@pytest.mark.skipif(PeakMemory(CPU, True).peak_bytes() is None, reason="the process's peak cannot be set back here")
def test_on_a_cpu_the_peak_of_a_call_counts_and_not_what_was_held_or_another_took():
    def once():
        block = torch.ones(SIZE, dtype=torch.uint8)
        return block[:1].clone()

    held = torch.ones(2 * SIZE, dtype=torch.uint8)
    for call, expected in ((once, SIZE), (lambda: None, 0), (once, SIZE), (lambda: held.add(1), 2 * SIZE)):
        found, _ = taken(call)
        assert abs(found - expected) < 4 << 20
    many = taken(lambda: [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(SIZE >> 16)])[0]
    assert abs(many - SIZE) < 4 << 20
    again = taken(lambda: [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(SIZE >> 16)])[0]
    assert abs(again - SIZE) < 4 << 20  # though the C library had kept it


def test_where_the_record_cannot_be_set_back_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "_PROCESS", Path(tmp_path / "nothing"))
    assert taken(lambda: None) == (None, None)


@pytest.mark.gpu
def test_on_a_gpu_it_is_torchs_peak():
    def once():
        return torch.ones(SIZE, dtype=torch.uint8, device="cuda")[:1].clone()

    found, _ = taken(once, torch.device("cuda", 0))
    assert SIZE <= found < SIZE + (1 << 20)
