"""Peers that need a GPU: FAISS, flash-kmeans, FlashLib, cuML."""

from __future__ import annotations

from typing import Any

import torch

from gpuclust.bench.peers import Found, Peer, Stored, Work, each
from gpuclust.bench.peers_cpu import FaissCpu


class _NeedsCuda(Peer):
    def unavailable(self, device: torch.device) -> str | None:
        missing = super().unavailable(device)
        return missing or (None if device.type == "cuda" else f"{self.name} needs a CUDA device")


class FaissGpu(FaissCpu, _NeedsCuda):
    """FAISS's Kmeans with ``gpu=1``: the search on the GPU, the update on the CPU, as it is documented."""

    name = "faiss-gpu"
    distributions = ("faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu", "faiss")
    note = "takes rows of the host and copies them in each iteration; float32"
    torch_memory = False
    gpus = 1

    def unavailable(self, device: torch.device) -> str | None:
        missing = super().unavailable(device)
        if missing is None:
            import faiss

            if faiss.get_num_gpus() == 0:
                return "the FAISS that is installed has no GPU (it is the package for CPUs)"
        return missing


class FlashKMeans(_NeedsCuda):
    """flash-kmeans (https://github.com/svg-project/flash-kmeans): `batch_kmeans_Euclid`, and its exported steps."""

    name = "flash-kmeans"
    distributions = ("flash-kmeans",)
    module = "flash_kmeans"
    note = "labels belong to the centroids before the last update; float32 is computed as TF32"

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        from flash_kmeans import batch_kmeans_Euclid

        x = rows.x[None]
        given = starts.to(x.dtype)

        def one(start: torch.Tensor) -> Any:
            return batch_kmeans_Euclid(x, len(start), max_iters=iterations, tol=0.0, init_centroids=start[None])

        return each(one, given, lambda found: Found(found[1][0], found[0][0], found[2]))

    def fit_batch(self, x: torch.Tensor, starts: torch.Tensor, iterations: int) -> Work:
        from flash_kmeans import batch_kmeans_Euclid

        given = starts.to(x.dtype)
        return Work(
            lambda: batch_kmeans_Euclid(x, starts.shape[1], max_iters=iterations, tol=0.0, init_centroids=given),
            lambda found: [Found(c, labels, found[2]) for labels, c in zip(found[0], found[1], strict=True)],
        )

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        x, centroids = rows.x[None], start.to(rows.x.dtype)[None]
        norms = torch.cat([part.float().square().sum(1) for part in rows.x.split(1 << 20)])[None]
        return Work(lambda: euclid_assign_triton(x, centroids, norms), lambda labels: [Found(labels=labels[0])])

    def update(self, rows: Stored, labels: torch.Tensor, start: torch.Tensor) -> Work:
        from flash_kmeans import triton_centroid_update_sorted_euclid

        x, old, which = rows.x[None], start.to(rows.x.dtype)[None], labels.int()[None]
        return Work(
            lambda: triton_centroid_update_sorted_euclid(x, which, old), lambda centroids: [Found(centroids[0])]
        )


class FlashLib(_NeedsCuda):
    """FlashLib (https://github.com/FlashML-org/flashlib): `flash_kmeans`, which chooses Triton or CuTe DSL itself."""

    name = "flashlib"
    distributions = ("flashlib",)
    module = "flashlib"
    note = "float32 is computed as TF32; CuTe DSL only where its extra is installed"

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        from flashlib import flash_kmeans

        given = starts.to(rows.x.dtype)

        def one(start: torch.Tensor) -> Any:
            return flash_kmeans(rows.x, len(start), max_iters=iterations, tol=0.0, init_centroids=start[None])

        return each(one, given, lambda found: Found(found[1], found[0], int(found[2])))

    def fit_batch(self, x: torch.Tensor, starts: torch.Tensor, iterations: int) -> Work:
        from flashlib import flash_kmeans

        given = starts.to(x.dtype)
        return Work(
            lambda: flash_kmeans(x, starts.shape[1], max_iters=iterations, tol=0.0, init_centroids=given),
            lambda found: [Found(c, labels, int(found[2])) for labels, c in zip(found[0], found[1], strict=True)],
        )

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        from flashlib.primitives.kmeans import euclid_assign_triton

        x, centroids = rows.x[None], start.to(rows.x.dtype)[None]
        return Work(lambda: euclid_assign_triton(x, centroids), lambda labels: [Found(labels=labels[0])])

    def update(self, rows: Stored, labels: torch.Tensor, start: torch.Tensor) -> Work:
        from flashlib.primitives.kmeans import triton_lloyd_centroid_step_euclid

        x, old, which = rows.x[None], start.to(rows.x.dtype)[None], labels.int()[None]
        return Work(lambda: triton_lloyd_centroid_step_euclid(x, which, old), lambda found: [Found(found[0][0])])


class CuML(_NeedsCuda):
    """cuML's KMeans (https://docs.rapids.ai, cuml.cluster): rows on the device through CuPy, float32."""

    name = "cuml"
    distributions = ("cuml-cu13", "cuml-cu12", "cuml")
    module = "cuml"
    note = "float32; 3xTF32 or TF32 by GPU and shape; may end before the last iteration"
    torch_memory = False

    def fit(self, rows: Stored, starts: torch.Tensor, iterations: int) -> Work:
        import cupy
        from cuml.cluster import KMeans

        # Held by the closure: CuPy only looks at torch's memory.
        x, given = rows.x.float(), starts.float().contiguous()
        array = cupy.asarray(x)

        def one(start: torch.Tensor) -> Any:
            init = cupy.asarray(start)
            return KMeans(n_clusters=len(start), init=init, n_init=1, max_iter=iterations, tol=0.0).fit(array)

        return each(one, given, _read_cuml)

    def assign(self, rows: Stored, start: torch.Tensor) -> Work:
        import cupy
        from cuml.cluster import KMeans

        x, given = rows.x.float(), start.float().contiguous()
        array, init = cupy.asarray(x), cupy.asarray(given)
        model = KMeans(n_clusters=len(given), init=init, n_init=1, max_iter=1, tol=0.0).fit(init)
        model.cluster_centers_ = init
        return Work(
            lambda: model.predict(array), lambda labels: [Found(labels=torch.as_tensor(labels, device=x.device))]
        )


def _read_cuml(model: Any) -> Found:
    return Found(
        torch.as_tensor(model.cluster_centers_, device="cuda"),
        torch.as_tensor(model.labels_, device="cuda"),
        int(model.n_iter_),
    )
