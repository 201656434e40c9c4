"""How fast the kernels are on a GPU, next to what the same machine can do and to what others wrote for it.

python -m kernels.bench [names] [--quick] [--dtype bfloat16] measures every module's `benchmarks()`, or those named, and
writes kernels/results/<device>.csv and .png. Two ceilings are measured first: a large copy (bytes per second) and a
large matrix product (operations per second). Each kernel, forward and backward, stands beside its reference in eager
torch, torch.compile of it, the entry's peers and Liger where that is installed. A kernel whose result is wrong at a
size is refused there: its time is not reported, and the exit status is 1.

python -m kernels.bench --check runs only the comparison with the references, at tiny sizes, and needs no GPU.

An entry of `benchmarks()` is a dict: name, sizes (dicts), inputs(size, dtype, device), ours, reference, peers (by
name), differentiate (positions of the inputs), bytes(size, itemsize) and flops(size) or None, and the same as
backward_bytes and backward_flops. It may have: tiny (the size for --check), eager (what to time as eager torch and
under torch.compile when nobody would run the reference), fill (size -> share of real tokens, for padded peers).
"""

import argparse
import csv
import importlib
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from ._runtime import DEVICE, HAS_GPU, INTERPRET, guarded, triton

FOLDER = Path(__file__).parent
BANDWIDTH_BOUND = ("vector_add", "dropout", "softmax", "layer_norm", "rms_norm", "rotary", "swiglu", "cross_entropy")


@dataclass
class Line:
    """One measurement: a row of the CSV. share: of the ceiling that binds, copy bandwidth or matrix product."""

    device: str
    kernel: str
    direction: str
    dtype: str
    size: str
    implementation: str
    ms: float | str
    ms_20: float | str
    ms_80: float | str
    gb_per_s: float | str = ""
    tflop_per_s: float | str = ""
    share: float | str = ""
    verdict: str = ""


@dataclass
class Case:
    """A kernel in one direction at one size: the times of all implementations in ms, for the goals."""

    name: str
    direction: str
    size: dict
    large: bool
    share: float | None
    fill: float | None
    ms: dict = field(default_factory=dict)


# --- what there is


def entries(chosen=()):
    """The entries of all modules in this folder, or those whose module or own name is chosen."""
    found, modules = [], sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))
    for name in modules:
        if name != Path(__file__).stem:
            module = importlib.import_module(f".{name}", __package__)
            found += [(name, entry) for entry in getattr(module, "benchmarks", list)()]
    known = {n for name, entry in found for n in (name, entry["name"])}
    if unknown := set(chosen) - known:
        sys.exit(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [entry for name, entry in found if not chosen or {name, entry["name"]} & set(chosen)]


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
    }
    return {"Liger": calls[name]} if name in calls else {}


def implementations(entry):
    eager = entry.get("eager", entry["reference"])
    compiled = torch.compile(eager, dynamic=False)
    peers = {**(entry["peers"] or {}), **liger(entry["name"])}
    return {"ours": entry["ours"], "eager": eager, "torch.compile": compiled, **peers}


# --- is it right


def tiny(size):
    """The size with every number cut to at most 16, so that the interpreter can run it."""
    if isinstance(size, dict):
        return {name: tiny(value) for name, value in size.items()}
    if isinstance(size, list | tuple):
        return type(size)(tiny(value) for value in size[:3])
    return min(size, 16) if isinstance(size, int) and not isinstance(size, bool) else size


def tensors(result):
    return [t for t in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(t)]


def evaluate(function, inputs, wrt):
    """Outputs and, for a random gradient of each that is the same in every call, the gradients of inputs `wrt`."""
    inputs = [x.detach().requires_grad_() if i in wrt else x for i, x in enumerate(inputs)]
    out = tensors(function(*inputs))
    kept = [t.detach() for t in out]
    if not wrt:
        return kept
    out = [t for t in out if t.requires_grad]
    make = torch.Generator(out[0].device).manual_seed(0)
    grads = [torch.randn(t.shape, generator=make, device=t.device).to(t.dtype) for t in out]
    return kept + list(torch.autograd.grad(out, [inputs[i] for i in wrt], grads))


