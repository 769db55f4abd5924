"""The memory plan as text: where every layer's rows will be, why, and what other options would change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuclust.config import show_bytes

if TYPE_CHECKING:
    from gpuclust.capture.memory import LayerPlan, MemoryPlan

_HEAD = ("layer", "module", "values/image", "rows", "where", "pass", "k-means", "reads", "beside", "time")
_LEFT = 2  # columns of words; the others are numbers


def show_plan(plan: MemoryPlan) -> str:
    """The plan in words and numbers, a line per layer, then its terms, then what else could be done."""
    lines = [_HEAD, *(_cells(plan, row) for row in plan.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    text = [
        "  ".join(
            f"{cell:<{width}}" if column < _LEFT else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    terms = [
        (f"rows of {plan.n:,} images in {plan.dtype}", plan.activations_bytes),
        ("network", plan.module_bytes),
        (f"forward pass of {plan.forward.batch_size} images", plan.forward.peak_bytes),
        ("images kept between passes", plan.pixels_bytes),
        ("process", plan.room.reserve_bytes),
        ("peak", plan.total_bytes),
        (f"free on {plan.device}", plan.room.free_bytes),
        ("memory limit", plan.room.limit_bytes or 0),
    ]
    wide = max(len(name) for name, _ in terms)
    text += ["", *(f"{name:<{wide}}  {gigabytes(size):>9}" for name, size in terms if size)]
    text += ["", *_reasons(plan), _verdict(plan)]
    text += [f"with {option}: {_short(other)}" for option, other in plan.others]
    return "\n".join(text)


def gigabytes(size: int) -> str:
    """In one unit, so that a column can be compared; what would round away in its own."""
    return f"{size / 1e9:.2f} GB" if size >= 5e7 or size == 0 else show_bytes(size)


def seconds(value: float) -> str:
    """A duration as a person reads it."""
    if value < 100:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _cells(plan: MemoryPlan, row: LayerPlan) -> tuple[str, ...]:
    return (
        row.name,
        row.module,
        f"{row.d:,}",
        gigabytes(row.bytes),
        row.place if not row.short_bytes else "nowhere",
        str(row.step + 1),
        row.solver,
        f"{row.passes}x" if row.passes else "",
        gigabytes(row.peak_bytes),
        seconds(row.seconds),
    )


def _reasons(plan: MemoryPlan) -> list[str]:
    """Why some layers are handled in another way than to keep their rows on the device, in one pass."""
    left = plan.room.budget_bytes - plan.module_bytes - plan.room.reserve_bytes - plan.pixels_bytes
    found = []
    captured = [step for step in plan.steps if step.place == "device"]
    if len(captured) > 1:
        found.append(
            f"{len(captured)} passes keep layers on the device, since together they are more than the "
            f"{show_bytes(left)} there are: {'; '.join(', '.join(step.layers) for step in captured)}"
        )
    for place, says in (
        ("recompute", "computed anew by a forward pass whenever k-means reads them (column reads)"),
        ("host", "in page-locked host memory, read by the device as often as the column reads says"),
        ("disk", "in a file, read as often as the column reads says"),
    ):
        names = [row.name for row in plan.rows if row.place == place and not row.short_bytes]
        if names:
            found.append(
                f"{', '.join(names)}: rows and what works beside them are more than {show_bytes(left)}, so the rows "
                f"are {says}"
            )
    if plan.pixels_bytes:
        found.append("images are decoded once and kept on the device, since there are several passes")
    return found


def _verdict(plan: MemoryPlan) -> str:
    if not plan.fits:
        return f"it does not fit: {plan.short_bytes:,} bytes too little ({show_bytes(plan.short_bytes)})"
    return f"it fits: {_short(plan)}"


def _short(plan: MemoryPlan) -> str:
    if not plan.fits:
        return f"{show_bytes(plan.short_bytes)} too little"
    passes = "1 pass" if plan.passes == 1 else f"{plan.passes} passes"
    return f"{passes} over the images, about {seconds(plan.seconds)}, {gigabytes(plan.total_bytes)} at the peak"
