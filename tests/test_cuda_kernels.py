"""Every kernel of kernels/cuda is compiled here, GPU or not; and the cache of what was compiled."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from gpuclust.cluster.backends.tile import Tile
from gpuclust.kernels import cuda_folder, nvrtc

pytestmark = pytest.mark.nvrtc

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
ROWS = ["Float16", "BFloat16", "float", "double"]
TILES = [Tile(columns, rows) for rows in (64, 128) for columns in (32, 64, 128)]
STREAMED = [Tile(128, rows, streamed=True) for rows in (96, 192)]
WARPGROUPS = [Tile(columns, 64 * groups, stages=4) for columns in (32, 64, 128) for groups in (1, 2, 3, 4)]
CASES = [(file.name, (f"-DROW={row}",)) for file in sorted(cuda_folder().glob("*.cu")) for row in ROWS]
APART = ("assign.cu", "assign_hopper.cu", "decide.cu", "dist2.cu", "prepare.cu", "product.cu", "rescore.cu")
CASES = [case for case in CASES if case[0] not in APART]
CASES += [("product.cu", (f"-DROW={row}", f"-DCOLUMNS={columns}")) for row in ROWS for columns in (16, 32, 64, 128)]
CENTRES = {row: f"-DCENTRE={'double' if row == 'double' else 'float'}" for row in ROWS}
CASES += [("dist2.cu", (f"-DROW={row}", f"-DGROUP={group}", CENTRES[row])) for row in ROWS for group in (32, 256)]
CASES += [
    ("decide.cu", (f"-DROW={row}", CENTRES[row], *levels)) for row in ROWS for levels in ((), ("-DTREE_LEVELS=2",))
]
CASES += [("decide.cu", ("-DROW=float", CENTRES["double"]))]
CASES += [("step.cu", (f"-DROW={row}", "-DTREE_LEVELS=2")) for row in ROWS]
CASES += [
    ("prepare.cu", (f"-DROW={row}", f"-DTHREADS={threads}")) for row in ("float", "double") for threads in (128, 1024)
]
CASES += [("prepare.cu", ("-DROW=float", "-DTHREADS=128", f"-DSWIZZLED_COLUMNS={n}")) for n in (32, 64, 128)]
CASES += [("rescore.cu", (f"-DROW={row}", f"-DWARPS={warps}")) for row in ROWS for warps in (1, 2, 4)]
CASES += [
    ("assign.cu", (f"-DROW={row}", *tile.options))
    for row in ROWS
    for tile in TILES
    if row == "float" or tile == Tile(128, 128)  # the type of the rows matters where they are read, before the tiles
]
CASES += [("assign.cu", ("-DROW=Float16", *tile.options)) for tile in STREAMED]
ON_HOPPER = [
    ("assign_hopper.cu", (f"-DROW={row}", *tile.options))
    for row in ROWS
    for tile in WARPGROUPS
    if row == "float" or tile == WARPGROUPS[-1]
]
# Registers times threads of the blocks that are to share a multiprocessor (65,536), and static shared memory.
MOST_REGISTERS = {"assign": 128, "dist2": 128, "product": 128, "rescore": 128, "decide": 128, "move": 128, "close": 128}
MOST_SHARED_BYTES = {
    "rescore": 4 << 10,
    "decide": 13 << 10,
    "dist2": 16 << 10,
    "assign": 8 << 10,
    "move": 8 << 10,
    "close": 8 << 10,
}


def used(log: str) -> dict[str, dict[str, int]]:
    """What each kernel of a log of ptxas uses."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)Compile time", log, re.DOTALL):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = re.search(r"(\d+) bytes smem", text)
        found[name] = {
            "registers": registers,
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": stack,
            "spilled_bytes": stores + loads,
        }
    return found


# Types that are read as others are make no difference between the devices.
RUNS = [
    (name, options, arch)
    for name, options in CASES
    for arch in ARCHITECTURES
    if arch == "sm_90a" or not {"-DROW=BFloat16", "-DROW=double"} & set(options)
] + [(*case, "sm_90a") for case in ON_HOPPER]


