"""How fast the kernels are on a GPU, next to what the same machine can do and to what others wrote for it.

python -m kernels.bench [NAME ...] [FOLDER] [--minutes 9] [--dtype bfloat16] writes FOLDER/<device>.csv, a row as
soon as it is measured, so that whatever ends the run early loses the rows that were still to come and no others; then
a figure beside it and the goals, which `--report FOLDER` makes again from the file alone.

Three stages share the minutes. Side by side on all cores, processes compile what the schedule will need. Then rows are
measured one at a time, the most important first, each module in a process of its own: a crash or a hang costs one row.
`torch.compile` as a peer comes last, because it compiles for seconds and measures for milliseconds. Two ceilings open
the run: a large copy (bytes per second) and a large matrix product (operations per second). A kernel whose result is
wrong at a size is refused there: its time is not reported, and the exit status is 1.

python -m kernels.bench --check compares with the references at tiny sizes, without times, and needs no GPU.

An entry of `benchmarks()` is a dict: name, sizes (dicts), inputs(size, dtype, device), ours, reference, peers (by
name), differentiate (positions of the inputs), bytes(size, itemsize) and flops(size) or None, and the same as
backward_bytes and backward_flops. It may have: tiny (the size for --check), eager (what to time as eager torch and
under torch.compile when nobody would run the reference; None for nothing), fill (size -> share of real tokens, for
padded peers), part (of a tensor that does not depend on the rest, for the comparison), reach(size, direction) -> the
share of the ceiling that the traffic of this kernel allows, where it reads more than once; numbers (true where it looks
at them, so that it cannot be compiled with tensors that have none).
"""

import argparse
import csv
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from . import _compile
from . import _measure as measure
from ._runtime import DEVICE, HAS_GPU, INTERPRET, guarded

FOLDER = Path(__file__).parent
BANDWIDTH_BOUND = ("vector_add", "dropout", "softmax", "layer_norm", "rms_norm", "rotary", "swiglu", "cross_entropy")
FIRST = [  # the order of the rows: entries at all sizes that agree with what stands here; then whatever is left
    ("flash_attention_causal", {"n": 16384, "e": 128}),
    ("matmul", {"m": 8192}),
    ("flash_attention_causal", {"n": 16384, "e": 64}),
    ("rms_norm", {"columns": 4096}),
    ("layer_norm", {"columns": 4096}),
    ("softmax", {"columns": 4096}),
    ("cross_entropy", {"columns": 128256}),
    ("rotary_halves", {"tokens": 8192}),
    ("swiglu", {"columns": 14336}),
    ("decode_attention", {"b": 16}),
    ("int8_matmul", {"m": 1}),
    ("varlen_attention", {"length": 8192}),
    ("linear_cross_entropy", {"tokens": 8192, "words": 32000}),
    ("flash_attention", {"n": 16384, "e": 128}),
    ("flash_attention_causal", {"n": 4096, "e": 128}),
    ("linear_attention", {"tokens": 4096, "width": 128}),
    ("selective_scan", {"tokens": 4096}),
    ("flash_attention_causal", {"n": 16384, "e": 256}),
    ("vector_add", {"elements": 2**28}),
    ("dropout", {"elements": 2**28}),
    ("matmul_bias_gelu", {"m": 8192}),
    ("int8_matmul", {"m": 16}),
    ("linear_scan", {"tokens": 4096}),
    ("padding_free_encoder", {"length": 2048}),
    ("matmul", {"m": 16384}),
]
LONGEST_ROW = 75  # seconds after which a row is given up


@dataclass
class Row:
    """One measurement: a row of the CSV. share: of the ceiling that binds, copy bandwidth or matrix product."""

    device: str
    kernel: str
    direction: str
    dtype: str
    size: str
    implementation: str
    ms: float | str = ""
    ms_20: float | str = ""
    ms_80: float | str = ""
    launch_ms: float | str = ""
    gb_per_s: float | str = ""
    tflop_per_s: float | str = ""
    share: float | str = ""
    reach: float | str = ""
    fill: float | str = ""
    large: str = ""
    verdict: str = ""


