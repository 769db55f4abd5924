"""``python -m gpuclust`` is ``gpuclust``."""

from gpuclust.cli import main

main()
