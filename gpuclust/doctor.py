"""What this machine has and what can run on it: `gpuclust doctor`, and the hardware and versions in a report."""

from __future__ import annotations

import os
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuclust.config import show_bytes
from gpuclust.driver import NoDriver, asked
from gpuclust.errors import first_line

if TYPE_CHECKING:
    from rich.console import Console

# Distributions whose version can matter to a result, by the name they are shown under.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "scikit-learn": ("scikit-learn",),
    "pandas": ("pandas",),
    "pillow": ("pillow",),
    "timm": ("timm",),
    "torchcodec": ("torchcodec",),
    "triton": ("triton",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "cuml": ("cuml-cu13", "cuml-cu12", "cuml"),
    "nvidia-ml-py": ("nvidia-ml-py",),
}


def versions() -> dict[str, str]:
    """Versions of gpuclust, Python and what is installed of the packages that a result depends on; none is imported.

    ``cuda`` is the version that torch was built for; it is absent where torch was built without.
    """
    from gpuclust import __version__

    found = {"gpuclust": __version__, "python": platform.python_version()}
    for shown, names in _DISTRIBUTIONS.items():
        for name in names:
            try:
                found[shown] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    built = _cuda_build()
    return {**found, "cuda": built} if built else found


def hardware(device: str) -> dict[str, Any]:
    """What a run on ``device`` ran on, for its report.

    Parameters
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:INDEX``.

    Returns
    -------
    dict
        ``device`` (a name a person knows), ``cores`` and ``memory`` of the host, ``system``; with CUDA also
        ``gpu_memory``, ``compute_capability`` and ``driver`` as far as they can be found out.
    """
    host = _host()
    facts: dict[str, Any] = {
        "device": f"{host['name']} (cpu)",
        "cores": host["cores"],
        "memory": show_bytes(host["total_bytes"]),
        "system": platform.platform(),
    }
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        cuda = _cuda()
        card = next((card for card in cuda["devices"] if card["device"] == f"cuda:{index}"), None)
        if card is None:
            return {**facts, "device": device, "note": cuda["problem"] or f"there is no {device}"}
        facts |= {
            "device": f"{card['name']} (cuda:{index})",
            "processor": host["name"],
            "gpu_memory": show_bytes(card["total_bytes"]),
            "compute_capability": card["compute_capability"],
        }
        if cuda["driver"]:
            facts["driver"] = cuda["driver"]
    return facts


def examine() -> dict[str, Any]:
    """Everything `gpuclust doctor` shows, as plain data that JSON can hold.

    Returns
    -------
    dict
        ``versions``; ``system``; ``devices``: a dict each with ``device`` (None for a card that torch does not see),
        ``name``, ``total_bytes``, ``free_bytes`` and more; ``cuda``: ``build``, ``driver``, ``driver_cuda``,
        ``visible_devices``, ``problem`` (why torch cannot use CUDA, or None) and ``nvml`` (why the driver's library
        does not answer, or None); ``backends``: each name with None if it can run, else the reason why not.
    """
    cuda = _cuda()
    cards = cuda.pop("devices")
    host = _host()
    if problem := _torch_problem():
        backends: dict[str, str | None] = {"torch": problem}
    else:
        from gpuclust.cluster.backends import survey

        backends = survey()
    return {
        "versions": versions(),
        "system": platform.platform(),
        "devices": [{"device": "cpu", **host}, *cards],
        "cuda": cuda,
        "backends": backends,
    }


