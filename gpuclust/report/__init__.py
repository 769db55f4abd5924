"""The report of a run: files, figures and one page to read."""

from gpuclust.report.report import Report, Samples, load_report

__all__ = ["Report", "Samples", "load_report"]
