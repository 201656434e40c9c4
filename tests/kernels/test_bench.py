"""kernels/bench.py without a GPU: what it finds, what it refuses, what it computes from times, what it writes."""

import csv
import sys
import types

import pytest
import torch

from kernels import INTERPRET, bench
from kernels.bench import Case, entries, goals, main, run, tiny, verdicts, wrong

KEYS = {"name", "sizes", "inputs", "ours", "reference", "peers", "differentiate", "bytes", "flops"}
BILLION = 10**9


def stub(name="stub", ours=torch.square, sizes=({"elements": 8},), **more):
    return {
        "name": name, "sizes": list(sizes), "ours": ours, "reference": torch.square, "peers": {}, "differentiate": (0,),
        "inputs": lambda size, dtype, device: (torch.randn(size["elements"], dtype=dtype, device=device),),
        "bytes": lambda size, itemsize: BILLION, "flops": None,
        "backward_bytes": lambda size, itemsize: 5 * BILLION // 4, "backward_flops": None, **more,
    }  # fmt: skip


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] * 1.99


def stops(x):
    raise RuntimeError("out of registers\nand more")


BROKEN = {
    "a value a little off": (lambda x: x * x * 1.001, "result 0 is off by"),
    "a value that was never written": (lambda x: torch.where(x == x.max(), torch.nan, x * x), "nan"),
    "another shape": (lambda x: x[1:].square(), r"shape \(7,\), expected \(8,\)"),
    "a gradient a little off": (WrongGradient.apply, "gradient 0 is off by"),
    "a result too many": (lambda x: (x * x, x * x), "3 tensors with gradients, the reference 2"),
    "no result at all": (stops, "stops with RuntimeError: out of registers"),
}  # fmt: skip


# --- what there is


def test_every_module_is_found_by_itself():
    found = entries()
    names = [entry["name"] for entry in found]
    assert len(set(names)) == len(names)
    assert {"vector_add", "dropout", "rotary_halves", "rotary_pairs", "swiglu"} <= set(names)
    for entry in found:
        assert KEYS <= set(entry), f"{entry['name']} lacks {KEYS - set(entry)}"
        assert entry["sizes"] and all(isinstance(size, dict) for size in entry["sizes"])
        for size in entry["sizes"]:
            for key, rest in (("bytes", (2,)), ("flops", ()), ("backward_bytes", (2,)), ("backward_flops", ())):
                assert not entry.get(key) or entry[key](size, *rest) > 0, f"{entry['name']} {key}"
        assert entry["bytes"] or entry["flops"], f"{entry['name']} has no ceiling to be compared with"


def test_names_choose_modules_and_entries():
    assert [e["name"] for e in entries(["rotary"])] == ["rotary_halves", "rotary_pairs"]
    assert [e["name"] for e in entries(["rotary_pairs"])] == ["rotary_pairs"]
    with pytest.raises(SystemExit, match="called vector_sub; there are .*vector_add"):
        entries(["vector_sub"])


def test_tiny_sizes():
    assert tiny({"n": 4096, "e": 8, "p": 0.5, "causal": True, "lengths": [100, 3, 50, 60], "kind": "a"}) == {
        "n": 16, "e": 8, "p": 0.5, "causal": True, "lengths": [16, 3, 16], "kind": "a",
    }  # fmt: skip


def test_liger_stands_beside_where_it_is_installed(monkeypatch):
    functional = types.SimpleNamespace(liger_swiglu=lambda gate, up: "theirs")
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.SimpleNamespace(functional=functional))
    assert bench.liger("swiglu")["Liger"](1, 2) == "theirs"
    assert bench.liger("vector_add") == {}
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    assert bench.liger("swiglu") == {}


# --- is it right


def test_check_of_the_shipped_kernels(capsys):
    assert main(["--check", "vector_add", "dropout", "rotary", "swiglu"]) == 0
    said = capsys.readouterr().out
    assert said.count("right") == 5 and "refused" not in said


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_refused(name, monkeypatch, capsys):
    ours, reason = BROKEN[name]
    monkeypatch.setattr(bench, "entries", lambda names: [stub(ours=ours), stub("good")])
    assert main(["--check"]) == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert "refused: " in bad and "right" not in bad
    assert good.endswith("right")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad)