def wrong(entry, size, dtype, device):
    """Why the kernel is not to be trusted at this size, or "".

    The reference runs in the wanted dtype and in a wider one (float32 for 16 bits, float64 for 32). The kernel may be
    twice as far from the wider as the reference is, plus two roundings of the largest number.
    """
    torch.manual_seed(0)
    inputs, wrt = entry["inputs"](size, dtype, device), entry["differentiate"]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    widened = [x.to(wide) if torch.is_tensor(x) and x.dtype == dtype else x for x in inputs]
    try:
        ours = evaluate(entry["ours"], inputs, wrt)
    except Exception as error:
        return f"it stops with {short(error)}"
    try:
        theirs, exact = evaluate(entry["reference"], inputs, wrt), evaluate(entry["reference"], widened, wrt)
        factor, roundings = 2, 2
    except torch.OutOfMemoryError:  # a reference that stores what the kernel avoids: compare with a peer instead
        theirs = exact = by_a_peer(entry, inputs, wrt)
        factor, roundings = 0, 16
        if exact is None:
            return "neither the reference nor a peer fits into memory, so nothing vouches for the result"
    except Exception as error:
        return f"its reference stops with {short(error)}"
    if len(ours) != len(exact):
        return f"it returns {len(ours)} tensors with gradients, the reference {len(exact)}"
    for place, (got, want, peer) in enumerate(zip(ours, exact, theirs, strict=True)):
        name = f"result {place}" if place < len(ours) - len(wrt) else f"gradient {place - len(ours) + len(wrt)}"
        if got.shape != want.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not want.numel():
            continue
        if not want.is_floating_point():
            if not torch.equal(got.long(), want.long()):
                return f"{name} differs"
            continue
        off = lambda t, want=want: (t.to(want.dtype) - want).abs().max().item()
        allowed = factor * off(peer) + roundings * torch.finfo(got.dtype).eps * want.abs().max().item()
        if not off(got) <= allowed:  # also for nan
            return f"{name} is off by {off(got):.2e}; {allowed:.2e} is allowed"
    return ""


def by_a_peer(entry, inputs, wrt):
    for peer in (entry["peers"] or {}).values():
        try:
            return evaluate(peer, inputs, wrt)
        except Exception:
            continue
    return None


def short(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def check_all(found, dtype):
    """Run `wrong` for every entry at its tiny size; returns how many were refused."""
    refused = 0
    for entry in found:
        size = entry.get("tiny") or tiny(entry["sizes"][0])
        with guarded():
            reason = wrong(entry, size, dtype, DEVICE)
        refused += bool(reason)
        print(f"{entry['name']:28} {label(size):44} {'refused: ' + reason if reason else 'right'}", flush=True)
    return refused


# --- how fast it is


def milliseconds(run):
    """Median, 20th and 80th percentile of the time of one call, in ms, with a cold cache."""
    return triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])


