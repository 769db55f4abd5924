"""Free memory: what can still be allocated on a device."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

from gpuclust.driver import NoDriver, asked, card

# What torch's allocator has of the device, what of that is in use, and what lies between that and is of no use to
# anything larger.
_HELD = ("reserved", "active", "inactive_split")
# Of glibc's mallopt: what is given back at once, and what a piece takes from the system by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGE_BYTES = -1, -3, 128 << 10


def give_back_at_once() -> None:
    """Have glibc give large pieces of memory back to the system as they are freed, where a limit counts all of them.

    Left alone it keeps them for the next piece of their size, which saves time and takes up to half as much again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, _LARGE_BYTES)


def give_back(device: torch.device) -> None:
    """Give memory that was freed back to the system, as far as it can be."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # Page-locked memory, which torch keeps by powers of two; the function has no public name.
        getattr(torch._C, "_host_emptyCache", lambda: None)()
    else:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: the least of `free_by`."""
    return min(free_by(device).values())


def free_by(device: torch.device) -> dict[str, int]:
    """Bytes that can still be allocated on a device, by each of those who would refuse more.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    dict
        Bytes by name. On CUDA ``CUDA`` (what the runtime has free), ``the driver`` (the same by the driver's own
        account; absent where it cannot be asked) and ``torch's memory fraction`` where one is set. The first two are
        one number on a whole card; with MIG the runtime speaks of the slice, and the driver may speak of the card. To
        each comes what torch holds and can give back: whole segments that nothing uses, but not the gaps between
        tensors. On the CPU ``the system`` (what Linux calls available) and ``the control group`` (a container's
        limit) where there is one.
    """
    if device.type != "cuda":
        group = _group_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
        return {"the system": _available(Path("/proc/meminfo"))} | (
            {} if group is None else {"the control group": group}
        )
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    reserved, active, gaps = (stats.get(f"{name}_bytes.all.current", 0) for name in _HELD)
    idle = reserved - active - gaps
    found = {"CUDA": free + idle}
    with suppress(NoDriver), asked() as nvml:
        found["the driver"] = int(nvml.nvmlDeviceGetMemoryInfo(card(nvml, device)).free) + idle
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    if fraction < 1:
        found["torch's memory fraction"] = max(0, int(fraction * total) - reserved + idle)
    return found


def _available(meminfo: Path) -> int:
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: what there is at all is the best that the standard library knows.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_free(membership: Path, root: Path) -> int | None:
    """The least that any control group around this process leaves, versions 1 and 2; None where nothing is limited."""
    if not membership.is_file():
        return None
    frees = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names, cache = root, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        inner = base / path.lstrip("/")
        # In a container the path may be the host's: the root of the mount is then the group itself.
        for folder in dict.fromkeys((inner, *(p for p in inner.parents if p.is_relative_to(base)))):
            limit, usage = folder / names[0], folder / names[1]
            if not limit.is_file() or not usage.is_file() or limit.read_text().strip() == "max":
                continue
            # File pages that nobody touches are given back before anything fails.
            stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            frees.append(int(limit.read_text()) - int(usage.read_text()) + int(stat.get(cache, 0)))
    return max(0, min(frees)) if frees else None
