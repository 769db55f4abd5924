"""The command line. Every command loads what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import atexit
import errno
import io
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gpuclust import __version__
from gpuclust.config import (
    ALGORITHMS,
    BACKENDS,
    DECODERS,
    DEVICES,
    DTYPES,
    INITS,
    METRICS,
    PRECISIONS,
    SOLVERS,
    parse_bytes,
)
from gpuclust.errors import GpuclustError, InputError

if TYPE_CHECKING:
    from gpuclust.report import Report

app = typer.Typer(
    name="gpuclust",
    help="What each layer of a convolutional network has learned, read off without labels.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


# typer brings its own copy of click or uses an installed one, depending on its version.
_UsageError: Any = typer.BadParameter.__bases__[0]


# How profilers come into a process; they write what they have when its libraries tidy up.
_INJECTIONS = ("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH")


def main() -> None:
    """The console script. Exit codes: 0 done, 1 a fault, 2 bad arguments or input, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"gpuclust: {message}\n"
    _leave(run_command(sys.argv[1:]))


def _leave(code: int) -> NoReturn:
    """End the process as Python does, but for the libraries' own tidying up, unless a profiler awaits that.

    CUDA's libraries read 140 MB of themselves for it, even where there is no GPU: more than a memory limit may allow.
    """
    if any(name in os.environ for name in _INJECTIONS):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):  # whoever read it has gone; else the disk is full
                with suppress(OSError):
                    os.write(2, f"gpuclust: cannot write the output: {error.strerror or error}\n".encode())
            code = code or 1
    os._exit(code)


def run_command(arguments: list[str]) -> int:
    """Run one command line; the exit code."""
    try:
        return int(app(arguments, prog_name="gpuclust", standalone_mode=False) or 0)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "gpuclust"
        return _complain(f"{error.format_message()} (`{command} --help` shows what is allowed)", 2)
    except InputError as error:
        return _complain(str(error), 2)
    except GpuclustError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more while it ends.
        sys.stdout = None
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _complain(f"cannot write: {error.strerror}", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)


def _complain(message: str, code: int) -> int:
    line = re.sub(r"\s*\n\s*", " ", message)
    typer.echo(f"gpuclust: {line}", err=True)
    return code


