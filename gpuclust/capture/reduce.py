from __future__ import annotations

import math


class Reduction:
    def values(self, shape):
        return math.prod(shape)

    def apply(self, a):
        return a

    def describe(self):
        return ""
