"""Peers that need no GPU: scikit-learn, FAISS, fastkmeans, and what a user writes in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpuclust.bench.peers import Found, Peer, Stored, Work, each

_SCORES_BYTES = 1 << 30


class ScikitLearn(Peer):
    """scikit-learn's KMeans (https://scikit-learn.org, sklearn.cluster): the reference for what k-means means."""

    name = "scikit-learn"
    distributions = ("scikit-learn",)
    module = "sklearn"
    x_at = "host"
    note = "on the CPU, float32; a restart ends where its labels repeat"

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        from sklearn.cluster import KMeans

        x = rows.array

        def one(start: torch.Tensor) -> Any:
            # A callable would serve several restarts in one fit, but is given, and must answer in, centred rows.
            return KMeans(len(start), init=start.numpy(), n_init=1, max_iter=iterations, tol=0).fit(x)

        return each(
            one,
            starts.cpu(),
            lambda model: Found(
                torch.from_numpy(model.cluster_centers_), torch.from_numpy(model.labels_), model.n_iter_
            ),
        )

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        from sklearn.cluster import KMeans

        centroids = start.cpu().numpy()
        # A fit of two rows makes a model; its centroids are then the ones that are asked for.
        model = KMeans(1, init=centroids[:1], n_init=1, max_iter=1).fit(rows.array[:2])
        model.n_clusters, model.cluster_centers_ = len(centroids), centroids
        x = rows.array
        return Work(lambda: model.predict(x), lambda labels: [Found(labels=torch.from_numpy(labels))])

    def seed(self, rows: Stored, k: int, seed: int) -> Work:
        from sklearn.cluster import kmeans_plusplus

        x = rows.array
        return Work(
            lambda: kmeans_plusplus(x, k, random_state=seed), lambda found: [Found(torch.from_numpy(found[0].copy()))]
        )


class FaissCpu(Peer):
    """FAISS's Kmeans (https://faiss.ai, `faiss.Kmeans`), without its subsampling to 256 rows per centroid."""

    name = "faiss-cpu"
    distributions = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu", "faiss")
    module = "faiss"
    x_at = "host"
    note = "float32; the labels are those of a last search"
    gpus: int | bool = False

    def _kmeans(self, d: int, k: int, n: int, iterations: int, **parameters: Any) -> Any:
        import faiss

        return faiss.Kmeans(
            d,
            k,
            niter=iterations,
            min_points_per_centroid=1,
            max_points_per_centroid=n,
            gpu=self.gpus,
            **parameters,
        )

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        x, (_, k, d) = rows.array, starts.shape

        def one(start: torch.Tensor) -> Any:
            kmeans = self._kmeans(d, k, len(x), iterations)
            kmeans.train(x, init_centroids=start.cpu().numpy())
            return kmeans.centroids, kmeans.assign(x)[1]

        return each(
            one,
            starts.cpu(),
            lambda found: Found(torch.from_numpy(found[0].copy()), torch.from_numpy(found[1]), iterations),
        )

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        x = rows.array
        kmeans = self._kmeans(x.shape[1], len(start), len(x), 1)
        kmeans.centroids = np.ascontiguousarray(start.cpu().numpy())
        return Work(lambda: kmeans.assign(x)[1], lambda labels: [Found(labels=torch.from_numpy(labels))])

    def seed(self, rows: Stored, k: int, seed: int) -> Work:
        import faiss

        x = rows.array

        def call() -> Any:
            method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
            kmeans = self._kmeans(x.shape[1], k, len(x), 0, init_method=method, seed=seed)
            kmeans.train(x)
            return kmeans.centroids

        return Work(call, lambda centroids: [Found(torch.from_numpy(centroids.copy()))])


class FastKMeans(Peer):
    """fastkmeans (https://github.com/AnswerDotAI/fastkmeans), which takes arrays and moves them itself."""

    name = "fastkmeans"
    distributions = ("fastkmeans",)
    module = "fastkmeans"
    x_at = "host"
    note = "starts from rows that it draws itself: its inertia is of another start; on a GPU it computes in float16"

    def __init__(self) -> None:
        self._gpu = False

    def unavailable(self, device: torch.device) -> str | None:
        self._gpu = device.type == "cuda"
        return super().unavailable(device)

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        from fastkmeans import FastKMeans as Model

        x, (restarts, k, d) = rows.array, starts.shape

        def call() -> Any:
            # A tolerance of -1 is its documentation's way to ask for all iterations.
            models = [Model(d, k, niter=iterations, tol=-1, gpu=self._gpu, seed=seed) for seed in range(restarts)]
            return [(model, model.fit_predict(x)) for model in models]

        return Work(
            call,
            lambda results: [
                Found(torch.from_numpy(model.centroids), torch.from_numpy(labels), iterations)
                for model, labels in results
            ],
        )

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        from fastkmeans import FastKMeans as Model

        x = rows.array
        model = Model(x.shape[1], len(start), gpu=self._gpu)
        model.centroids = start.cpu().numpy()
        return Work(lambda: model.predict(x), lambda labels: [Found(labels=torch.from_numpy(labels))])


class PlainTorch(Peer):
    """What a user of torch writes: cdist and argmin over chunks of rows, index_add, the mean."""

    name = "torch"
    distributions = ("torch",)
    note = "cdist, argmin and index_add in float32, torch's default settings"

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        def one(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            centroids = start
            for _ in range(iterations):
                centroids = _means(rows.x, _nearest(rows.x, centroids), centroids)
            return centroids, _nearest(rows.x, centroids)

        return each(one, starts, lambda found: Found(found[0], found[1], iterations))

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        return Work(lambda: _nearest(rows.x, start), lambda labels: [Found(labels=labels)])

    def update(self, rows: Stored, labels: torch.Tensor, start: torch.Tensor) -> Work:
        return Work(lambda: _means(rows.x, labels, start), lambda centroids: [Found(centroids)])


def _nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    size = max(1, _SCORES_BYTES // (4 * max(centroids.shape)))
    return torch.cat([torch.cdist(rows.float(), centroids).argmin(1) for rows in x.split(size)])


def _means(x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    sums = torch.zeros_like(centroids)
    size = max(1, _SCORES_BYTES // (4 * x.shape[1]))
    for rows, some in zip(x.split(size), labels.split(size), strict=True):
        sums.index_add_(0, some, rows.float())
    counts = torch.bincount(labels, minlength=len(centroids))[:, None]
    return torch.where(counts > 0, sums / counts, centroids)