def show(console: Console) -> None:
    """Print what `examine` finds to a rich console."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = examine()

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            # Numbers keep their column; what explains may wrap.
            made.add_column(column, no_wrap=column not in ("name", "it can run"), overflow="fold")
        return made

    parts = [f"{name} {version}" for name, version in found["versions"].items() if name != "cuda"]
    console.print(Text(", ".join(parts)))
    console.print(Text(found["system"]))
    console.print()
    devices = table("Devices", "device", "name", "free", "of", "detail")
    for card in found["devices"]:
        free, total = ("?" if card[key] is None else show_bytes(card[key]) for key in ("free_bytes", "total_bytes"))
        detail = f"{card['cores']} cores" if "cores" in card else f"sm {card['compute_capability']}"
        devices.add_row(card["device"] or "–", Text(card["name"]), free, total, detail)
    console.print(devices)
    if any(card["device"] is None for card in found["devices"]):
        console.print(Text("  – is a card that the driver has and torch does not see", style="yellow"))
    cuda = found["cuda"]
    lines = [f"torch is built for CUDA {cuda['build']}" if cuda["build"] else "torch is built without CUDA"]
    if cuda["driver"]:
        newest = f" (up to CUDA {cuda['driver_cuda']})" if cuda["driver_cuda"] else ""
        lines.append(f"driver {cuda['driver']}{newest}")
    if cuda["visible_devices"] is not None:
        lines.append(f"CUDA_VISIBLE_DEVICES={cuda['visible_devices']}")
    console.print(Text("CUDA", style="bold").append(f": {', '.join(lines)}", style="not bold"))
    for problem in (cuda["problem"], cuda["nvml"]):
        if problem:
            console.print(Text(f"  {problem}", style="yellow"))
    console.print()
    backends = table("Backends", "backend", "it can run")
    for name, reason in found["backends"].items():
        backends.add_row(name, Text(f"no: {reason}", style="yellow") if reason else Text("yes", style="green"))
    console.print(backends)


def _host() -> dict[str, Any]:
    free = None
    if not _torch_problem():
        import torch

        from gpuclust.free import free_bytes

        free = free_bytes(torch.device("cpu"))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "name": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_bytes": free,
    }


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _torch_problem() -> str | None:
    """Why torch does not even import (a broken installation is what a doctor is asked about), or None."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return f"torch does not import: {first_line(error)}"
    return None


def _cuda_build() -> str | None:
    """The CUDA version torch was built for, read without importing torch."""
    try:
        file = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    except metadata.PackageNotFoundError:
        return None
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and name.split(":")[0].strip() == "cuda":
            return value.strip().strip("'\"") if value.strip() != "None" else None
    return None


def _cuda() -> dict[str, Any]:
    """The NVIDIA cards that torch sees, in torch's order, then those that only the driver sees."""
    facts: dict[str, Any] = {
        "build": _cuda_build(),
        "driver": None,
        "driver_cuda": None,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "problem": _cuda_problem(),
        "nvml": None,
        "devices": [],
    }
    # torch numbers cards its own way (fastest first, or CUDA_VISIBLE_DEVICES): UUID or PCI slot tell which is which.
    known: dict[str, dict[str, Any]] = {}
    try:
        with asked() as nvml:
            version = nvml.nvmlSystemGetCudaDriverVersion()
            facts["driver"] = _text(nvml.nvmlSystemGetDriverVersion())
            facts["driver_cuda"] = f"{version // 1000}.{version % 1000 // 10}"
            for index in range(nvml.nvmlDeviceGetCount()):
                card = _nvml_card(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
                known[card["uuid"]] = card
    except NoDriver as error:
        facts["nvml"] = str(error)
    if not facts["problem"]:
        import torch

        facts["devices"] = [_torch_card(index, known) for index in range(torch.cuda.device_count())]
    facts["devices"] += known.values()
    return facts


def _cuda_problem() -> str | None:
    """Why torch cannot use CUDA, in one line; None if it can."""
    if problem := _torch_problem():
        return problem
    import torch

    if torch.version.cuda is None:
        return (
            "this build of torch has no CUDA; on a machine with an NVIDIA card install the one that pytorch.org names"
        )
    with warnings.catch_warnings():
        # A driver that is too old is a warning from is_available and an error from init.
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f"torch cannot use CUDA: {first_line(error)}"
        return None if torch.cuda.device_count() else "torch sees no CUDA device"


def _torch_card(index: int, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What torch and the driver know of card ``index``; it is taken out of ``known``."""
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    slot = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    uuid = f"GPU-{properties.uuid}"
    if uuid not in known:
        uuid = next((key for key, card in known.items() if card["pci"] == "{:04x}:{:02x}:{:02x}".format(*slot)), uuid)
    driver = known.pop(uuid, None)
    total, free = (driver["total_bytes"], driver["free_bytes"]) if driver else (None, None)
    if total is None or total > 1.25 * properties.total_memory:
        # No answer from the driver, or one for the whole card of which this is a slice (MIG).
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:
            free, total = None, properties.total_memory
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "uuid": uuid,
        "pci": "{:04x}:{:02x}:{:02x}".format(*slot),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "total_bytes": total,
        "free_bytes": free,
    }


def _nvml_card(nvml: Any, handle: Any) -> dict[str, Any]:
    slot = nvml.nvmlDeviceGetPciInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except nvml.NVMLError:
        total, free = None, None  # Cards that share the host's memory have none of their own.
    return {
        "device": None,
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "uuid": _text(nvml.nvmlDeviceGetUUID(handle)),
        "pci": f"{slot.domain:04x}:{slot.bus:02x}:{slot.device:02x}",
        "compute_capability": f"{major}.{minor}",
        "total_bytes": total,
        "free_bytes": free,
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
