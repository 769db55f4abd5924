"""The wheel: what a user gets from `pip install .`, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and sees the packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "gpuclust", source / "gpuclust", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    (wheel,) = folder.glob("gpuclust-*.whl")
    assert wheel.stat().st_size < 3_000_000

    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "parent.pth").write_text("\n".join(seen))
    install = [*pip, "--python", str(environment / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, cwd=folder)
    return environment / "bin"


def run(bin_folder: Path, name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "GPUCLUST_"))}
    return subprocess.run(
        [str(bin_folder / name), *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def require_the_readmes_numbers(table: list[str]) -> None:
    """The table is the README's, but for an image or two that another processor's rounding moves."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = readme.index("    " + table[0])
    for shown, line in zip(readme[start : start + len(table)], table, strict=True):
        for told, found in zip(shown.split(), line.split(), strict=True):
            assert told == found or float(found) == pytest.approx(float(told), abs=0.02)


def test_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "python", "-c", "import gpuclust; print(gpuclust.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent)
    done = run(installed, "gpuclust", "demo", "--out", "page", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *table, page = done.stdout.splitlines()
    assert page == "page: page/report.html"
    require_the_readmes_numbers(table)
    written = {path.name for path in (tmp_path / "page").iterdir()}
    assert {"report.html", "layers.csv", "assignments.parquet", "run.json", "figures"} <= written


def test_kernels_are_found_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    sources = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").glob("*/*.[pc]*")}
    shown = run(
        installed,
        "python",
        "-c",
        "import gpuclust.kernels as kernels\nfrom importlib.util import find_spec\n"
        "found = [find_spec(f'gpuclust.kernels.triton.{name}').origin for name in ('assign', 'accumulate')]\n"
        "print(kernels.cuda_folder(), *found)",
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    cuda, *modules = (Path(place) for place in shown.stdout.split())
    root = cuda.parent
    assert root.is_relative_to(installed.parent)
    assert modules == [root / "triton" / "assign.py", root / "triton" / "accumulate.py"]
    assert sources <= {path.relative_to(root) for path in root.glob("*/*")}


def test_nothing_but_the_package_is_installed(installed: Path) -> None:
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    own = {path.name for path in packages.iterdir()} - {"parent.pth", "__pycache__"}
    assert {name.partition("-")[0] for name in own} == {"gpuclust"}
    assert not list(packages.glob("gpuclust/**/test_*.py"))
