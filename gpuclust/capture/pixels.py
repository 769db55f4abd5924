"""thin stand-in"""

from __future__ import annotations


def pixel_bytes(transform, example):
    return example[0].numel() * 4


class Pixels:
    def __init__(self, images, transform, batch_size, *, device, dtype, workers, keep):
        self.images, self.transform, self.batch_size, self.device, self.dtype, self.workers, self.keep = (
            images,
            transform,
            batch_size,
            device,
            dtype,
            workers,
            keep,
        )
        self.n = 0
        self.kept_bytes = 0
        self._b = []

    def first(self):
        start = 0
        for b in self.images.batches(self.transform, self.batch_size, self.workers):
            yield start, b.images.to(self.device, self.dtype, copy=True), b
            start += len(b)
            self.n = start

    def drop(self):
        self.keep = False

    def again(self, wanted=None):
        start = 0
        for i, b in enumerate(self.images.batches(self.transform, self.batch_size, self.workers)):
            if wanted is None or i in wanted:
                yield i, start, b.images.to(self.device, self.dtype, copy=True)
            start += len(b)
