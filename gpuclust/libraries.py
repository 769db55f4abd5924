"""What a run needs of other packages, loaded and used once before the network comes: then a plan knows what is free,
nothing of some 200 MB comes in mid-run, and a package that is broken says so before the first pass."""

from __future__ import annotations

import io
from functools import cache
from importlib import import_module

import torch
from torch import nn

_NEEDED = (
    *("pandas", "pandas.io.formats.csvs", "pyarrow.parquet", "pyarrow.pandas_compat", "scipy.optimize"),
    *("sklearn.metrics", "sklearn.metrics.cluster", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("jinja2", "gpuclust.report.page", "gpuclust.report.figures"),
)


def load_libraries() -> None:
    """Import them all."""
    for name in _NEEDED:
        import_module(name)


@cache
def touch_code() -> None:
    """Take each step of a run once in a process, on the CPU, with next to no data.

    A process's memory counts the code that it has run, some 40 MB here, and a limit on memory counts it too: this way
    it is there before the network.
    """
    import pandas
    from matplotlib.figure import Figure
    from PIL import Image

    from gpuclust.capture.decode import encode_thumbnail
    from gpuclust.cluster import KMeans
    from gpuclust.compare.scores import compare
    from gpuclust.compare.similarity import geometry

    encode_thumbnail(Image.open(io.BytesIO(encode_thumbnail(Image.new("RGB", (90, 60))))).resize((70, 70)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 4)
        nn.Sequential(*layers).eval()(torch.rand(2, 3, 4, 4))
        rows = torch.rand(64, 512)
    for solver in ("dual", "primal"):
        labels = KMeans(3, n_init=2, random_state=0, solver=solver).fit(rows).labels_
    geometry(rows, labels, 3, seed=0)
    compare(labels.numpy(), labels.numpy().astype("int64"), 3, 3)
    pandas.DataFrame({"name": ["a"], "label": [1]}).to_parquet(io.BytesIO())
    figure = Figure()
    figure.add_subplot().imshow(rows.numpy())
    figure.savefig(io.BytesIO())
