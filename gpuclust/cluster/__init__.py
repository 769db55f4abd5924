"""k-means, usable alone: exact labels, the same bits for any chunk size and thread count.

This room imports nothing from ``capture``, ``compare`` or ``report``.
"""

from gpuclust.cluster.distributed import shared
from gpuclust.cluster.kmeans import KMeans

__all__ = ["KMeans", "shared"]
