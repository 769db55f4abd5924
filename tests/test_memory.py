"""MemoryPlan: every network of the paper on every card, without a device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from gpuclust.capture.layers import Layer
from gpuclust.capture.memory import Forward, MemoryPlan, Room
from gpuclust.capture.planner import make_plan
from gpuclust.errors import MemoryLimitError

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GB = 10**9
CARDS = [8, 24, 80, 141]
# Values per image of some layers that are chosen by default, in forward order.
WIDTHS = {
    "alexnet": [193_600, 139_968, 64_896, 43_264, 43_264, 4_096, 4_096, 1_000],
    "vgg16": [3_211_264] * 2 + [1_605_632] * 2 + [802_816] * 3 + [401_408] * 3 + [100_352] * 3 + [4_096] * 2 + [1_000],
    "vgg19": [3_211_264] * 2 + [1_605_632] * 2 + [802_816] * 4 + [401_408] * 4 + [100_352] * 4 + [4_096] * 2 + [1_000],
    "resnet50": [802_816] * 4 + [401_408] * 4 + [200_704] * 6 + [100_352] * 3 + [2_048, 1_000],
    "resnet152": [802_816] * 4 + [401_408] * 8 + [200_704] * 36 + [100_352] * 3 + [2_048, 1_000],
    "googlenet": [802_816, 200_704, 602_112, 200_704, 376_320, *[100_352] * 4, 163_072, 40_768, 50_176, 1_024, 1_000],
    "inception_v3": [
        710_432,
        691_488,
        1_382_976,
        426_320,
        967_872,
        *[313_600] * 3,
        *[221_952] * 5,
        *[131_072] * 3,
        2_048,
    ],
}


def layers_of(network: str) -> list[Layer]:
    return [Layer(f"layer{i}", f"module.{i}", "conv", (d,)) for i, d in enumerate(WIDTHS[network])]


def forward_of(network: str, batch_size: int = 32, **changes) -> Forward:
    """A network of which every layer takes the same time, at 500 images a second."""
    count, widest = len(WIDTHS[network]), max(WIDTHS[network])
    reach = {f"layer{i}": (i + 1) / count for i in range(count)}
    usual = Forward(batch_size, 3 * batch_size * widest * 4, batch_size / 500, reach, 150_528, 0.001)
    return replace(usual, **changes)


def plan(network: str = "alexnet", n: int = 500, **changes) -> MemoryPlan:
    options = {
        "dtype": torch.float32,
        "device": CPU,
        "clusters": 5,
        "n_init": 10,
        "forward": forward_of(network),
        "module_bytes": 0,
        "room": Room(16 * GB),
    } | changes
    return make_plan(network, layers_of(network), n, **options)


@pytest.mark.parametrize(
    ("network", "dtype", "size", "words"),
    [
        ("alexnet", torch.float32, 988_368_000, "0.99 GB"),
        ("alexnet", torch.float16, 494_184_000, "0.49 GB"),
        ("vgg16", torch.float32, 27_113_424_000, "27.11 GB"),
        ("vgg16", torch.bfloat16, 13_556_712_000, "13.56 GB"),
    ],
)
def test_activations_of_five_classes_of_a_hundred(network, dtype, size, words):
    made = plan(network, dtype=dtype)
    assert made.activations_bytes == size == sum(row["bytes"] for row in made.table())
    (line,) = [line for line in str(made).splitlines() if line.startswith("rows of 500 images")]
    assert line.endswith(f" {words}")


@pytest.mark.parametrize("network", WIDTHS)
@pytest.mark.parametrize("n", [5000, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_network_on_every_card(network, n, dtype):
    """What is planned is within the card, whole, in order; and more memory never takes more time."""
    before = None
    for card in CARDS:
        room = Room(int(card * GB * 0.95), host_bytes=64 * GB)
        made = plan(network, n, dtype=dtype, device=CUDA, room=room, forward=forward_of(network))
        assert [row.name for row in made.rows] == [layer.name for layer in layers_of(network)]
        assert sorted(itertools.chain(*(step.layers for step in made.steps))) == sorted(row.name for row in made.rows)
        for row in made.rows:
            step = made.steps[row.step]
            assert row.name in step.layers
            assert row.place == step.place
            assert row.bytes == n * row.d * dtype.itemsize
            if made.fits:
                assert row.work_bytes >= row.least_bytes > 0
                assert row.work_bytes >= row.peak_bytes > 0
        if made.fits:
            made.require()
            assert made.total_bytes <= room.budget_bytes
            assert made.passes >= 1
            assert before is None or made.seconds <= before * 1.05
            before = made.seconds
        else:
            assert before is None  # nor does more memory make a run impossible
            with pytest.raises(MemoryLimitError, match=f"{made.short_bytes / GB:.3g} GB too little"):
                made.require()


@pytest.mark.parametrize("card", [8, 80])
def test_the_rows_of_vgg16_for_five_thousand_images(card):
    """136 GB in half precision, on 80 GB in two or three passes, on 8 GB with the wide layers computed anew."""
    made = plan("vgg16", 5000, dtype=torch.float16, device=CUDA, room=Room(int(card * GB * 0.95)))
    assert made.activations_bytes == 135_567_120_000
    assert made.fits
    places = [row.place for row in made.rows]
    if card == 80:
        assert set(places) == {"device"}
        assert 2 <= len(made.steps) <= 3
    else:
        assert places[:4] == ["recompute"] * 4
        assert places[-6:] == ["device"] * 6


def test_a_pass_that_ends_early_is_planned_with_what_it_holds():
    whole = forward_of("alexnet")
    early = replace(whole, peaks={"layer0": 50 * 10**6, "layer1": 60 * 10**6})
    assert early.peak_to(["layer0"]) == 50 * 10**6
    assert early.peak_to(["layer1", "layer0"]) == 60 * 10**6
    assert early.peak_to(["layer0", "layer2"]) == early.peak_to([]) == whole.peak_bytes == 74_342_400
    room = Room(150 * 10**6)
    made = [plan(room=room, forward=forward) for forward in (whole, early)]
    assert [row.place for row in made[0].rows[:2]] == [row.place for row in made[1].rows[:2]] == ["recompute"] * 2
    gained = [after.work_bytes - before.work_bytes for before, after in zip(made[0].rows, made[1].rows, strict=True)]
    assert gained[0] == 74_342_400 - 50 * 10**6
    assert gained[1] == 74_342_400 - 60 * 10**6
    assert made[1].rows[0].passes < made[0].rows[0].passes
    assert made[1].total_bytes <= room.free_bytes


def test_decoding_takes_a_cpus_cores_and_goes_on_beside_a_gpu():
    forward = forward_of("alexnet", decode_s=0.0015)  # of a pass of one second, three quarters
    capture = [
        plan(device=device, forward=replace(forward, pixel_bytes=10**9)).steps[0].capture_s for device in (CPU, CUDA)
    ]
    assert capture == pytest.approx([1.75, 1.0])


def test_a_pass_holds_its_rows_a_forward_pass_and_then_k_means_beside_the_rows_that_are_left():
    made = plan()
    (step,) = made.steps
    assert step.layers == ("layer7", "layer5", "layer6", "layer3", "layer4", "layer2", "layer1", "layer0")
    rows = {row.name: row for row in made.rows}
    alive, peak = made.activations_bytes, made.activations_bytes + made.forward.peak_bytes
    for name in step.layers:
        peak = max(peak, alive + rows[name].peak_bytes)
        alive -= rows[name].bytes
    assert step.peak_bytes == peak
    assert made.total_bytes == peak
    other = plan(module_bytes=7, room=Room(16 * GB, reserve_bytes=5))
    assert other.total_bytes == peak + 12
    assert other.pixels_bytes == 0  # one pass: nothing to keep images for


def test_less_memory_means_more_passes_and_then_rows_that_are_computed_anew():
    counts = []
    for limit in (3000, 1000, 700, 350, 250):
        made = plan(room=Room(16 * GB, limit * 10**6), forward=forward_of("alexnet", 4))
        assert made.fits
        assert made.total_bytes <= limit * 10**6
        counts.append((len(made.steps), sum(row.place == "recompute" for row in made.rows)))
    assert counts == sorted(counts)
    assert counts[0] == (1, 0)
    assert counts[-1][1] >= 1


def test_images_are_kept_where_that_saves_decoding_and_there_is_room():
    slow = forward_of("alexnet", 4, decode_s=0.1)
    made = plan(room=Room(16 * GB, 700 * 10**6), forward=slow)
    assert len(made.steps) > 1
    assert made.pixels_bytes == 500 * 150_528
    without = plan(room=Room(16 * GB, 700 * 10**6), forward=slow, kept=False)
    assert without.pixels_bytes == 0
    assert made.seconds < without.seconds
    assert "decoded once" in str(made)


def test_host_memory_and_disk_are_taken_where_they_are_allowed_and_faster():
    # A deep network on a slow card: each forward pass takes long.
    slow = forward_of("alexnet", 4, seconds=4.0)
    tight = Room(400 * 10**6)
    assert {row.place for row in plan(room=tight, forward=slow, device=CUDA).rows} >= {"recompute"}
    hosted = plan(room=replace(tight, host_bytes=64 * GB), forward=slow, device=CUDA)
    assert hosted.row("layer0").place == "host"
    assert hosted.seconds < plan(room=tight, forward=slow, device=CUDA).seconds
    spilled = plan(room=replace(tight, disk_bytes=64 * GB), forward=slow)
    assert spilled.row("layer0").place == "disk"
    # Half of what is free on the host, and all of what is free on the disk.
    least = plan(room=tight, forward=slow).row("layer0").bytes
    assert plan(room=replace(tight, host_bytes=2 * least - 2), forward=slow).row("layer0").place == "recompute"
    assert plan(room=replace(tight, disk_bytes=least - 1), forward=slow).row("layer0").place == "recompute"


def test_a_run_that_does_not_fit_says_what_it_lacks_and_what_to_do():
    made = plan("vgg16", room=Room(16 * GB, GB))
    assert not made.fits
    with pytest.raises(MemoryLimitError) as error:
        made.require()
    message = str(error.value)
    needs = GB + made.short_bytes
    assert f"({needs:,} bytes)" in message
    assert "the memory limit is 1 GB (1,000,000,000 bytes)" in message
    for advice in ("--per-class", "--layers", "--batch-size", "--reduce", "a --memory-limit of"):
        assert advice in message
    # What it says is enough, to the byte; one byte less is not.
    assert plan("vgg16", room=Room(16 * GB, needs)).fits
    assert not plan("vgg16", room=Room(16 * GB, needs - 1)).fits
    with pytest.raises(MemoryLimitError, match=r"1,000,000,000 bytes\) are free") as free:
        plan("vgg16", room=Room(GB)).require()
    assert "--memory-limit" not in str(free.value)  # more than there is would not help


@pytest.mark.parametrize(("batch_size", "budget", "advised"), [(32, 1.1, True), (32, 0.3, False), (1, 0.2, False)])
def test_fewer_images_are_advised_where_they_would_do(batch_size, budget, advised):
    room, forward = Room(16 * GB, int(budget * GB)), forward_of("vgg16", batch_size)
    with pytest.raises(MemoryLimitError) as error:
        plan("vgg16", room=room, forward=forward).require()
    assert ("--per-class" in str(error.value)) == advised
    # Of five images the batch is one of five at most.
    assert plan("vgg16", 5, room=room, forward=forward_of("vgg16", min(batch_size, 5))).fits == advised
    needs = room.budget_bytes + plan("vgg16", room=room, forward=forward).short_bytes
    with pytest.raises(MemoryLimitError, match="--per-class"):
        plan("vgg16", room=Room(16 * GB, needs - 1), forward=forward).require()


def test_memory_that_ran_out_leaves_less_to_plan_with():
    made = plan()
    room = made.room.after_failure(made.total_bytes)
    assert room.budget_bytes == made.total_bytes * 70 // 100
    assert room.after_failure(10**12).budget_bytes == room.budget_bytes * 70 // 100


def test_narrower_rows_are_planned_with_where_a_layer_is_reduced():
    made = plan(widths={"layer0": 64})
    assert made.row("layer0").d == 64
    assert made.row("layer0").bytes == 500 * 64 * 4
    assert made.row("layer1").d == 139_968


def test_the_solver_that_was_asked_for_is_planned_with():
    assert {row.solver for row in plan(solver="primal").rows} == {"primal"}
    assert {row.solver for row in plan(solver="dual").rows} == {"dual"}


def test_the_table_is_printable_and_tells_what_else_could_be_done():
    made = plan("vgg16", 5000, device=CUDA, room=Room(8 * GB, host_bytes=64 * GB))
    half = plan("vgg16", 5000, dtype=torch.float16, device=CUDA, room=Room(8 * GB, host_bytes=64 * GB))
    text = str(replace(made, others=(("--dtype float16", half),)))
    for word in ("layer0", "3,211,264", "recompute", "computed anew by a forward pass", "it fits: "):
        assert word in text
    assert text.splitlines()[-1].startswith(f"with --dtype float16: {half.passes} passes")
    assert made.describe()["passes"] == made.passes
    assert str(plan("vgg16", room=Room(16 * GB, GB))).splitlines()[-1].startswith("it does not fit: ")


@pytest.mark.parametrize("reduce_bytes", [{}, {"layer0": 8 * 10**6, "layer7": 8 * 10**6}], ids=["", "reduced"])
def test_a_layer_that_fits_alone_has_a_pass_where_a_deeper_one_takes_more(reduce_bytes):
    shallow = replace(forward_of("alexnet"), peaks={f"layer{i}": (5 + 9 * i) * 10**6 for i in range(8)})
    places = set()
    for size in range(150, 600, 5):  # the plan is whole at every size, and within it
        made = plan(room=Room(size * 10**6), forward=shallow, reduce_bytes=reduce_bytes)
        assert {row.name for row in made.rows} == {f"layer{i}" for i in range(8)}
        assert made.short_bytes or made.total_bytes <= size * 10**6
        places |= {row.place for row in made.rows}
    assert places == {"device", "recompute"}


def test_a_pass_that_finds_the_scale_and_one_that_decodes_are_counted():
    forward = forward_of("alexnet", decode_s=0.5, pixel_bytes=10**9)

    def made(dtype, kept=None):
        given = {"device": CPU, "clusters": 5, "n_init": 10, "module_bytes": 0, "room": Room(120 * 10**6)}
        return make_plan("alexnet", layers_of("alexnet")[:1], 500, dtype=dtype, forward=forward, kept=kept, **given)

    half, brain = made(torch.float16), made(torch.bfloat16)
    assert half.rows[0].place == brain.rows[0].place == "recompute"
    assert half.passes == brain.passes + 1
    assert half.seconds > brain.seconds
    assert half.steps[0].capture_s == 500 * 0.5
    assert made(torch.float16, kept=False).steps[0].capture_s == 0.0  # the images were seen
