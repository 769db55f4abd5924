"""Free memory: what can still be allocated on a device."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device.

    On CUDA what the driver has free and what torch holds unused; on the CPU what Linux calls available, or what
    this process's control group (a container's limit) leaves, whichever is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    group = _group_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min(size for size in (_available(Path("/proc/meminfo")), group) if size is not None)


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