def test_sixteen_bits_may_be_as_inexact_as_torch(device):
    size = {"elements": 1000}
    assert wrong(stub(), size, torch.float16, device) == ""
    assert "off by" in wrong(stub(ours=lambda x: (x * 1.01) ** 2), size, torch.float16, device)


def test_a_reference_that_needs_too_much_memory_is_replaced_by_a_peer(device):
    def huge(x):
        raise torch.OutOfMemoryError("too much")

    size = {"elements": 100}
    peers = {"broken": stops, "peer": lambda x: x * x}
    assert wrong(stub(reference=huge, peers=peers), size, torch.float16, device) == ""
    assert "off by" in wrong(stub(reference=huge, ours=torch.abs, peers=peers), size, torch.float16, device)
    assert "nothing vouches" in wrong(stub(reference=huge), size, torch.float16, device)
    assert "reference stops" in wrong(stub(reference=stops), size, torch.float16, device)


def test_whole_numbers_are_compared_exactly(device):
    whole = dict(reference=lambda x: x.sort().indices, differentiate=())
    assert wrong(stub(ours=lambda x: x.argsort(), **whole), {"elements": 9}, torch.float32, device) == ""
    backwards = lambda x: x.argsort(descending=True)
    assert "differs" in wrong(stub(ours=backwards, **whole), {"elements": 9}, torch.float32, device)


# --- how fast it is


@pytest.mark.skipif(not INTERPRET, reason="a GPU is there")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "on a GPU only" in capsys.readouterr().out


@pytest.fixture
def measured(monkeypatch, tmp_path, capsys):
    """run() with a clock that we set: ms by implementation; ceilings of 1 GB and 10 Gflop per ms."""

    def go(*found, ms=lambda name: 1.25, **options):
        def timed(function, inputs, wrt, direction):
            median = ms(getattr(function, "label", "ours"))
            return median, 0.9 * median, 1.1 * median

        def compile(function, **options):
            assert not options["dynamic"]
            compiled = lambda *inputs: function(*inputs)
            compiled.label = "torch.compile"
            return compiled

        monkeypatch.setattr(bench, "timed", timed)
        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(bench, "ceilings", lambda dtype: (BILLION, 10 * BILLION))
        status = run(list(found), torch.float32, "A GPU", results=tmp_path, **options)
        rows = list(csv.DictReader((tmp_path / "A_GPU.csv").open()))
        return status, rows, capsys.readouterr().out

    go.folder = tmp_path
    return go


def test_times_become_shares_of_the_ceilings(measured):
    status, rows, said = measured(stub(peers={"twin": torch.square}))
    assert status == 0 and "implausible" not in said
    assert [(r["direction"], r["implementation"]) for r in rows] == [
        (direction, name)
        for direction in ("forward", "backward")
        for name in ("ours", "eager", "torch.compile", "twin")
    ]
    ours = [r for r in rows if r["implementation"] == "ours"]
    assert [(float(r["gb_per_s"]), float(r["share"])) for r in ours] == [(800, 0.8), (1000, 1.0)]
    assert [ours[0][k] for k in ("ms", "ms_20", "size", "dtype")] == ["1.25", "1.125", "elements=8", "float32"]
    assert (measured.folder / "A_GPU.png").stat().st_size > 5000


def test_the_ceiling_that_binds_counts(measured):
    _, rows, _ = measured(stub(flops=lambda size: 10 * BILLION, differentiate=()))
    assert float(rows[0]["share"]) == 0.8 and float(rows[0]["tflop_per_s"]) == 8
    _, rows, _ = measured(stub(flops=lambda size: 12 * BILLION, differentiate=()))
    assert float(rows[0]["share"]) == pytest.approx(0.96)


def test_more_than_the_ceiling_is_implausible(measured):
    status, rows, said = measured(stub(differentiate=()), ms=lambda name: 0.9 if name == "ours" else 2)
    assert status == 1 and "implausible: 1.11 of the ceiling" in said
    assert rows[0]["verdict"] == "implausible: 1.11 of the ceiling"
    status, rows, _ = measured(stub(differentiate=(), bytes=lambda size, itemsize: 2**27), ms=lambda name: 0.1)
    assert status == 0 and rows[0]["verdict"] == "right"  # small: it may come from the cache