# ---- options that several commands share

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Class folders, a manifest .csv (path,label), torchvision:NAME:ROOT, or package.module:callable.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="A torchvision classifier, timm:NAME, or package.module:callable (a module, or module and transform).",
    ),
]
Weights = Annotated[
    str,
    typer.Option(metavar="DEFAULT|NAME|none|PATH", help="Published weights, none (random), or a .pth or .safetensors."),
]
Layers = Annotated[
    list[str],
    typer.Option(metavar="auto|all|PATTERN", help="Layers by name or glob; may be repeated and joined by commas."),
]
Clusters = Annotated[
    int | None, typer.Option(metavar="N", help="Clusters per layer; the number of classes by default.")
]
Classes = Annotated[str | None, typer.Option(metavar="A,B,C", help="Only these classes.")]
ClassLevel = Annotated[
    int | None, typer.Option(metavar="N", help="Cut the folder path that names a class after N folders.")
]
PerClass = Annotated[
    int | None, typer.Option(metavar="K", help="Images of each class; what the smallest class has by default.")
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help=f"{DEVICES}.")]
Backend = Annotated[str, typer.Option(metavar="|".join(BACKENDS), help="What computes the clusters.")]
Solver = Annotated[str, typer.Option(metavar="|".join(SOLVERS), help="How the clusters are computed.")]
Precision = Annotated[str, typer.Option(metavar="|".join(PRECISIONS), help="fast drops the re-check of close labels.")]
Dtype = Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Of the stored activations.")]
MemoryLimit = Annotated[str | None, typer.Option(metavar="SIZE", help="The most memory to use, as 8GiB.")]
BatchSize = Annotated[
    str,
    typer.Option(
        metavar="auto|N", help="Images of one forward pass (auto: by the network, at most 32 on a CPU, 128 on a GPU)."
    ),
]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Processes that decode images; by default one per core on a GPU.")
]
NInit = Annotated[int, typer.Option(metavar="N", help="Restarts of k-means, of which the best counts.")]
MaxIter = Annotated[int, typer.Option(metavar="N", help="Iterations of one restart at most.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the choice of images, the clusters and random weights.")]
OnBadImage = Annotated[str, typer.Option(metavar="skip|fail", help="What to do with an image that cannot be read.")]
Decoder = Annotated[
    str, typer.Option(metavar="|".join(DECODERS), help="What reads JPEG files; torchcodec's pixels differ a little.")
]
MaxPixels = Annotated[int, typer.Option(metavar="N", help="An image of more pixels is a bad image.")]
Reduce = Annotated[
    list[str],
    typer.Option(
        metavar="[PATTERN=]KIND",
        help="Keep fewer values of layers: avgpool, maxpool, sketch:M or none; may be repeated, later ones win.",
    ),
]
Spill = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder where rows may wait that fit no memory; nowhere by default.")
]
Force = Annotated[bool, typer.Option("--force", help="Remove the run that is there and start over.")]


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        typer.echo(f"gpuclust {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    data: Data,
    model: Model,
    weights: Weights = "DEFAULT",
    layers: Layers = ["auto"],  # noqa: B006
    clusters: Clusters = None,
    classes: Classes = None,
    class_level: ClassLevel = None,
    per_class: PerClass = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the report; gpuclust-MODEL by default.")
    ] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    solver: Solver = "auto",
    precision: Precision = "exact",
    dtype: Dtype = "float32",
    memory_limit: MemoryLimit = None,
    batch_size: BatchSize = "auto",
    workers: Workers = None,
    n_init: NInit = 10,
    max_iter: MaxIter = 300,
    seed: Seed = 0,
    on_bad_image: OnBadImage = "skip",
    max_pixels: MaxPixels = 100_000_000,
    decoder: Decoder = "pillow",
    reduce: Reduce = [],  # noqa: B006
    spill: Spill = None,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write torch's trace of the first steps there (.json, .json.gz).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    force: Force = False,
) -> None:
    """Cluster every layer's activations, beside the classes: a page."""
    options = _options(locals(), "data", "model", "out", "resume", "force")  # the trace is no option of the result
    folder = out or f"gpuclust-{re.sub(r'[^A-Za-z0-9._-]+', '-', model).strip('-.')}"
    _analyze(model, data, folder, resume=resume, force=force, **options)


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the report.")] = "gpuclust-demo",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """The same on the network and images in the package, no download."""
    from gpuclust.demo import demo_dataset, demo_network
    from gpuclust.report.folder import read_model

    network = demo_network()
    again = read_model(out) == type(network[0]).__name__
    _analyze(network, demo_dataset(), out, force=force or again, device=device)


@app.command()
def layers(
    model: Model,
    weights: Annotated[
        str, typer.Option(metavar="DEFAULT|NAME|none|PATH", help="Published ones are not downloaded for this.")
    ] = "DEFAULT",
    layers: Layers = ["all"],  # noqa: B006
    input: Annotated[
        str | None, typer.Option(metavar="CxHxW", help="Shape of an image, where the network does not tell.")
    ] = None,
) -> None:
    """List a network's layers: name, module, shape, values per image."""
    from gpuclust.analysis import list_layers

    rows = [
        (layer.name, _source(layer), "x".join(map(str, layer.shape)), f"{layer.values:,}", "auto" if layer.auto else "")
        for layer in list_layers(model, weights, layers, _shape(input))
    ]
    rows.insert(0, ("layer", "module", "shape", "values/image", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for name, module, shape, values, auto in rows:
        line = f"{name:<{widths[0]}}  {module:<{widths[1]}}  {shape:>{widths[2]}}  {values:>{widths[3]}}  {auto}"
        typer.echo(line.rstrip())


@app.command()
def plan(
    model: Model,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="As for run; or --images.")] = None,
    weights: Weights = "DEFAULT",
    images: Annotated[int | None, typer.Option(metavar="N", help="Plan for so many images, in place of DATA.")] = None,
    card: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for a GPU of so much memory, as 80GB, which need not be here."),
    ] = None,
    layers: Layers = ["auto"],  # noqa: B006
    clusters: Clusters = None,
    classes: Classes = None,
    class_level: ClassLevel = None,
    per_class: PerClass = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    memory_limit: MemoryLimit = None,
    batch_size: BatchSize = "auto",
    n_init: NInit = 10,
    seed: Seed = 0,
    reduce: Reduce = [],  # noqa: B006
    spill: Spill = None,
) -> None:
    """How a run would handle each layer: bytes, passes, seconds."""
    options = _options(locals(), "data", "model", "images", "card")
    from gpuclust.analysis import plan as make_plan

    typer.echo(str(make_plan(model, data, images=images, card=card, **options)))


