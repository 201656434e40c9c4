"""kernels/bench.py without a GPU: what it finds, refuses, measures in which order, computes from times, and writes."""

import csv
import json
import sys
import types

import pytest
import torch

from kernels import INTERPRET, _measure, bench
from kernels._measure import difference, wrong
from kernels.bench import Row, Worker, entries, goals, latest, main, report, rows, run, schedule, tiny

KEYS = {"name", "sizes", "inputs", "ours", "reference", "peers", "differentiate", "bytes", "flops"}
BILLION = 10**9


def stub(name="stub", ours=torch.square, sizes=({"elements": 8},), **more):
    return {
        "name": name, "module": name, "sizes": list(sizes), "ours": ours, "reference": torch.square, "peers": {},
        "inputs": lambda size, dtype, device: (torch.randn(size["elements"], dtype=dtype, device=device),),
        "differentiate": (0,), "bytes": lambda size, itemsize: BILLION, "flops": None,
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
            for direction in ("forward", "backward"):
                assert 0.3 < entry.get("reach", lambda *_: 1)(size, direction) <= 1
        assert entry["bytes"] or entry["flops"], f"{entry['name']} has no ceiling to be compared with"


def test_names_choose_modules_and_entries():
    assert [e["name"] for e in entries(["rotary"])] == ["rotary_halves", "rotary_pairs"]
    assert [e["name"] for e in entries(["rotary_pairs"])] == ["rotary_pairs"]
    with pytest.raises(SystemExit, match="called vector_sub; there are .*vector_add"):
        entries(["vector_sub"])


def test_the_schedule_holds_every_row_once_and_the_important_ones_first():
    found = entries()
    order = [(entry["name"], tuple(size.items())) for entry, size in schedule(found)]
    assert len(set(order)) == len(order) == sum(len(e["sizes"]) for e in found)
    assert order[0][0] == "flash_attention_causal" and {"e": 128, "n": 16384}.items() <= dict(order[0][1]).items()
    leading = [name for name, _ in order[: len(bench.FIRST)]]
    assert leading == [name for name, _ in bench.FIRST], "each line of FIRST names one row that exists"


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
    monkeypatch.setattr(bench, "entries", lambda names=(): [stub(ours=ours), stub("good")])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_that_is_half_wrong_is_found_among_larger_ones(dtype):
    """A bound on the largest error alone passes it: in bfloat16 two roundings of 8 are 0.06, as large as the row."""
    want = torch.randn(64, 256)
    want[3] *= 0.1
    want[5] *= 100
    right, half = want.to(dtype), want.to(dtype)
    assert difference(right, want, right) == ""
    half[3, :128] = 0
    assert (half - want).abs().max() < 2 * torch.finfo(dtype).eps * want.abs().max()
    assert "1 of 64 rows are off, row 3" in difference(half, want, right)
    nothing = torch.zeros(4, 8)
    assert difference(nothing.to(dtype), nothing, nothing.to(dtype)) == ""


def test_only_the_part_that_an_entry_names_is_compared(device):
    seen = []

    def reference(x):
        seen.append(tuple(x.shape))
        return x.square()

    entry = stub(reference=reference, part=lambda x: x[-1:], sizes=[{"elements": 8}])
    entry["inputs"] = lambda size, dtype, device: (torch.randn(4, 8, dtype=dtype, device=device),)
    assert wrong(entry, {"elements": 8}, torch.float32, device) == "" and set(seen) == {(1, 8)}
    entry["ours"] = lambda x: x.square() * torch.tensor([1.0, 1, 1, 1.01], device=x.device)[:, None]
    assert "off" in wrong(entry, {"elements": 8}, torch.float32, device)


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


class Clock:
    """A clock that moves when somebody works."""

    now = 0.0

    def __call__(self):
        return self.now


class FakeWorker:
    """Answers as a process would, with times that a test sets: seconds for the clock, milliseconds for the rows."""

    def __init__(self, log):
        self.module = log.stem
        self.made.append(self.module)

    def ask(self, job, seconds):
        self.asked.append(job)
        self.clock.now += self.takes(job)
        if self.takes(job) > seconds:
            self.clock.now -= self.takes(job) - seconds
            raise RuntimeError(f"gave no answer in {seconds:.0f} s")
        if job["do"] == "where":
            yield {"device": "A GPU", "target": ["cuda:90", 232448, 132]}
        elif job["do"] == "ceilings":
            yield {"ceilings": [BILLION, 10 * BILLION]}
        elif job["do"] == "measure":
            entry = next(e for e in self.found if e["name"] == job["name"])
            for row in rows(entry, job["size"], torch.float32, job["device"], job["limits"], job["compiled"]):
                yield json.loads(json.dumps({"row": bench.asdict(row)}))

    def stop(self):
        self.stopped.append(self.module)


@pytest.fixture
def measured(monkeypatch, tmp_path, capsys):
    """run() with times that we set: ms by implementation; ceilings of 1 GB and 10 Gflop per ms."""

    def go(*found, ms=lambda name: 1.25, minutes=9, takes=lambda job: 1.0, held=True):
        def timed(function, inputs, wrt, direction):
            median = ms(getattr(function, "label", "ours"))
            return median, 0.9 * median, 1.1 * median, 0.05, held

        def compile(function, **options):
            assert not options["dynamic"]
            compiled = lambda *inputs: function(*inputs)
            compiled.label = "torch.compile"
            return compiled

        clock = Clock()
        worker = type("Fake", (FakeWorker,), {
            "made": [], "asked": [], "stopped": [], "found": found, "clock": clock, "takes": staticmethod(takes),
        })  # fmt: skip
        monkeypatch.setattr(_measure, "timed", timed)
        monkeypatch.setattr(torch, "compile", compile)
        go.worker, go.clock = worker, clock
        status = run(list(found), torch.float32, tmp_path, minutes, worker=worker, clock=clock)
        with (tmp_path / "A_GPU.csv").open() as file:
            everything = list(csv.DictReader(file))
        go.rows = [row for row in everything if row["kernel"] != "ceiling"]
        return status, go.rows, capsys.readouterr().out

    go.folder = tmp_path
    return go


def test_times_become_shares_of_the_ceilings(measured):
    status, found, said = measured(stub(peers={"twin": lambda x: x * x}))
    assert status == 0 and "implausible" not in said
    assert [(r["direction"], r["implementation"]) for r in found] == [
        *((direction, name) for direction in ("forward", "backward") for name in ("ours", "twin", "eager")),
        ("forward", "torch.compile"), ("backward", "torch.compile"),
    ]  # fmt: skip
    ours = [r for r in found if r["implementation"] == "ours"]
    assert [(float(r["gb_per_s"]), float(r["share"])) for r in ours] == [(800, 0.8), (1000, 1.0)]
    assert [ours[0][k] for k in ("ms", "ms_20", "launch_ms", "size", "dtype")] == [
        "1.25", "1.125", "0.05", "elements=8", "float32"
    ]  # fmt: skip
    assert (measured.folder / "A_GPU.png").stat().st_size > 5000
    assert sorted(set(measured.worker.stopped)) == ["ceilings", *sorted(set(measured.worker.made) - {"ceilings"})]


def test_the_whole_schedule_with_fake_times(measured, monkeypatch):
    """Every entry of the package: what would be measured in nine minutes if a row took four seconds, and in what order.

    No kernel runs: the answer to a job is one row of ours and one of each peer, with a time that we choose.
    """
    found = entries()

    def fake_rows(entry, size, dtype, device, limits, compiled=False):
        names = ["torch.compile"] if compiled else ["ours", *(entry["peers"] or {})]
        for direction in ["forward"] + ["backward"] * bool(entry["differentiate"]):
            for name in names:
                row = Row(device, entry["name"], direction, "bfloat16", bench.label(size), name, 1.0)
                for key, value in bench.judge(entry, size, direction, torch.bfloat16, 1e5, limits).items():
                    setattr(row, key, value)
                yield row

    monkeypatch.setitem(globals(), "rows", fake_rows)
    status, kept, said = measured(*found, takes=lambda job: {"compile": 0.0}.get(job["do"], 4.0))
    assert status == 0 and measured.clock.now <= 9 * 60
    jobs = [job for job in measured.worker.asked if job["do"] == "measure"]
    first, last = [j for j in jobs if not j["compiled"]], [j for j in jobs if j["compiled"]]
    assert jobs == first + last and len(first) >= 95 and len(last) >= 25
    order = [(entry["name"], bench.label(size)) for entry, size in schedule(found)]
    assert [(j["name"], bench.label(j["size"])) for j in first] == order[: len(first)]
    assert all(j["name"].startswith(bench.BANDWIDTH_BOUND) for j in last[:20])
    ahead = [job for job in measured.worker.asked if job["do"] == "compile"]
    blind = {(e["name"], bench.label(s)) for e, s in schedule(found) if not e.get("numbers")}
    assert {(job["name"], bench.label(job["size"])) for job in ahead} == blind, "all is compiled ahead"
    assert f"{len(first)} of {len(order)} rows measured, next would be" in said
    assert {row["kernel"] for row in kept} >= {name for name, _ in bench.FIRST}
    assert sum(job["do"] == "ceilings" for job in measured.worker.asked) == 1
    assert len(set(measured.worker.made) - {"ceilings"}) >= len({e["module"] for e in found}), "a process each"


def test_a_crash_and_a_hang_cost_one_row_each(measured, monkeypatch):
    def takes(job):
        return 1000.0 if job.get("name") == "slow" else 1.0

    ask = FakeWorker.ask

    def dying(self, job, seconds):
        if job.get("name") == "dies":
            raise RuntimeError("its process ended with status -11")
        yield from ask(self, job, seconds)

    monkeypatch.setattr(FakeWorker, "ask", dying)
    status, found, _ = measured(stub("dies"), stub("slow"), stub("good"), takes=takes)
    assert status == 1
    verdicts = {(r["kernel"], r["implementation"]): r["verdict"] for r in found if not r["ms"]}
    assert verdicts["dies", "ours"] == "crashed: its process ended with status -11"
    assert verdicts["slow", "ours"] == f"crashed: gave no answer in {bench.LONGEST_ROW} s"
    assert {r["direction"] for r in found if r["kernel"] == "good"} == {"forward", "backward"}


def test_rows_stand_in_the_file_as_soon_as_they_are_measured(measured, monkeypatch):
    """A run that is killed keeps what it had: the next row is only asked for when the last is written."""
    counts = []
    real = _measure.wrong

    def counting(*args):
        path = measured.folder / "A_GPU.csv"
        counts.append(len(path.read_text().splitlines()))
        if len(counts) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(_measure, "wrong", counting)
    with pytest.raises(KeyboardInterrupt):
        measured(stub("a", differentiate=()), stub("b", differentiate=()), stub("c", differentiate=()))
    assert counts == [3, 5, 7]  # the names of the columns, two ceilings, then ours and eager of each
    assert "c" not in {row["kernel"] for row in latest(measured.folder / "A_GPU.csv")}
    assert set(measured.worker.stopped) >= {"a", "b"}


def test_a_worker_is_a_process_that_answers_dies_and_is_given_up(tmp_path):
    script = (
        "import json, sys, time, os\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    if job['do'] == 'die': os._exit(7)\n"
        "    if job['do'] == 'hang': time.sleep(60)\n"
        "    if job['do'] == 'fail': print(json.dumps({'done': True, 'error': 'ValueError: no'}), flush=True)\n"
        "    else:\n"
        "        print(json.dumps({'row': job['do']}), flush=True)\n"
        "        print(json.dumps({'done': True}), flush=True)\n"
    )
    worker = Worker(tmp_path / "log")
    worker.command = [sys.executable, "-c", script]
    try:
        assert list(worker.ask({"do": "a"}, 20)) == [{"row": "a"}]
        with pytest.raises(RuntimeError, match="ended with status 7"):
            list(worker.ask({"do": "die"}, 20))
        assert list(worker.ask({"do": "b"}, 20)) == [{"row": "b"}]  # it was started again
        with pytest.raises(RuntimeError, match="ValueError: no"):
            list(worker.ask({"do": "fail"}, 20))
        with pytest.raises(RuntimeError, match="no answer in"):
            list(worker.ask({"do": "hang"}, 0.3))
        assert list(worker.ask({"do": "c"}, 20)) == [{"row": "c"}]
    finally:
        worker.stop()


def test_the_real_worker_answers_and_keeps_prints_out_of_its_answers(tmp_path):
    worker = Worker(tmp_path / "log")
    try:
        job = {"do": "measure", "name": "vector_add", "size": {"elements": 64}, "dtype": "float32", "device": "here",
               "limits": None, "compiled": False}  # fmt: skip
        (first, *_) = found = [answer["row"] for answer in worker.ask(job, 120)]
        assert first["kernel"] == "vector_add" and first["implementation"] == "ours" and first["size"] == "elements=64"
        assert INTERPRET is False or all(row["verdict"].startswith("does not run") for row in found)
    finally:
        worker.stop()


def test_the_ceiling_that_binds_counts(measured):
    _, found, _ = measured(stub(flops=lambda size: 10 * BILLION, differentiate=()))
    assert float(found[0]["share"]) == 0.8 and float(found[0]["tflop_per_s"]) == 8
    _, found, _ = measured(stub("more", flops=lambda size: 12 * BILLION, differentiate=()))
    assert float(found[-1]["share"]) == pytest.approx(0.96)


def test_more_than_the_ceiling_is_implausible(measured):
    status, found, said = measured(stub(differentiate=()), ms=lambda name: 0.9 if name == "ours" else 2)
    assert status == 1 and "implausible: 1.11 of the ceiling" in said
    assert found[0]["verdict"] == "implausible: 1.11 of the ceiling"
    small = stub(differentiate=(), bytes=lambda size, itemsize: 2**27)  # it may come from the cache
    status, found, _ = measured(small, ms=lambda name: 0.1)
    assert status == 0 and found[-1]["verdict"] == ""


def test_a_call_that_waits_for_the_gpu_says_so(measured):
    status, found, _ = measured(stub(differentiate=()), held=False)
    assert status == 0 and found[0]["verdict"] == "right; waits for the GPU: Python is in the time"


def test_a_refused_kernel_gets_no_time(measured):
    status, found, said = measured(stub(ours=BROKEN["a value a little off"][0]), stub("good"))
    assert status == 1 and "refused: result 0 is off by" in said
    bad = [r for r in found if r["kernel"] == "stub" and r["implementation"] == "ours"]
    assert len(bad) == 1 and bad[0]["ms"] == "" and bad[0]["verdict"].startswith("refused")
    assert {r["kernel"] for r in found} == {"stub", "good"}


def test_a_peer_that_fails_is_a_row_without_a_time(measured):
    timed = lambda name: 1.25 if name != "torch.compile" else stops(0)
    status, found, said = measured(stub(), ms=timed)
    assert status == 0 and "torch.compile  " in said and "does not run: RuntimeError: out of registers" in said
    assert {r["implementation"] for r in found if r["ms"]} == {"ours", "eager"}


def test_a_later_run_replaces_what_it_measures_again_and_keeps_the_rest(measured):
    measured(stub("first"), stub("second"))
    measured(stub("second"), ms=lambda name: 2)
    ours = [r for r in latest(measured.folder / "A_GPU.csv") if r["implementation"] == "ours"]
    assert {(r["kernel"], r["ms"]) for r in ours} == {("first", "1.25"), ("second", "2")}


def test_what_nobody_would_run_is_not_timed(measured):
    """`eager` replaces a reference that exists for its exactness alone; None leaves eager torch out."""
    calls = []
    quick = lambda x: x
    quick.label = "quick"
    measured(stub(eager=quick), ms=lambda name: calls.append(name) or 1)
    assert calls == ["ours", "quick"] * 2 + ["torch.compile"] * 2
    _, found, _ = measured(stub("none", eager=None))
    assert {r["implementation"] for r in found if r["kernel"] == "none"} == {"ours"}


# --- is it enough


def case(name, direction="forward", *, share="", fill="", reach="", large="yes", size="n=1", **ms):
    peers = {key.replace("_", " ").replace("torch compile", "torch.compile"): value for key, value in ms.items()}
    ours = {"kernel": name, "direction": direction, "share": share, "fill": fill, "reach": reach, "large": large,
            "size": size, "ms": peers.pop("ours")}  # fmt: skip
    return ours, peers


GOALS = [
    (case("softmax", share=0.8, ours=1, torch_compile=1.1), [0.8 / 0.85, 1.1]),
    (case("softmax", share=0.6, reach=2 / 3, ours=1), [0.9 / 0.85]),
    (case("softmax", share=0.1, ours=1, large=""), []),
    (case("linear_cross_entropy", share=0.1, ours=1), []),
    (case("matmul", ours=1, cuBLAS=0.85), [1.0]),
    (case("flash_attention_causal", ours=1, SDPA_flash=0.9, SDPA_cuDNN=0.6, size="n=1 e=128"), [0.9, 1.0]),
    (case("flash_attention", ours=1, SDPA_flash=1.2, SDPA_cuDNN=0.3, size="n=1 e=64"), [1.2]),
    (case("flash_attention", "backward", ours=1, SDPA_flash=0.8, SDPA_cuDNN=0.1, size="n=1 e=128"), [1.0]),
    (case("encoder", ours=1, padded_encoder=1.5, fill=0.6), [1.0]),
]


@pytest.mark.parametrize("case, expected", GOALS, ids=[ours["kernel"] for (ours, _), _ in GOALS])
def test_goals(case, expected):
    assert [reached for _, reached in goals(*case)] == pytest.approx(expected)


def test_the_worst_size_decides(tmp_path, capsys):
    head = ",".join(bench.NAMES)

    def write(*shares):
        lines = [Row("a GPU", "softmax", "forward", "float32", f"n={n}", "ours", 1.0, share=s, large="yes")
                 for n, s in enumerate(shares, 1)]  # fmt: skip
        path = tmp_path / "a.csv"
        path.write_text("\n".join([head, *(",".join(map(str, bench.asdict(r).values())) for r in lines)]) + "\n")
        return path

    assert report(write(0.9, 0.84, 0.95)) == 0
    assert main(["--report", str(write(0.9).parent)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("goal missed softmax") and first.endswith("worst 0.99 of it, at n=2")
    assert second.startswith("goal met    softmax")
