"""LayerResult: all that is known of one layer once it is clustered; what a run writes as each layer is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gpuclust.files import replacing

# The columns of layers.csv, in order. Times and peak_bytes are the only ones that two equal runs may differ in.
COLUMNS = [
    *("layer", "module", "kind", "n", "d", "k", "purity", "accuracy", "error", "ari", "ami", "nmi"),
    *("homogeneity", "completeness", "silhouette", "inertia", "n_iter", "backend", "solver"),
    *("capture_s", "cluster_s", "peak_bytes"),
]
_ARRAYS = ("labels", "dist2", "table", "match", "projection")


@dataclass(frozen=True)
class LayerResult:
    """The clusters of one layer beside the classes.

    Attributes
    ----------
    layer, module, kind : str
        Friendly name (``conv1``), qualified module name (``features.1``), and ``conv``, ``linear``, ``block`` or
        ``pool``.
    shape : tuple of int
        Shape of one image's activations.
    n, d, k : int
        Rows (images), values per row, clusters.
    labels : int32 array (n,)
        Cluster of each image, in the order of the run's samples.
    dist2 : float64 array (n,)
        Squared distance of each row to its centroid, in the units of the activations.
    table : int64 array (k, n_classes)
        Images of each class in each cluster.
    match : int64 array (k,)
        Class matched to each cluster by the best one-to-one matching; -1 for a cluster that is left over.
    projection : float32 array (n, 2)
        First two principal components of the rows.
    explained : tuple of float
        Share of the variance that each of the two components explains.
    scores : dict
        ``purity accuracy error ari ami nmi homogeneity completeness silhouette``; silhouette may be NaN.
    inertia : float
        Sum of the squared distances, in the units of the activations.
    n_iter : int
        Iterations of the best restart.
    backend, solver, precision : str
        What ran.
    rejected : dict
        Backends passed over, with the reason of each.
    recheck_share : float
        Share of the assignments that were decided by the float64 reference distance.
    capture_s, cluster_s : float
        Seconds. The pass over the images serves all layers: capture_s is its share by bytes.
    peak_bytes : int
        Peak device memory while the layer was clustered (the process's peak on a CPU).
    notes : dict
        Everything else worth telling: silhouette sample, fp16 scale.
    """

    layer: str
    module: str
    kind: str
    shape: tuple[int, ...]
    n: int
    d: int
    k: int
    labels: np.ndarray
    dist2: np.ndarray
    table: np.ndarray
    match: np.ndarray
    projection: np.ndarray
    explained: tuple[float, ...]
    scores: dict[str, float]
    inertia: float
    n_iter: int
    backend: str
    solver: str
    precision: str
    rejected: dict[str, str]
    recheck_share: float
    capture_s: float
    cluster_s: float
    peak_bytes: int
    notes: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The layer's row of layers.csv."""
        values = {**{f.name: getattr(self, f.name) for f in fields(self)}, **self.scores}
        return {name: values[name] for name in COLUMNS}

    def save(self, path: Path) -> None:
        """Write to ``path`` (.npz); a file under its final name is whole."""
        plain = {name: value for name, value in asdict(self).items() if name not in _ARRAYS}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, plain=np.array(json.dumps(plain)), **arrays)

    @classmethod
    def load(cls, path: Path) -> LayerResult:
        """Read what ``save`` wrote."""
        with open(path, "rb") as whole, np.load(whole, allow_pickle=False) as file:
            plain = json.loads(str(file["plain"]))
            arrays = {name: file[name] for name in _ARRAYS}
        plain["shape"] = tuple(plain["shape"])
        plain["explained"] = tuple(plain["explained"])
        return cls(**plain, **arrays)