NAMES = [f.name for f in fields(Row)]

# --- what there is


def entries(chosen=()):
    """The entries of all modules in this folder, or those whose module or own name is chosen, each with its module."""
    found, modules = [], sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))
    for name in modules:
        if name != Path(__file__).stem:
            module = importlib.import_module(f".{name}", __package__)
            found += [{**entry, "module": name} for entry in getattr(module, "benchmarks", list)()]
    known = {n for entry in found for n in (entry["module"], entry["name"])}
    if unknown := set(chosen) - known:
        sys.exit(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [entry for entry in found if not chosen or {entry["module"], entry["name"]} & set(chosen)]


def schedule(found):
    """Pairs (entry, size) in the order in which they are measured: FIRST, then the largest sizes, then the rest."""
    order = []
    for name, wanted in FIRST:
        for entry in found:
            if entry["name"] == name:
                order += [(entry, s) for s in entry["sizes"] if all(s.get(k) == v for k, v in wanted.items())]
    sizes = {e["name"]: sorted(e["sizes"], key=lambda s, e=e: amount(e, s), reverse=True) for e in found}
    for place in range(max((len(s) for s in sizes.values()), default=0)):
        order += [(e, sizes[e["name"]][place]) for e in found if place < len(sizes[e["name"]])]
    seen = {}
    for entry, size in order:
        seen.setdefault((entry["name"], label(size)), (entry, size))
    return list(seen.values())


def amount(entry, size):
    """How much there is to do at a size: operations, or bytes where they are not counted."""
    return entry["flops"](size) if entry["flops"] else entry["bytes"](size, 2)


def label(size):
    return " ".join(f"{name}={value}" for name, value in size.items())


def liger(name):
    """Liger's kernel for the inputs of our entry, by name: {} where it is not installed or has none."""
    try:
        from liger_kernel.transformers import functional as f
    except ImportError:
        return {}
    calls = {
        "swiglu": lambda gate, up: f.liger_swiglu(gate, up),
        "softmax": lambda x: f.liger_softmax(x),
        "layer_norm": lambda x, w, b, eps: f.liger_layer_norm(x, w, b, eps),
        "rms_norm": lambda x, w, eps: f.liger_rms_norm(x, w, eps),
        "rms_norm with residual": lambda x, w, eps, r: f.liger_fused_add_rms_norm(x, r, w, eps),
        "cross_entropy": lambda x, target: f.liger_cross_entropy(x, target),
        "linear_cross_entropy": lambda x, w, target: f.liger_fused_linear_cross_entropy(x, w, target),
    }
    return {"Liger": calls[name]} if name in calls else {}


def implementations(entry, compiled=False):
    """Ours and everybody beside it, or torch.compile of eager torch alone."""
    eager = entry.get("eager", entry["reference"])
    if compiled:
        return {"torch.compile": torch.compile(eager, dynamic=False)} if eager else {}
    peers = {**(entry["peers"] or {}), **liger(entry["name"])}
    return {"ours": entry["ours"], **peers, **({"eager": eager} if eager and eager not in peers.values() else {})}


def tiny(size):
    """The size with every number cut to at most 16, so that the interpreter can run it."""
    if isinstance(size, dict):
        return {name: tiny(value) for name, value in size.items()}
    if isinstance(size, list | tuple):
        return type(size)(tiny(value) for value in size[:3])
    return min(size, 16) if isinstance(size, int) and not isinstance(size, bool) else size


# --- one row


def judge(entry, size, direction, dtype, ms, limits):
    """What a time means: GB/s, TFLOP/s, share of the ceiling that binds, whether the size is large, and the verdict."""
    prefix = "" if direction == "forward" else "backward_"
    count_bytes, count_flops = entry.get(f"{prefix}bytes"), entry.get(f"{prefix}flops")
    moved, done = count_bytes and count_bytes(size, dtype.itemsize), count_flops and count_flops(size)
    shares = [count / ms / limit for count, limit in zip((moved, done), limits or (), strict=False) if count]
    share = max(shares, default="")
    large = (moved or 0) >= 2**28 or (done or 0) >= 2**37  # smaller ones may live in the cache
    verdict = f"implausible: {share:.2f} of the ceiling" if share and large and share > 1.05 else "right"
    return {"gb_per_s": moved / ms / 1e6 if moved else "", "tflop_per_s": done / ms / 1e9 if done else "",
            "share": share, "large": "yes" if large else "", "verdict": verdict}  # fmt: skip


def rows(entry, size, dtype, device, limits, compiled=False):
    """Measure one entry at one size, a row at a time; a refused kernel gets one row and no time."""
    head = {"device": device, "kernel": entry["name"], "dtype": str(dtype)[6:], "size": label(size)}
    if not compiled and (reason := measure.wrong(entry, size, dtype, DEVICE)):
        yield Row(**head, direction="", implementation="ours", verdict=f"refused: {reason}")
        return
    functions = implementations(entry, compiled)
    for direction in ["forward"] + ["backward"] * bool(entry["differentiate"]):
        more = {"fill": entry["fill"](size) if "fill" in entry else "",
                "reach": entry["reach"](size, direction) if "reach" in entry else ""}  # fmt: skip
        for name, function in functions.items():
            torch.manual_seed(0)
            row = Row(**head, direction=direction, implementation=name, **more)
            try:
                inputs = entry["inputs"](size, dtype, DEVICE)  # fresh: some kernels overwrite what they are given
                row.ms, row.ms_20, row.ms_80, row.launch_ms, held = measure.timed(
                    function, inputs, entry["differentiate"], direction
                )
            except Exception as error:
                row.verdict = f"does not run: {measure.short(error)}"
                yield row
                continue
            found = judge(entry, size, direction, dtype, row.ms, limits)
            found["verdict"] = found["verdict"] if name == "ours" or found["verdict"] != "right" else ""
            if not held:
                found["verdict"] += "; " * bool(found["verdict"]) + "waits for the GPU: Python is in the time"
            for key, value in found.items():
                setattr(row, key, value)
            yield row


def check_all(found, dtype):
    """Compare every entry at its tiny size with its reference; returns how many were refused."""
    refused = 0
    for entry in found:
        size = entry.get("tiny") or tiny(entry["sizes"][0])
        with guarded():
            reason = measure.wrong(entry, size, dtype, DEVICE)
        refused += bool(reason)
        print(f"{entry['name']:28} {label(size):44} {'refused: ' + reason if reason else 'right'}", flush=True)
    return refused


# --- processes that compile and measure


def serve():
    """A worker: jobs as lines of JSON on standard input, answers as lines of JSON on what was standard output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def answer(**content):
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    for line in sys.stdin:
        try:
            do(json.loads(line), answer)
            answer(done=True)
        except Exception as error:
            answer(done=True, error=measure.short(error))


def do(job, answer):
    if job["do"] == "ceilings":
        return answer(ceilings=measure.ceilings(getattr(torch, job["dtype"])))
    if job["do"] == "where":
        return answer(device=torch.cuda.get_device_name(), target=_compile.here())
    entry = next(e for e in entries([job["name"]]) if e["name"] == job["name"])
    dtype = getattr(torch, job["dtype"])
    if job["do"] == "compile":
        with _compile.only_compiled(*job["target"], share=job["share"]):
            measure.evaluate(entry["ours"], entry["inputs"](job["size"], dtype, "meta"), entry["differentiate"])
        return None
    from torch._functorch import config

    config.donated_buffer = False  # or a compiled backward pass could not be run twice
    torch.compiler.reset()
    for row in rows(entry, job["size"], dtype, job["device"], job["limits"], job["compiled"]):
        answer(row=asdict(row))
    if HAS_GPU:
        torch.cuda.empty_cache()  # the next row belongs to another process
    return None


class Worker:
    """A process that serves. ask(job, seconds) yields its answers and raises RuntimeError when it dies or is late."""

    command = [sys.executable, "-m", f"{__package__}.bench", "--serve"]

    def __init__(self, log):
        self.log, self.process = log, None

    def start(self):
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
            )
        self.lines = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process.stdout, self.lines), daemon=True).start()

    @staticmethod
    def listen(stream, lines):
        for line in stream:
            lines.put(line)
        lines.put(None)  # the process is gone

    def ask(self, job, seconds):
        if self.process is None or self.process.poll() is not None:
            self.start()
        until = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone; the queue says so
        while True:
            try:
                line = self.lines.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise RuntimeError(f"gave no answer in {seconds:.0f} s") from None
            if line is None:
                code = self.process.wait()
                self.process = None
                raise RuntimeError(f"its process ended with status {code}")
            found = json.loads(line)
            if found.get("error"):
                raise RuntimeError(found["error"])
            if found.get("done"):
                return
            yield found

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def compile_ahead(order, dtype, target, folder, seconds, worker=Worker, processes=None):
    """Fill the cache on disk with what the schedule needs, side by side; returns (done, given up)."""
    jobs, until, done = queue.Queue(), time.monotonic() + seconds, []
    for entry, size in order:
        if entry.get("numbers"):
            continue
        k = 6 if entry["flops"] else 2
        for i in range(k):
            jobs.put({"do": "compile", "name": entry["name"], "size": size, "dtype": str(dtype)[6:], "target": target,
                      "share": (i, k)})  # fmt: skip
    count = jobs.qsize()

    def pull(number):
        one = worker(folder / f"compile_{number}.log")
        try:
            while (left := until - time.monotonic()) > 1:
                try:
                    job = jobs.get_nowait()
                    list(one.ask(job, left))
                    done.append(job)
                except queue.Empty:
                    return
                except RuntimeError:
                    continue  # measuring will say what is wrong
        finally:
            one.stop()

    threads = [threading.Thread(target=pull, args=(n,)) for n in range(processes or max(1, (os.cpu_count() or 2) - 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(done), count - len(done)


class Results:
    """The CSV, which grows by a row at a time."""

    def __init__(self, path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(NAMES) + "\n", encoding="utf-8")

    def add(self, row):
        row = {**asdict(Row(*[""] * 6)), **row}
        row = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, NAMES, lineterminator="\n").writerow(row)
        share = f" {float(row['share']):4.0%} of the ceiling" if row["share"] else ""
        time_ = f"{float(row['ms']):9.4f} ms{share}" if row["ms"] else ""
        verdict = row["verdict"]
        print(f"{row['kernel']:24} {row['size']:36} {row['direction']:8} {row['implementation']:14} {time_} {verdict}",
              flush=True)  # fmt: skip


def run(found, dtype, folder, minutes, worker=Worker, clock=time.monotonic):
    """The whole schedule; returns the exit status: 1 when a kernel was refused, crashed, or a number cannot be true."""
    end, folder = clock() + 60 * minutes, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    logs, order, workers = folder / "logs", schedule(found), {}
    logs.mkdir(exist_ok=True)

    def ask(module, job, seconds):
        if module not in workers:
            workers[module] = worker(logs / f"{module}.log")
        return workers[module].ask(job, min(seconds, end - clock()))

    try:
        (where,) = ask("ceilings", {"do": "where"}, 60)
        device, target = where["device"], where["target"]
        results = Results(folder / f"{device.replace(' ', '_')}.csv")
        head = {"device": device, "dtype": str(dtype)[6:]}
        done, left = compile_ahead(order, dtype, target, logs, min(0.25 * 60 * minutes, end - clock()), worker)
        print(f"{device}: {done} compilations ahead, {left} left, {end - clock():.0f} s to go", flush=True)
        limits = None
        try:
            ((limits,),) = (a.values() for a in ask("ceilings", {"do": "ceilings", "dtype": str(dtype)[6:]}, 60))
            results.add({**head, "kernel": "ceiling", "implementation": "copy", "gb_per_s": limits[0] / 1e6})
            results.add({**head, "kernel": "ceiling", "implementation": "cuBLAS", "tflop_per_s": limits[1] / 1e9})
        except RuntimeError as error:
            results.add({**head, "kernel": "ceiling", "verdict": f"crashed: {error}"})
        workers.pop("ceilings").stop()

        def measured(entry, size, compiled):
            job = {"do": "measure", "name": entry["name"], "size": size, "dtype": str(dtype)[6:], "device": device,
                   "limits": limits, "compiled": compiled}  # fmt: skip
            try:
                for answer in ask(entry["module"], job, LONGEST_ROW):
                    results.add(answer["row"])
            except RuntimeError as error:
                name = "torch.compile" if compiled else "ours"
                about = {"kernel": entry["name"], "size": label(size), "implementation": name}
                results.add({**head, **about, "verdict": f"crashed: {error}"})

        good = []
        for entry, size in order:
            if clock() > end - 0.25 * 60 * minutes:  # the last quarter belongs to torch.compile
                break
            measured(entry, size, False)
            good.append((entry, size))
        for entry, size in sorted(good, key=lambda pair: not pair[0]["name"].startswith(BANDWIDTH_BOUND)):
            if clock() > end - 10:
                break
            if entry.get("eager", entry["reference"]):
                measured(entry, size, True)
        then = f", next would be {order[len(good)][0]['name']}" if len(good) < len(order) else ""
        print(f"{len(good)} of {len(order)} rows measured{then}", flush=True)
    finally:
        for one in workers.values():
            one.stop()
    return report(results.path)


# --- is it enough


def latest(path):
    """The rows of a CSV; of several for the same thing the last, and none that a later refusal takes back."""
    with Path(path).open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    key = lambda row: tuple(row[k] for k in ("kernel", "direction", "dtype", "size", "implementation"))
    return list({key(row): row for row in found}.values())


def goals(ours, peers):
    """The goals that a row must reach, as (what is asked, reached / asked): met from 1 upward. Large sizes only.

    ours: a row of the CSV; peers: the times in ms of the others at the same size, by name.
    """
    if not ours["large"]:
        return
    name, direction = ours["kernel"], ours["direction"]
    speed = lambda peer: peers[peer] / float(ours["ms"])
    if name.startswith(BANDWIDTH_BOUND) and ours["share"]:
        reach = float(ours["reach"] or 1)
        what = "85% of the copy bandwidth" + f" (its traffic allows {reach:.0%})" * (reach < 1)
        yield what, float(ours["share"]) / (0.85 * reach)
        if "torch.compile" in peers:
            yield "as fast as torch.compile", speed("torch.compile")
    if name == "matmul" and "cuBLAS" in peers:
        yield "85% of cuBLAS", speed("cuBLAS") / 0.85
    if name.startswith("flash_attention"):
        share = 1.0 if direction == "forward" else 0.8
        if "SDPA flash" in peers:
            yield f"{share:.0%} of SDPA flash", speed("SDPA flash") / share
        if "SDPA cuDNN" in peers and direction == "forward" and "e=128" in ours["size"].split():
            yield "60% of SDPA cuDNN at head width 128", speed("SDPA cuDNN") / 0.6
    for peer in peers:
        if ours["fill"] and peer.startswith("padded"):
            yield "0.9 / fill of the padded speed", speed(peer) * float(ours["fill"]) / 0.9


def report(path):
    """Print each goal of each kernel with its worst size, draw the figure, return the exit status."""
    found = latest(path)
    timed = [row for row in found if row["ms"]]
    worst = {}
    for ours in (row for row in timed if row["implementation"] == "ours"):
        same = [r for r in timed if all(r[k] == ours[k] for k in ("kernel", "direction", "dtype", "size"))]
        peers = {r["implementation"]: float(r["ms"]) for r in same if r is not ours}
        for goal, reached in goals(ours, peers):
            key = (ours["kernel"], ours["direction"], goal)
            worst[key] = min(worst.get(key, (float("inf"), "")), (reached, ours["size"]))
    for (name, direction, goal), (reached, size) in worst.items():
        state = "met" if reached >= 1 else "missed"
        print(f"goal {state:6} {name:28} {direction:9} {goal}: worst {reached:.2f} of it, at {size}")
    if any(row["share"] for row in timed):
        draw(Path(path), timed)
    bad = [row for row in found if row["verdict"].startswith(("refused", "implausible", "crashed"))]
    for row in bad:
        print(f"{row['kernel']} at {row['size']}, {row['implementation']} {row['direction']}: {row['verdict']}")
    return 1 if bad else 0


def draw(path, found):
    """A figure beside the CSV: for each kernel at its slowest size, everyone's share of the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in found if row["share"]]
    ours = sorted((row for row in found if row["implementation"] == "ours"), key=lambda row: float(row["ms"]))
    last = {(row["kernel"], row["direction"]): row["size"] for row in ours}  # the slowest size comes last
    groups = {k: [r for r in found if (r["kernel"], r["direction"], r["size"]) == (*k, last[k])] for k in sorted(last)}
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.3 * len(groups)), layout="constrained")
    styles = {"ours": ("o", "#0072B2"), "eager": ("s", "#E69F00"), "torch.compile": ("^", "#009E73")}
    for y, group in enumerate(groups.values()):
        for row in group:
            marker, color = styles.get(row["implementation"], ("x", "#CC79A7"))
            name = row["implementation"] if row["implementation"] in styles else "others (SDPA, cuBLAS, torch, Liger)"
            ax.plot(float(row["share"]), y, marker, color=color, label=name, ls="none")
    names = [f"{kernel}, {direction}\n{last[kernel, direction]}" for kernel, direction in groups]
    ax.set_yticks(range(len(groups)), names, fontsize=6)
    for share in (0.85, 1.0):
        ax.axvline(share, color="0.7", lw=1, ls=":" if share < 1 else "-", zorder=0)
    ax.set(xlabel="share of the measured ceiling (copy bandwidth or matrix product)", xlim=(0, None), title=path.stem)
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    fig.legend(handles.values(), handles.keys(), frameon=False, loc="outside upper center", ncols=4, fontsize=8)
    ax.invert_yaxis()
    fig.savefig(path.with_suffix(".png"), dpi=100, metadata={"Software": None})
    plt.close(fig)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    about = "modules or entries, all by default; anything else is the folder to write to, ./bench_results by default"
    parser.add_argument("what", nargs="*", metavar="NAME or FOLDER", help=about)
    parser.add_argument("--minutes", type=float, default=9, help="how long all may take; 9 by default")
    parser.add_argument("--check", action="store_true", help="compare with the references at tiny sizes, no timing")
    parser.add_argument("--report", action="store_true", help="goals and figures from the files in the folder")
    parser.add_argument("--dtype", default="", help="bfloat16 (the default for timing), float16 or float32")
    given = parser.parse_args(arguments)
    known = {name for entry in entries() for name in (entry["module"], entry["name"])}
    names = [word for word in given.what if word in known]
    folder, *more = [word for word in given.what if word not in known] or ["bench_results"]
    if more:
        parser.error(f"one folder to write to, not {folder}, {', '.join(more)}; names are {', '.join(sorted(known))}")
    if given.report:
        return max([report(path) for path in sorted(Path(folder).glob("*.csv"))], default=2)
    if given.check:
        return 1 if check_all(entries(names), getattr(torch, given.dtype or "float32")) else 0
    if not HAS_GPU or INTERPRET:
        print("kernels.bench measures on a GPU only; this is the interpreter. --check compares results, without times.")
        return 2
    return run(entries(names), getattr(torch, given.dtype or "bfloat16"), folder, given.minutes)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        sys.exit(serve())
    sys.exit(main())
