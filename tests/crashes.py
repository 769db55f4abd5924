"""Runs that end in the middle: each in a process forked from one that has imported everything, so that it costs little.

``Runs`` is for the tests; this file itself is what it starts.
"""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

IMAGES = 24  # the three classes of `cases_run.write_folder`, eight of each
# What a process does to a folder, by the names of Python's audit events.
_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Where the run of this process ends, and how: in a dict, for a run and the one that goes on with it differ in nothing
# that counts.
_fault: dict[str, Any] = {}
_FIGURES = ("trend", "heatmaps", "projections", "figure2")


class Runs:
    """Runs of the small network on a folder of pictures, one after the other."""

    def __init__(self, data: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A fork has none of the threads of its parent; torch would wait for them.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def __call__(self, out: Path, **asked: Any) -> tuple[int, str]:
        """A run's exit code, or minus the signal that ended it, and its error; ``asked`` is as in `_run`.

        With ``kill_after_s`` the run is killed then; with ``wait=False`` it is left to go on, and its process is told.
        """
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps({"out": str(out), **asked}), file=self._process.stdin, flush=True)
        code, said = json.loads(self._process.stdout.readline())
        return code, said

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _serve(data: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _run(data, f"{folder}/warm", drawn=True)  # imports and fonts, which each run would have to load
    gc.collect()
    gc.freeze()  # nor need each collection of garbage look through them
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run prints is no answer
    for line in sys.stdin:
        print(json.dumps(_fork(data, json.loads(line))), file=answers, flush=True)


def _fork(data: str, asked: dict[str, Any]) -> tuple[int, str]:
    kill_after_s, wait = asked.pop("kill_after_s", None), asked.pop("wait", True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _run(data, **asked)
            code = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb", buffering=0) as told:
        if not wait:
            return 0, str(child)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.set_blocking(reading, False)  # what it left behind may hold the other end
        return os.waitstatus_to_exitcode(status), (told.read(1 << 16) or b"").decode()


def _run(
    data: str,
    out: str,
    *,
    stage: str = "",
    call: int = 1,
    end: str = "kill",
    drawn: bool = False,
    file_bytes: int | None = None,
    user: int | None = None,
    **options: Any,
) -> None:
    """One run that ends at the ``call``-th call of a stage, ``options`` being those of `analyze`.

    Parameters
    ----------
    stage : str
        ``decode``, ``forward``, ``store``, ``cluster``, or ``write``, which is any change of the run's folder.
    end : str
        See `_strike`.
    drawn : bool
        Whether chance levels, figures and page are made, which takes most of the time of so small a run.
    file_bytes : int, optional
        No file can be larger: the system ends a write in the middle.
    user : int, optional
        Whose rights the run has.
    """
    import resource

    import cases_run as cases

    import gpuclust
    from gpuclust import analysis
    from gpuclust.capture.store import LayerStore
    from gpuclust.cluster import KMeans
    from gpuclust.report import figures, page

    watched = bool(_fault)  # by the process that this one is forked from
    _fault.update(stage=stage, call=call, calls=itertools.count(1), end=end, out=Path(out))

    def before(owner: Any, name: str, stage: str, where: Callable[..., bool] = lambda *_: True) -> None:
        plain = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            if where(*given):
                _at(stage)
            return plain(*given, **named)

        setattr(owner, name, called)

    def transform(picture: Any) -> Any:
        _at("decode")
        return cases.to_tensor(picture)

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in _CHANGES and str(given[0]).startswith(f"{out}/"):
            if event == "open" and not given[2] & _TO_WRITE:
                return
            if event == "os.remove" and not os.path.lexists(given[0]):
                return
            if next(_fault["calls"]) == call:
                if end == "half" and event == "os.rename":
                    os.truncate(given[0], os.path.getsize(given[0]) // 2)
                _strike(end, Path(out))

    if not drawn:
        figures.draw_figures = lambda report: iter([(name, b"drawn") for name in _FIGURES])
        page.render_page = lambda report: "page"
        analysis.chance_levels = lambda *_, **__: {}
    if not watched:
        before(cases.SmallNet, "forward", "forward")
        before(LayerStore, "append", "store")
        # The estimator is tried on one row before the first pass.
        before(KMeans, "fit", "cluster", lambda estimator, rows, *_: rows.shape[0] == IMAGES)
    if stage == "write":
        sys.addaudithook(watch)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if user is not None:
        os.setuid(user)
    network = cases.small_net(options.pop("weights_seed", 0))
    gpuclust.analyze((network, transform), data, out=out, progress=False, batch_size=10, **options)


def _at(stage: str) -> None:
    """What each stage begins with."""
    if stage == _fault["stage"] and next(_fault["calls"]) == _fault["call"]:
        _strike(_fault["end"], _fault["out"])


def _strike(end: str, out: Path) -> None:
    """End the run: an ``error``, a ``full`` disk, an ``interrupt``, ``exit``, ``kill``; or ``wait`` for ever.

    ``half`` kills it while a file is half written, where it is about to be renamed.
    ``orphan`` kills it, but not a process forked from it, which writes its number to ``OUT.orphan``; ``removed`` and
    ``replaced`` are what becomes of its folder.
    """
    if end == "error":
        raise RuntimeError("an injected fault")
    if end == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if end == "interrupt":
        raise KeyboardInterrupt
    if end == "exit":
        os._exit(3)
    if end in ("removed", "replaced"):
        shutil.rmtree(out)
        if end == "replaced":
            (out / ".state").mkdir(parents=True)
            (out / ".state/lock").touch()
        return
    beside = out.with_name(out.name + f".{end}")
    if end == "wait" or (end == "orphan" and os.fork() == 0):
        beside.write_text(str(os.getpid()))
        _sleep()
    while end == "orphan" and not beside.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep() -> NoReturn:
    time.sleep(120)
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
