"""`gpuclust bench`: the same k-means by gpuclust and its peers, side by side; `benchmarks/` uses the same."""