@app.command()
def cluster(
    file: Annotated[Path, typer.Argument(metavar="X.npy", help="Rows (n, d), as NumPy saves them.")],
    clusters: Annotated[int, typer.Option(metavar="K", help="Number of clusters.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the labels go (int32 .npy); X.labels.npy by default.")
    ] = None,
    init: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Where restarts begin: {', '.join(INITS)} (k-means|| for many clusters)."),
    ] = "k-means++",
    n_init: NInit = 10,
    max_iter: MaxIter = 300,
    tol: Annotated[
        float, typer.Option(metavar="X", help="Movement of the centroids that ends a restart, by the variance.")
    ] = 1e-4,
    seed: Annotated[int, typer.Option(metavar="N", help="Of where the restarts begin.")] = 0,
    algorithm: Annotated[
        str, typer.Option(metavar="|".join(ALGORITHMS), help="hartigan-wong goes on with moves of single rows.")
    ] = "lloyd",
    metric: Annotated[str, typer.Option(metavar="|".join(METRICS), help="cosine compares directions.")] = "euclidean",
    device: Device = "auto",
    backend: Backend = "auto",
    solver: Solver = "auto",
    precision: Precision = "exact",
    memory_limit: MemoryLimit = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the labels that are there.")] = False,
) -> None:
    """k-means on a file of rows, for scripts."""
    from gpuclust.rows import cluster_file

    target = out or file.parent / f"{file.stem}.labels.npy"
    fit, seconds = cluster_file(
        file,
        target,
        clusters,
        force=force,
        init=init,
        n_init=n_init,
        max_iter=max_iter,
        tol=tol,
        random_state=seed,
        algorithm=algorithm,
        metric=metric,
        device=device,
        backend=backend,
        solver=solver,
        precision=precision,
        memory_limit=parse_bytes(memory_limit) if memory_limit else None,
    )
    n, d = len(fit.labels), fit.centroids.shape[1]
    moves = f"  moves {fit.moves}" if algorithm == "hartigan-wong" else ""
    typer.echo(
        f"n {n}  d {d}  k {clusters}  inertia {fit.inertia:.10g}  iterations {fit.n_iter}{moves}  "
        f"seconds {seconds:.3f}  re-checked {fit.recheck_share:.4%}  backend {fit.backend}  solver {fit.solver}"
    )
    if fit.plan:
        typer.echo(f"plan: {fit.plan}")
    typer.echo(f"rows: {fit.rows}")
    for note in fit.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"labels: {target}")


@app.command()
def bench(
    n: Annotated[int, typer.Option("-n", metavar="N", help="Rows.")],
    d: Annotated[int, typer.Option("-d", metavar="D", help="Values of a row.")],
    k: Annotated[int, typer.Option("-k", metavar="K", help="Clusters.")],
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Of the rows.")] = "float32",
    device: Device = "auto",
    iterations: Annotated[int, typer.Option(metavar="N", help="Of a fit; no tolerance ends it.")] = 10,
    n_init: Annotated[int, typer.Option(metavar="N", help="Restarts of a fit, each from its own centroids.")] = 1,
    ops: Annotated[
        str, typer.Option(metavar="A,B,C", help="Some of assign,update,iteration,fit,seed.")
    ] = "assign,update,iteration,fit,seed",
    peers: Annotated[
        str, typer.Option(metavar="all|none|A,B,C", help="Who is measured beside gpuclust; a wrong name lists them.")
    ] = "all",
    rows: Annotated[Path | None, typer.Option(metavar="FILE", help="CSV file that the rows are appended to.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the rows and the starting centroids.")] = 0,
) -> None:
    """Throughput of each backend and installed peer, beside the limits."""
    from gpuclust.bench.case import Case
    from gpuclust.bench.command import bench as measure

    case = Case(n, d, k, dtype=dtype, iterations=iterations, n_init=n_init, seed=seed)
    measure(case, device=device, ops=ops, peers=peers, rows=rows, say=typer.echo)


@app.command()
def doctor() -> None:
    """Devices, memory, backends: what can run here, and why not."""
    from rich.console import Console

    from gpuclust.doctor import show

    show(Console(width=None if sys.stdout.isatty() else 140))


# ---- what the commands share


def _options(given: dict[str, Any], *others: str) -> dict[str, Any]:
    """A command's options as `analyze` takes them."""
    options = {name: value for name, value in given.items() if name not in others}
    size = options.get("batch_size", "auto")
    if size != "auto" and not re.fullmatch(r"[1-9]\d*", size):
        raise InputError(f"--batch-size is auto or a whole number of at least 1; got {size!r}")
    options["batch_size"] = None if size == "auto" else int(size)
    return options


def _analyze(model: Any, data: Any, out: str, **options: Any) -> None:
    from rich.console import Console

    from gpuclust.analysis import analyze

    try:
        report = analyze(model, data, out=out, **options)
    except KeyboardInterrupt as error:
        kept = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        advice = ", and --resume goes on from there" if "are done" in kept and "resume" in options else ""
        raise typer.Exit(_complain(f"interrupted{kept}{advice}", 130)) from None
    Console(width=None if sys.stdout.isatty() else 140).print(report.table())
    if note := report.run["network"]["notes"].get("transform"):
        typer.echo(f"transform: {note}")
    _tell_skipped(report)
    typer.echo(f"page: {Path(out, 'report.html')}")


def _tell_skipped(report: Report) -> None:
    skipped = report.run["images"]["skipped"]
    if skipped:
        first = skipped[0]
        typer.echo(
            f"{len(skipped)} bad images were left out, {report.run['images']['replaced']} of them replaced; the first: "
            f"{first['path']}: {first['reason']} (all are in run.json and on the page)"
        )


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"--input is CxHxW, as 3x224x224; got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def _source(layer: Any) -> str:
    """Where the activation comes from: the module, which of its calls, and what is applied to it."""
    call = f":{layer.call}" if layer.call else ""
    return f"{layer.module}{call}" + (f"+{layer.after}" if layer.after else "")
