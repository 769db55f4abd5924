"""What scores, figures and the page need of other packages, loaded before the network comes: then a plan knows what is
free, nothing of some 150 MB comes in mid-run, and a package that is broken says so before the first pass."""

from __future__ import annotations

from importlib import import_module

_NEEDED = (
    *("pandas", "pandas.io.formats.csvs", "pyarrow.parquet", "pyarrow.pandas_compat", "scipy.optimize"),
    *("sklearn.metrics", "sklearn.metrics.cluster", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("jinja2", "gpuclust.report.page", "gpuclust.report.figures"),
)


def load_libraries() -> None:
    """Import them all."""
    for name in _NEEDED:
        import_module(name)
