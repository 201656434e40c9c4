"""Parameters, FLOPs, memory and time against cases that can be counted by hand."""

import gc
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import measure as M


def test_parameters_count_shared_weights_once_and_frozen_ones_not():
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5), "norm": nn.BatchNorm1d(5)})
    assert M.parameters(model) == 2 * 20 + 10
    model["b"].weight = model["a"].weight
    assert M.parameters(model) == 20 + 5 + 10
    model["a"].bias.requires_grad_(False)
    assert M.parameters(model) == 15 + 5 + 10


def test_flops_of_matrix_products():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert M.flops(torch.matmul, a, b) == 2 * 3 * 5 * 7
    assert M.flops(lambda a, b: (a @ b).relu() + 1, a, b) == 2 * 3 * 5 * 7
    assert M.flops(torch.bmm, torch.randn(4, 3, 5), torch.randn(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert M.flops(nn.Linear(8, 16), torch.randn(2, 10, 8)) == 2 * 20 * 8 * 16
    assert M.flops(nn.Conv1d(4, 6, 3), torch.randn(1, 4, 10)) == 2 * 8 * 6 * 4 * 3
    assert M.flops(torch.relu, a) == 0


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(6, 9, dtype=torch.bool)}])
def test_flops_of_fused_attention(options):
    b, h, n, m, e, c = 2, 3, 6, 9, 4, 5
    q, k, v = torch.randn(b, h, n, e), torch.randn(b, h, m, e), torch.randn(b, h, m, c)
    fused = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)
    assert M.flops(fused, q, k, v) == 2 * b * h * n * m * (e + c)


@pytest.mark.parametrize("fast", [True, False])
def test_flops_of_torch_layers_do_not_hide_in_their_fast_path(fast):
    d, n, wide = 16, 10, 32
    layer = nn.TransformerEncoderLayer(d, 2, wide, batch_first=True).eval()
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        assert M.flops(layer, torch.randn(1, n, d)) == 2 * n * (4 * d * d + 2 * d * wide) + 4 * n * n * d
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_time_ratio():
    a = torch.randn(160, 160)
    once = lambda: [a @ a for _ in range(10)]
    same = M.time_ratio(once, once, repeats=25)
    assert 0.6 < same.ratio < 1.6
    assert M.time_ratio(lambda: (once(), once(), once()), once).ratio > 1.5
    slow = M.time_ratio(lambda: spin(0.003), lambda: spin(0.001), repeats=5)
    assert slow.ratio > 1.8 and slow.seconds >= 0.003 and slow.reference_seconds >= 0.001


def test_time_ratio_calls_both_equally_often_in_turns():
    calls = []
    M.time_ratio(lambda: calls.append("f"), lambda: calls.append("g"), repeats=4, warmup=1)
    assert calls.count("f") == calls.count("g") == 5
    assert {"".join(calls[i : i + 2]) for i in range(2, 10, 2)} == {"fg", "gf"}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        M.time_ratio(print, print, repeats=0)


def test_garbage_collection_is_restored_even_after_an_error():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        M.seconds(lambda: 1 / 0, warmup=0)
    assert gc.isenabled()
    assert 0.001 <= M.seconds(lambda: spin(0.001), repeats=3) < 0.1


def test_peak_bytes_of_known_patterns(capfd):
    x = torch.zeros(10_000)  # 40 kB
    unit = x.nbytes
    near = lambda count: pytest.approx(count * unit, abs=200)

    def release_first(x):
        a = x.exp()
        b = a.exp()
        del a
        return b.exp()

    def hold_all(x):
        a = x.exp()
        b = a.exp()
        c = b.exp()
        return a, b, c

    assert M.peak_bytes(lambda x: x.view(100, 100), x) == 0
    assert M.peak_bytes(lambda x: x.exp(), x) == near(1)
    assert M.peak_bytes(release_first, x) == near(2)
    assert M.peak_bytes(hold_all, x) == near(3)
    assert M.peak_bytes(lambda x: x.clone().exp_(), x) == near(1)
    assert M.peak_bytes(lambda x: (x[:100, None] * x[None, :100]).sum(), x) == near(1)  # a 100 by 100 table
    assert capfd.readouterr() == ("", "")  # the profiler says nothing


