"""The rooms of the package: who imports whom, what an import costs, how long a file may be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpuclust"
FILES = sorted(PACKAGE.rglob("*.py"))
KERNELS = [file for file in sorted((ROOT / "kernels").rglob("*.*")) if file.suffix in (".py", ".cu", ".cuh")]
HEAVY = ["sklearn", "pandas", "matplotlib", "torchvision", "scipy", "jinja2", "rich", "typer", "PIL"]
OTHER_ROOMS = [
    "gpuclust.bench",
    "gpuclust.capture",
    "gpuclust.compare",
    "gpuclust.report",
    "gpuclust.demo",
    "gpuclust.cli",
]


def loaded_by(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after ``code``."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=True,
    )
    return set(json.loads(shown.stdout.splitlines()[-1]))


def imported_by(file: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def inside(names: set[str], rooms: list[str]) -> set[str]:
    return {name for name in names for room in rooms if name == room or name.startswith(room + ".")}


def test_the_estimator_costs_torch_and_numpy_alone() -> None:
    loaded = loaded_by("import gpuclust.cluster")
    assert {"torch", "numpy"} <= loaded
    assert not inside(loaded, HEAVY + OTHER_ROOMS)


def test_a_fit_loads_no_more() -> None:
    loaded = loaded_by(
        "import torch\nfrom gpuclust import KMeans\n"
        "m = KMeans(2, random_state=0).fit(torch.arange(12.0).view(6, 2))\n"
        "m.predict(torch.ones(1, 2)), m.transform(torch.ones(1, 2)), repr(m), m.get_params()"
    )
    assert not inside(loaded, HEAVY + OTHER_ROOMS)


def test_the_package_itself_costs_nothing() -> None:
    loaded = loaded_by("import gpuclust\ndir(gpuclust), gpuclust.__version__")
    assert not inside(loaded, [*HEAVY, *OTHER_ROOMS, "torch", "numpy"])


@pytest.mark.parametrize("file", sorted((PACKAGE / "cluster").rglob("*.py")), ids=lambda file: file.name)
def test_cluster_imports_no_other_room(file: Path) -> None:
    assert not inside(imported_by(file), OTHER_ROOMS)


@pytest.mark.parametrize("room", ["compare", "report"])
def test_results_are_compared_and_shown_without_a_network(room: str) -> None:
    for file in sorted((PACKAGE / room).rglob("*.py")):
        assert not inside(imported_by(file), ["gpuclust.capture", "gpuclust.cli"]), file


def test_only_the_command_line_knows_the_benchmarks() -> None:
    for file in FILES:
        if file.parent != PACKAGE / "bench" and file != PACKAGE / "cli.py":
            assert not inside(imported_by(file), ["gpuclust.bench"]), file
    for file in sorted((PACKAGE / "bench").glob("*.py")):
        rooms = [room for room in OTHER_ROOMS if room != "gpuclust.bench"]
        assert not inside(imported_by(file), [*rooms, "gpuclust.analysis", "gpuclust.prepare"]), file


def test_only_one_file_reads_the_environment_variables() -> None:
    readers = [
        file.relative_to(PACKAGE).as_posix()
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("os.environ.get", "os.getenv", "environ.get")
        and node.args
        and "GPUCLUST_" in ast.unparse(node.args[0])
    ]
    assert set(readers) == {"config.py"}


@pytest.mark.parametrize("file", FILES + KERNELS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_file_is_longer_than_500_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 500


def test_every_folder_with_modules_is_a_package_of_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    kernels = {f"gpuclust.kernels.{folder.name}" for folder in (ROOT / "kernels").iterdir() if folder.is_dir()}
    assert set(setuptools["packages"]) == there | kernels
    for name in there:
        assert (ROOT.joinpath(*name.split(".")) / "__init__.py").is_file()
    assert setuptools["package-dir"] == {name: name.removeprefix("gpuclust.").replace(".", "/") for name in kernels}
    kinds = {pattern for name in kernels for pattern in setuptools["package-data"].get(name, ())} | {"*.py"}
    for file in (ROOT / "kernels").rglob("*.*"):
        assert file.parent == ROOT / "kernels" or file.suffix in ("", ".pyc") or f"*{file.suffix}" in kinds, file


def test_kernels_are_no_package_of_their_own_and_each_has_its_row() -> None:
    # A package of that name at the top of the checkout would shadow another project's.
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    table = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    for file in (ROOT / "kernels").glob("*/*.[pc]*"):
        assert f"`{file.relative_to(ROOT / 'kernels')}`" in table


def test_kernels_are_found_from_a_bare_checkout_without_loading_a_compiler() -> None:
    loaded = loaded_by("import gpuclust.kernels as kernels, gpuclust.cluster\nassert kernels.cuda_folder().is_dir()")
    assert "torch" in loaded
    assert not inside(loaded, ["triton", "cupy"])
