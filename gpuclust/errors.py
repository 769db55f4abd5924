"""The errors that gpuclust raises on purpose: what was asked, what is allowed, what was got, what to do."""

from __future__ import annotations


class GpuclustError(Exception):
    """Base of every error that gpuclust raises on purpose; the command line answers exit code 1."""


class InputError(GpuclustError, ValueError):
    """Arguments or input that cannot be used as given; the command line answers exit code 2."""


class UnavailableError(InputError):
    """Something asked for by name cannot run on this machine: a backend, a device, weights behind a network."""


class MemoryLimitError(InputError):
    """The run needs more memory than there is, known before any pass is made."""