def test_saved_bytes():
    x = torch.randn(4, 100)
    linear = nn.Linear(100, 50)
    assert M.saved_bytes(linear, x) == 0  # it keeps its input and its weight, which are there anyway
    assert M.saved_bytes(nn.Sequential(linear, nn.ReLU()), x) == 4 * 50 * 4  # and the rectified output
    assert M.saved_bytes(nn.Sequential(linear, nn.ReLU(), nn.Linear(50, 1)), x) == 800  # kept twice, counted once
    leaf = torch.randn(100, requires_grad=True)
    assert M.saved_bytes(lambda x: x + 1, leaf) == 0
    assert M.saved_bytes(lambda x: x.exp(), leaf) == 400
    assert M.saved_bytes(lambda x: x.exp().sin(), leaf) == 400  # exp's result serves both
    assert M.saved_bytes(lambda x: x.exp() * x.sin(), leaf) == 800
    with torch.no_grad():
        assert M.saved_bytes(lambda x: x.exp(), leaf) == 400


@pytest.mark.parametrize("exponent, factor", [(0, 5.0), (1, 2.0), (1.5, 0.1), (2, 3e-9), (-1, 7.0)])
def test_growth_recovers_exact_exponents(exponent, factor):
    sizes = [32, 64, 100, 256]
    found = M.growth(sizes, [factor * n**exponent for n in sizes])
    assert found.exponent == pytest.approx(exponent, abs=1e-9)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.factor == pytest.approx(factor, rel=1e-6)


def test_growth_reports_its_error():
    noisy = M.growth([1, 2, 4, 8], [1, 2.4, 3.5, 8.5])
    assert abs(noisy.exponent - 1) < 2 * noisy.error and noisy.error > 0.03
    assert str(M.growth([1, 2, 4], [1, 4, 16])) == "grows as size to the power 2.00 +- 0.00"


@pytest.mark.parametrize("sizes, values, said", [
    ([1, 2], [1, 2], "got 2 and 2"), ([1, 2, 3], [1, 2], "got 3 and 2"), ([1, 2, 3], [1, 0, 2], r"\[1, 0, 2\]"),
    ([0, 1, 2], [1, 1, 2], r"\[0, 1, 2\]"), ([4, 4, 4], [1, 2, 3], r"differ.*\[4, 4, 4\]"),
])  # fmt: skip
def test_growth_errors(sizes, values, said):
    with pytest.raises(ValueError, match=said):
        M.growth(sizes, values)


def test_readable():
    cases = {0: "0", 950: "950", 12_345_678: "12.3M", 1000: "1k", -2.5e9: "-2.5G", 3e12: "3T", 0.5: "0.5"}
    assert {value: M.readable(value) for value in cases} == cases
    assert M.readable(4_000, "B") == "4kB" and not math.isnan(float(M.readable(7)))


def test_importing_the_package_costs_next_to_nothing_beyond_torch():
    program = "import sys, torch, tfkit; assert not {'matplotlib', 'ipywidgets', 'pandas'} & set(sys.modules)"
    command = [sys.executable, "-X", "importtime", "-c", program]
    done = subprocess.run(command, cwd=Path(M.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    (line,) = [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "tfkit"]
    assert int(line.split("|")[1]) < 100_000  # microseconds


def test_compare_prints_one_line_per_mechanism(capsys):
    x = torch.randn(2, 8)
    made = {"small": lambda: (nn.Linear(8, 8), (x,)), "mixing large": lambda: (nn.Linear(8, 1024), (x,))}
    assert M.compare(made, {"small": "most cases"}, repeats=3) is None
    head, small, large = capsys.readouterr().out.splitlines()
    assert head.split() == ["parameters", "FLOPs", "cost", "ratio", "for"]
    assert small.split()[:3] == ["small", "72", "256"] and small.endswith("\u27e9  most cases")
    assert large.split()[2:4] == ["9,216", "32.8k"] and large.endswith("\u27e9")
    assert small.index("\u27e8") == large.index("\u27e8") and small.index("\u27e9") == large.index("\u27e9")