def ceilings(dtype):
    """(bytes per ms of a copy of 1 GiB, operations per ms of a product of 8192 x 8192 matrices)."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))[0]
    del source, target
    a, b = torch.randn(2, 8192, 8192, dtype=dtype, device=DEVICE).unbind(0)
    return copy, 2 * 8192**3 / milliseconds(lambda: a @ b)[0]


def timed(function, inputs, wrt, direction):
    """Time of a call, or of its backward pass alone."""
    if direction == "forward":
        with torch.no_grad():
            return milliseconds(lambda: function(*inputs))
    inputs = [x.detach().requires_grad_() if i in wrt else x for i, x in enumerate(inputs)]
    out = [t for t in tensors(function(*inputs)) if t.requires_grad]
    grads, leaves = [torch.randn_like(t) for t in out], [inputs[i] for i in wrt]
    return milliseconds(lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True, allow_unused=True))


def judge(entry, size, direction, dtype, ms, limits):
    """(GB/s, TFLOP/s, share of the ceiling that binds, whether the size is large, verdict) of a time."""
    prefix = "" if direction == "forward" else "backward_"
    count_bytes, count_flops = entry.get(f"{prefix}bytes"), entry.get(f"{prefix}flops")
    moved, done = count_bytes and count_bytes(size, dtype.itemsize), count_flops and count_flops(size)
    shares = [count / ms / limit for count, limit in zip((moved, done), limits, strict=True) if count]
    share = max(shares, default=None)
    large = (moved or 0) >= 2**28 or (done or 0) >= 2**37  # smaller ones may live in the cache
    verdict = f"implausible: {share:.2f} of the ceiling" if share and large and share > 1.05 else "right"
    return moved and moved / ms / 1e6, done and done / ms / 1e9, share, large, verdict


def measure(entry, size, dtype, device, limits):
    """The lines and cases of one entry at one size; a refused kernel gets one line and no time."""
    torch.compiler.reset()  # or the cache of compiled sizes overflows, and the next size runs uncompiled without a word
    head = device, entry["name"]
    if reason := wrong(entry, size, dtype, DEVICE):
        print(f"{entry['name']:28} {label(size):44} refused: {reason}", flush=True)
        return [Line(*head, "", str(dtype)[6:], label(size), "ours", "", "", "", verdict=f"refused: {reason}")], []
    lines, cases = [], []
    functions = implementations(entry)
    for direction in ["forward"] + ["backward"] * bool(entry["differentiate"]):
        fill = entry["fill"](size) if "fill" in entry else None
        case = Case(entry["name"], direction, size, False, None, fill)
        for name, function in functions.items():
            torch.manual_seed(0)
            inputs = entry["inputs"](size, dtype, DEVICE)  # fresh: some kernels overwrite what they are given
            try:
                ms, low, high = timed(function, inputs, entry["differentiate"], direction)
            except Exception as error:
                print(f"{entry['name']:28} {label(size):44} {name} does not run: {short(error)}", flush=True)
                continue
            rate, speed, share, large, verdict = judge(entry, size, direction, dtype, ms, limits)
            verdict = verdict if name == "ours" or verdict != "right" else ""
            numbers = (ms, low, high, rate or "", speed or "", share or "")
            lines.append(Line(*head, direction, str(dtype)[6:], label(size), name, *numbers, verdict))
            case.ms[name] = ms
            if name == "ours":
                case.large, case.share = large, share
        if "ours" in case.ms:
            cases.append(case)
            print(f"{entry['name']:28} {label(size):44} {direction:9}", summary(case), flush=True)
        torch.cuda.empty_cache()
    return lines, cases


def amount(entry, size):
    """How much there is to do at a size: operations, or bytes where they are not counted."""
    return entry["flops"](size) if entry["flops"] else entry["bytes"](size, 2)


def label(size):
    return " ".join(f"{name}={value}" for name, value in size.items())


def summary(case):
    share = "" if case.share is None else f", {case.share:.0%} of the ceiling"
    others = "; ".join(f"{ms / case.ms['ours']:.2f} x {name}" for name, ms in case.ms.items() if name != "ours")
    return f"{case.ms['ours']:.4f} ms{share}; speed: {others}"


# --- is it enough


def goals(case):
    """The goals that a case must reach, as (what is asked, reached / asked): met from 1 upward. Large sizes only."""
    ms, name = case.ms, case.name
    speed = lambda peer: ms[peer] / ms["ours"]
    if not case.large:
        return
    if name.startswith(BANDWIDTH_BOUND) and case.share:
        yield "85% of the copy bandwidth", case.share / 0.85
        if "torch.compile" in ms:
            yield "as fast as torch.compile", speed("torch.compile")
    if name == "matmul" and "cuBLAS" in ms:
        yield "85% of cuBLAS", speed("cuBLAS") / 0.85
    if name.startswith("flash_attention"):
        share = 1.0 if case.direction == "forward" else 0.8
        if "SDPA flash" in ms:
            yield f"{share:.0%} of SDPA flash", speed("SDPA flash") / share
        if "SDPA cuDNN" in ms and case.direction == "forward" and case.size.get("e") == 128:
            yield "60% of SDPA cuDNN at head width 128", speed("SDPA cuDNN") / 0.6
    for peer in ms:
        if case.fill and peer.startswith("padded"):
            yield "0.9 / fill of the padded speed", speed(peer) * case.fill / 0.9


def verdicts(cases):
    """Print each goal of each kernel with its worst size: met or missed."""
    worst = {}
    for case in cases:
        for goal, reached in goals(case):
            key = (case.name, case.direction, goal)
            worst[key] = min(worst.get(key, (float("inf"), "")), (reached, label(case.size)))
    for (name, direction, goal), (reached, size) in worst.items():
        state = "met" if reached >= 1 else "missed"
        print(f"goal {state:6} {name:28} {direction:9} {goal}: worst {reached:.2f} of it, at {size}")
    return worst


# --- what is kept


def write(lines, path):
    """Write the CSV; lines of kernels that were not measured this time stay."""
    names, measured = [f.name for f in fields(Line)], {(line.kernel, line.dtype) for line in lines}
    old = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    keep = [row for row in old if (row["kernel"], row["dtype"]) not in measured]
    new = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(line).items()} for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(keep + new, key=lambda row: (row["kernel"], row["dtype"])))


def draw(path):
    """A figure beside the CSV: for each kernel at its slowest size, everyone's share of the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["share"]]
    ours = sorted((row for row in rows if row["implementation"] == "ours"), key=lambda row: float(row["ms"]))
    last = {(row["kernel"], row["direction"]): row["size"] for row in ours}  # the slowest size comes last
    groups = {k: [r for r in rows if (r["kernel"], r["direction"], r["size"]) == (*k, last[k])] for k in sorted(last)}
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
    parser.add_argument("names", nargs="*", help="modules or entries; all when none is given")
    parser.add_argument("--quick", action="store_true", help="the largest size of each entry only")
    parser.add_argument("--check", action="store_true", help="compare with the references at tiny sizes, no timing")
    parser.add_argument("--dtype", default="", help="bfloat16 (the default for timing), float16 or float32")
    given = parser.parse_args(arguments)
    if given.check:
        refused = check_all(entries(given.names), getattr(torch, given.dtype or "float32"))
        return 1 if refused else 0
    if not HAS_GPU or INTERPRET:
        print("kernels.bench measures on a GPU only; this is the interpreter. --check compares results, without times.")
        return 2
    dtype = getattr(torch, given.dtype or "bfloat16")
    return run(entries(given.names), dtype, torch.cuda.get_device_name(), given.quick)


def run(found, dtype, device, quick=False, results=FOLDER / "results"):
    """Measure, judge, write; returns the exit status: 1 when a kernel was refused or a number cannot be true."""
    from torch._functorch import config

    config.donated_buffer = False  # or a compiled backward pass could not be run twice
    limits = ceilings(dtype)
    print(f"{device}: copy {limits[0] / 1e6:.0f} GB/s, matrix product {limits[1] / 1e9:.0f} TFLOP/s")
    lines, cases = [], []
    for entry in found:
        for size in [max(entry["sizes"], key=partial(amount, entry))] if quick else entry["sizes"]:
            more, case = measure(entry, size, dtype, device, limits)
            lines += more
            cases += case
    verdicts(cases)
    path = results / f"{device.replace(' ', '_')}.csv"
    write(lines, path)
    draw(path)
    print(f"written: {path.name}, {path.with_suffix('.png').name}")
    bad = [line for line in lines if "refused" in line.verdict or "implausible" in line.verdict]
    for line in bad:
        print(f"{line.kernel} at {line.size}, {line.implementation} {line.direction}: {line.verdict}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
