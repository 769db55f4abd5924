"""Rows as a person reads them."""

from __future__ import annotations

from gpuclust.bench.show import lines

ROW = {"op": "fit", "x_at": "device", "n": 1000, "batch": 2, "n_init": 3, "n_iter": 5, "version": "1.0"}


def test_a_table_with_units_and_reasons():
    rows = [
        {**ROW, "what": "gpuclust torch", "time_s": 0.0123, "time_p20_s": 0.012, "time_p80_s": 2.5, "inertia": 12.5},
        {
            **ROW,
            "what": "peer",
            "time_s": 0.0246,
            "time_p20_s": 4e-6,
            "time_p80_s": 0.03,
            "ratio": 2.0,
            "beside": "gpuclust torch",
            "limit_share": 0.25,
            "wrong_labels": 1234,
            "checked_rows": 5678,
            "peak_bytes": 2_000_000,
        },
        {"what": "cuml", "missing": "cuml is not installed"},
        {"what": "faiss-gpu", "missing": "cuml is not installed"},
        {"op": "fit", "what": "late", "missing": "no time was left"},
    ]
    shown = list(lines(rows))
    head, ours, peer = shown[:3]
    assert head.split()[:3] == ["op", "what", "X"]
    assert "12.3 ms" in ours
    assert "12 ms to 2.5 s" in ours
    assert f"{1000 * 2 * 3 * 5 / 0.0123:.3g}" in ours
    for words in ("24.6 ms", "4 us to 30 ms", "2.00", "25.0%", "1,234 of 5,678", "2 MB"):
        assert words in peer
    assert "not measured: cuml, faiss-gpu: cuml is not installed" in shown
    assert "not measured: late (fit): no time was left" in shown
    assert shown[3].startswith("ratio: time over that of gpuclust torch")


def test_nothing_measured_is_only_reasons():
    assert list(lines([{"what": "cuml", "missing": "no"}]))[-1] == "not measured: cuml: no"
