"""Layers into passes: what fits together, and the least time."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from gpuclust.capture.packing import Item, needed, pack


def partitions(items: list[Item]):
    """Every way to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in partitions(rest):
        yield [[first], *groups]
        for i in range(len(groups)):
            yield [*groups[:i], [first, *groups[i]], *groups[i + 1 :]]


def seconds(groups) -> float:
    return sum(max(item.pass_s for item in group) for group in groups)


def network(rng: random.Random, layers: int, *, narrowing: bool) -> list[Item]:
    widths = sorted((rng.choice([1, 2, 4, 8, 16, 32]) for _ in range(layers)), reverse=True)
    if not narrowing:
        rng.shuffle(widths)
    reach = sorted(rng.random() for _ in range(layers))
    return [Item(f"layer{i}", w * 100, w * 7 + 3, at) for i, (w, at) in enumerate(zip(widths, reach, strict=True))]


@pytest.mark.parametrize("narrowing", [True, False], ids=["narrowing", "any widths"])
@pytest.mark.parametrize("seed", range(20))
def test_every_layer_is_in_one_pass_that_fits_and_the_time_is_near_the_least(seed: int, narrowing: bool) -> None:
    rng = random.Random(seed)
    items, forward, decode_s = network(rng, 7, narrowing=narrowing), 150, rng.choice([0.0, 0.3])
    items = [replace(item, pass_s=max(decode_s, item.pass_s)) for item in items]
    left = max(needed([item], forward) for item in items) + rng.choice([0, 500, 2000, 5000])
    groups = pack(items, left, lambda _: forward)
    assert sorted(itertools.chain(*groups)) == [item.name for item in items]
    by_name = {item.name: item for item in items}
    found = [[by_name[name] for name in group] for group in groups]
    assert all(needed(group, forward) <= left for group in found)
    least = min(seconds(ways) for ways in partitions(items) if all(needed(group, forward) <= left for group in ways))
    assert seconds(found) <= 1.25 * least


def test_all_in_one_pass_where_there_is_room() -> None:
    items = network(random.Random(1), 9, narrowing=True)
    assert pack(items, 10**9, lambda _: 5) == [{item.name for item in items}]


def test_rows_that_are_given_back_leave_room_for_the_widest() -> None:
    narrow, wide = Item("narrow", 10, 100, 0.2), Item("wide", 100, 100, 0.1)
    # Both rows and the narrow one's k-means; then the wide one's alone.
    assert needed([narrow, wide], 5) == 110 + 100
    assert needed([wide], 5) == 200
    assert needed([narrow, wide], 500) == 110 + 500
