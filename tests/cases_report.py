"""Reports made up for the tests of the report: clusters that find the classes better from layer to layer."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans

from gpuclust.compare.result import LayerResult
from gpuclust.report import Report, Samples

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "quo\"te's & co",
    "日本語 $x^2$",
    "{{ 7*7 }}",
)


def thumbs(labels: np.ndarray, seed: int = 0, size: int = 64) -> tuple[bytes, ...]:
    """A WebP per image: stripes whose direction and hue go with the class, and noise."""
    rng, across = np.random.default_rng(seed), np.linspace(0, 1, size)
    x, y = np.meshgrid(across, across)
    images = []
    for label in labels:
        turn = label * 0.9 + rng.normal(0, 0.1)
        wave = 0.5 + 0.5 * np.sin((x * np.cos(turn) + y * np.sin(turn)) * (18 + 3 * label % 7) + rng.uniform(0, 6))
        tint = 0.35 + 0.65 * np.array([np.cos(turn), np.cos(turn + 2.1), np.cos(turn + 4.2)]) ** 2
        noise = rng.normal(0, 0.06, (size, size, 3))
        pixels = (np.clip(wave[..., None] * tint + noise, 0, 1) * 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "WEBP", quality=70)
        images.append(stream.getvalue())
    return tuple(images)


def layer(name: str, x: np.ndarray, truth: np.ndarray, classes: int, k: int, module: str = "") -> LayerResult:
    """What k-means finds in ``x``, scored against the classes with scikit-learn."""
    fit = KMeans(k, n_init=3, random_state=0).fit(x)
    return scored(name, x, fit.labels_, fit.cluster_centers_, truth, classes, module)


def scored(
    name: str,
    x: np.ndarray,
    labels: np.ndarray,
    centroids: np.ndarray,
    truth: np.ndarray,
    classes: int,
    module: str = "",
) -> LayerResult:
    n, k = len(x), len(centroids)
    dist2 = ((x - centroids[labels]) ** 2).sum(1)
    table = np.zeros((k, classes), np.int64)
    np.add.at(table, (labels, truth), 1)
    rows, columns = linear_sum_assignment(-table)
    match = np.full(k, -1, np.int64)
    match[rows] = columns
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    accuracy = table[rows, columns].sum() / n
    some = np.random.default_rng(0).permutation(n)[:400]
    silhouette = metrics.silhouette_score(x[some], labels[some]) if len(set(labels[some])) > 1 else float("nan")
    scores = {
        "purity": table.max(1).sum() / n,
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "ari": metrics.adjusted_rand_score(truth, labels),
        "ami": metrics.adjusted_mutual_info_score(truth, labels),
        "nmi": metrics.normalized_mutual_info_score(truth, labels),
        "homogeneity": metrics.homogeneity_score(truth, labels),
        "completeness": metrics.completeness_score(truth, labels),
        "silhouette": silhouette,
    }
    return LayerResult(
        layer=name, module=module or f"features.{name}", kind="linear" if name.startswith("fc") else "conv",
        shape=(x.shape[1],), n=n, d=x.shape[1], k=k,
        labels=labels.astype(np.int32), dist2=dist2, table=table, match=match,
        projection=(centred @ vectors[:, [-1, -2]]).astype(np.float32),
        explained=tuple(float(value) for value in values[[-1, -2]] / values.sum()),
        scores={key: float(value) for key, value in scores.items()},
        inertia=float(dist2.sum()), n_iter=7, backend="torch", solver="primal", precision="exact",
        rejected={"cupy": "no CUDA device"}, recheck_share=0.0021, capture_s=0.31, cluster_s=0.12,
        peak_bytes=123_456_789, notes={},
    )  # fmt: skip


def chance(truth: np.ndarray, k: int, classes: int) -> dict[str, float]:
    """Scores of clusters drawn at random."""
    rng = np.random.default_rng(0)
    accuracy, purity = [], []
    for _ in range(20):
        table = np.zeros((k, classes), np.int64)
        np.add.at(table, (rng.integers(0, k, len(truth)), truth), 1)
        rows, columns = linear_sum_assignment(-table)
        accuracy.append(table[rows, columns].sum() / len(truth))
        purity.append(table.max(1).sum() / len(truth))
    best = float(np.mean(accuracy))
    return {"accuracy": best, "error": 1 - best, "purity": float(np.mean(purity)), "ari": 0.0, "ami": 0.0}


def run() -> dict:
    """What a run says of itself."""
    return {
        "options": {"layers": ["auto"], "per_class": 100, "n_init": 10, "seed": 0, "memory_limit": None},
        "network": {"name": "alexnet", "weights": "AlexNet_Weights.IMAGENET1K_V1", "layers": 8},
        "images": {
            "source": "pictures/", "per_class": 100, "replaced": 1,
            "skipped": [{"path": "pictures/dog/broken.jpg", "class": "dog", "reason": "truncated: 1204 bytes missing"},
                        {"path": "pictures/mug/<b>.png", "class": "mug", "reason": "169 megapixels, the limit is 100"}],
        },
        "plan": {
            "rows": [{"layer": "conv1", "bytes": "387 MB", "place": "device"},
                     {"layer": "fc6", "bytes": "8.2 MB", "place": "device"}],
            "total": "395 MB",
        },
        "versions": {"gpuclust": "0.1.0", "torch": "2.14.0", "python": "3.12.4"},
        "hardware": {"device": "cpu", "cores": 2, "memory": "24 GB"},
        "seeds": {"images": 0, "k-means": 0},
        "times": {"capture_s": 6.1, "cluster_s": 3.2},
        "command": "gpuclust run pictures/ --model alexnet",
    }  # fmt: skip


def report(
    layers: int = 8,
    classes: int = 5,
    per_class: int = 40,
    k: int | None = None,
    names: tuple[str, ...] | None = None,
    strength: list[float] | None = None,
    pictures: bool = True,
    seed: int = 0,
) -> Report:
    """A report whose layers hold the classes with the given ``strength`` (0 nothing, 3 clearly), rising by default."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), per_class)
    strength = list(np.linspace(0, 1.0, layers) ** 2 * 3) if strength is None else strength
    middles = rng.normal(size=(classes, 12))
    results = []
    for index, value in enumerate(strength):
        x = rng.normal(size=(len(truth), 12)) + value * middles[truth]
        name = f"conv{index + 1}" if index < len(strength) - 3 or len(strength) < 4 else f"fc{index + 1}"
        results.append(layer(name, x, truth, classes, k or classes))
    names = names or ("car", "dog", "flower", "chair", "mug", "boat", "bird", "clock", "shoe", "lamp")[:classes]
    names = names if len(names) == classes else tuple(f"class {index:03d}" for index in range(classes))
    paths = tuple(f"pictures/{names[label]}/{index:05d}.jpg" for index, label in enumerate(truth))
    samples = Samples(paths, truth, tuple(names), thumbs(truth) if pictures else ())
    return Report(results, samples, chance(truth, k or classes, classes), run())