def test_a_refused_kernel_gets_no_time(measured):
    status, rows, said = measured(stub(ours=BROKEN["a value a little off"][0]), stub("good"))
    assert status == 1 and "refused: result 0 is off by" in said
    bad = [r for r in rows if r["kernel"] == "stub"]
    assert len(bad) == 1 and bad[0]["ms"] == "" and bad[0]["verdict"].startswith("refused")
    assert {r["kernel"] for r in rows} == {"stub", "good"}


def test_a_peer_that_fails_is_left_out(measured, monkeypatch):
    timed = lambda name: 1.25 if name != "torch.compile" else stops(0)
    status, rows, said = measured(stub(), ms=timed)
    assert status == 0 and "torch.compile does not run: RuntimeError: out of registers" in said
    assert {r["implementation"] for r in rows} == {"ours", "eager"}


def test_lines_of_other_kernels_stay(measured):
    measured(stub("first"), stub("second"))
    _, rows, _ = measured(stub("second"), ms=lambda name: 2)
    assert {(r["kernel"], r["ms"]) for r in rows} == {("first", "1.25"), ("second", "2")}


def test_quick_takes_the_largest_size(measured):
    more = dict(
        sizes=({"elements": 8}, {"elements": 9}, {"elements": 3}), bytes=lambda size, itemsize: size["elements"]
    )
    assert len({r["size"] for r in measured(stub(**more))[1]}) == 3
    assert {r["size"] for r in measured(stub(**more), quick=True)[1]} == {"elements=9"}
    more = dict(more, flops=lambda size: 1 / size["elements"])
    assert {r["size"] for r in measured(stub(**more), quick=True)[1]} == {"elements=3"}


def test_what_nobody_would_run_is_not_timed(measured):
    """`eager` replaces a reference that exists for its exactness alone."""
    calls = []
    quick = lambda x: x
    quick.label = "quick"
    _, rows, _ = measured(stub(eager=quick), ms=lambda name: calls.append(name) or 1)
    assert calls == ["ours", "quick", "torch.compile"] * 2


def test_backward_alone_is_timed(monkeypatch, device):
    monkeypatch.setattr(bench, "milliseconds", lambda run: run())
    x = torch.arange(4.0, device=device)
    (grad,) = bench.timed(torch.square, (x,), (0,), "backward")
    assert grad.shape == (4,)
    assert torch.equal(bench.timed(torch.square, (x,), (0,), "forward"), x * x)
    assert not x.requires_grad


# --- is it enough


def case(name, direction="forward", share=None, fill=None, large=True, size=None, **ms):
    return Case(name, direction, size or {}, large, share, fill, {k.replace("_", " "): v for k, v in ms.items()})


GOALS = [
    (case("softmax", share=0.85, ours=1), [1.0]),
    (case("rms_norm with residual", "backward", share=0.8, ours=1, **{"torch.compile": 1.1}), [0.8 / 0.85, 1.1]),
    (case("softmax", share=0.1, ours=1, large=False), []),
    (case("linear_cross_entropy", share=0.1, ours=1), []),
    (case("matmul", ours=1, cuBLAS=0.85), [1.0]),
    (case("flash_attention_causal", ours=1, SDPA_flash=0.9, SDPA_cuDNN=0.6, size={"e": 128}), [0.9, 1.0]),
    (case("flash_attention", ours=1, SDPA_flash=1.2, SDPA_cuDNN=0.3, size={"e": 64}), [1.2]),
    (case("flash_attention", "backward", ours=1, SDPA_flash=0.8, SDPA_cuDNN=0.1, size={"e": 128}), [1.0]),
    (case("encoder", ours=1, padded_encoder=1.5, fill=0.6), [1.0]),
]


@pytest.mark.parametrize("case, expected", GOALS, ids=lambda value: getattr(value, "name", ""))
def test_goals(case, expected):
    assert [reached for _, reached in goals(case)] == pytest.approx(expected)


def test_the_worst_size_decides(capsys):
    make = lambda share, n: case("softmax", share=share, ours=1, size={"n": n})
    verdicts([make(0.9, 1), make(0.84, 2), make(0.95, 3)])
    verdicts([make(0.9, 1)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("goal missed softmax") and first.endswith("worst 0.99 of it, at n=2")
    assert second.startswith("goal met    softmax")