@pytest.mark.parametrize(("name", "options", "arch"), RUNS, ids=lambda value: "".join(value))
def test_every_kernel_compiles_within_its_registers_and_shared_memory(
    name: str, options: tuple[str, ...], arch: str
) -> None:
    cubin, log = nvrtc.build(cuda_folder() / name, arch, options)
    assert cubin.startswith(b"\x7fELF")
    kernels = used(log)
    assert kernels
    assert "wgmma" not in log  # as where it says that products wait for each other
    for kernel, use in kernels.items():
        assert use["spilled_bytes"] == use["stack_bytes"] == 0, (kernel, use)
        alone = "-DSTREAMED_ROWS" in options or (kernel == "product" and "-DROW=double" in options)
        most = 255 if alone else MOST_REGISTERS.get(kernel, 64)
        assert use["registers"] <= most, (kernel, use)
        assert use["shared_bytes"] <= MOST_SHARED_BYTES.get(kernel, 1 << 10), (kernel, use)


def test_what_spills_would_be_seen(folder: Path) -> None:
    source = folder / "spills.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) wide(const double* x, double* y) {\n'
        "  double all[64];\n#pragma unroll\n  for (int i = 0; i < 64; ++i) all[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = all[63 - i] * all[(7 * i) % 64];\n}\n"
    )
    assert used(nvrtc.build(source, "sm_80")[1])["wide"]["spilled_bytes"] > 0


# ---- the cache

SOURCE = '#include "part.cuh"\nextern "C" __global__ void fill(float* out) { out[threadIdx.x] = VALUE; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPUCLUST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "fill.cu").write_text(SOURCE)
    (tmp_path / "part.cuh").write_text('#pragma once\n#include "deep.cuh"\n')
    (tmp_path / "deep.cuh").write_text("#define VALUE 1.0f\n")
    return tmp_path


def test_the_key_covers_all_that_a_cubin_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "fill.cu"
    first = nvrtc.compile(file, "sm_80")
    assert first == nvrtc.compile(file, "sm_80")
    assert first.parent == folder / "cache"
    found = {first, nvrtc.compile(file, "sm_90a"), nvrtc.compile(file, "sm_80", ("-DUNUSED=1",))}
    (folder / "deep.cuh").write_text("#define VALUE 2.0f\n")
    found.add(nvrtc.compile(file, "sm_80"))
    file.write_text(SOURCE + "// more\n")
    found.add(nvrtc.compile(file, "sm_80"))
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "--use_fast_math"))
    found.add(nvrtc.compile(file, "sm_80"))
    monkeypatch.setattr(nvrtc, "compiler", lambda: "99.9")
    found.add(nvrtc.compile(file, "sm_80"))
    assert len(found) == 7
    assert all(path.read_bytes().startswith(b"\x7fELF") for path in found)


def test_what_is_in_the_cache_is_not_compiled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.compile(folder / "fill.cu", "sm_80")
    monkeypatch.setattr(nvrtc, "build", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.compile(folder / "fill.cu", "sm_80") == first


def test_writers_at_the_same_time_leave_one_whole_file(folder: Path) -> None:
    seen: list[bytes] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        seen.append(nvrtc.compile(folder / "fill.cu", "sm_80").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole, _ = nvrtc.build(folder / "fill.cu", "sm_80")
    assert [len(content) for content in seen] == [len(whole)] * 4
    assert len(list((folder / "cache").iterdir())) == 1


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(nvrtc.os, "replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        nvrtc.compile(folder / "fill.cu", "sm_80")
    assert list((folder / "cache").iterdir()) == []


def test_a_source_that_does_not_compile_shows_the_compilers_log(folder: Path) -> None:
    (folder / "fill.cu").write_text(SOURCE.replace("out[", "nowhere["))
    with pytest.raises(nvrtc.CompileError, match=r'fill\.cu does not compile for sm_80(.|\n)*"nowhere" is undefined'):
        nvrtc.compile(folder / "fill.cu", "sm_80")
    assert not (folder / "cache").exists()


def test_the_cubin_is_a_whole_elf_file(folder: Path) -> None:
    cubin, _ = nvrtc.build(folder / "fill.cu", "sm_80")
    headers, size, count = (int.from_bytes(cubin[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58)))
    assert headers + size * count == len(cubin)


def test_without_a_folder_of_its_own_the_cache_is_among_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPUCLUST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path / "gpuclust"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_folder() == Path.home() / ".cache" / "gpuclust"
