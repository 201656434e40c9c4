"""Is a kernel right, and how long does it take: what `kernels.bench` asks of one kernel at one size."""

import time

import torch

from ._runtime import INTERPRET

DEVICE_WAIT = 2_000_000  # cycles of `torch.cuda._sleep` in a millisecond: at least, on a GPU of up to 2 GHz


def tensors(result):
    return [t for t in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(t)]


def short(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


# --- is it right


def random_like(out):
    make = None if not out or out[0].device.type == "meta" else torch.Generator(out[0].device).manual_seed(0)
    return [torch.randn(t.shape, generator=make, device=t.device).to(t.dtype) for t in out]


def evaluate(function, inputs, wrt, grads=None):
    """Outputs and the gradients of inputs `wrt`, for the gradients of the outputs in the list `grads`.

    An empty list is filled with random ones, the same in every call.
    """
    inputs = [x.detach().requires_grad_() if i in wrt else x for i, x in enumerate(inputs)]
    out = tensors(function(*inputs))
    kept = [t.detach() for t in out]
    if not wrt:
        return kept
    out, grads = [t for t in out if t.requires_grad], [] if grads is None else grads
    grads[:] = grads or random_like(out)
    fit = [g.shape for g in grads] == [t.shape for t in out]  # if not, the comparison of the outputs will say so
    cast = [g.to(t.dtype) for g, t in zip(grads if fit else random_like(out), out, strict=True)]
    return kept + list(torch.autograd.grad(out, [inputs[i] for i in wrt], cast))


def difference(got, want, peer, factor=2, roundings=2):
    """Why `got` is not `want` as closely as a result of its type can be, or "".

    The error of each row (the last axis) is compared in two ways with that of `peer`, which was computed in the same
    type, times `factor`: by its length, which finds a row that is half wrong among large numbers, and by its largest
    entry, which finds one wrong entry. On top come `roundings` of the row and of the row of median length, since an
    exact zero is nobody's result.
    """
    if got.shape != want.shape:
        return f"has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return ""
    if not want.is_floating_point():
        return "" if torch.equal(got.long(), want.long()) else "differs"
    row = lambda t: t.to(want.dtype).reshape(-1, t.shape[-1] if t.dim() > 1 else 1 if t.dim() == 0 else t.numel())
    length, rounding = lambda t: t.norm(dim=1), roundings * torch.finfo(got.dtype).eps
    want, off, usual = row(want), row(got) - row(want), row(peer) - row(want)
    largest, error = off.abs().max().item(), length(off)
    allowed = factor * usual.abs().max().item() + rounding * want.abs().max().item()
    if not largest <= allowed:  # also for nan
        return f"is off by {largest:.2e}; {allowed:.2e} is allowed"
    typical = lambda t: t.median().maximum(t.square().mean().sqrt() / 1000)
    size = length(want)
    allowed = factor * (length(usual) + typical(length(usual))) + rounding * (size + typical(size))
    bad = ~(error <= allowed)
    if bad.any():
        worst = (error / allowed.clamp_min(torch.finfo(allowed.dtype).tiny)).argmax().item()
        share = f"{bad.sum().item()} of {len(bad)} rows are off, row {worst} by {error[worst]:.2e}"
        return f"{share} in length; {allowed[worst]:.2e} is allowed"
    return ""


def wrong(entry, size, dtype, device):
    """Why the kernel is not to be trusted at this size, or "".

    The reference runs in the wanted dtype and in a wider one (float32 for 16 bits, float64 for 32); see `difference`.
    Where an entry says which `part` of its tensors is independent of the rest, only that part of the reference is
    computed: attention over 16,384 tokens is too large to be written out for all heads.
    """
    torch.manual_seed(0)
    inputs, wrt = entry["inputs"](size, dtype, device), entry["differentiate"]
    part = entry.get("part") or (lambda x: x)
    try:
        ours = evaluate(entry["ours"], inputs, wrt, grads := [])
    except Exception as error:
        return f"it stops with {short(error)}"
    ours, grads = [part(t) for t in ours], [part(g) for g in grads]
    inputs = [part(x) if torch.is_tensor(x) else x for x in inputs]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    widened = [x.to(wide) if torch.is_tensor(x) and x.dtype == dtype else x for x in inputs]
    try:
        theirs = evaluate(entry["reference"], inputs, wrt, grads)
        exact = evaluate(entry["reference"], widened, wrt, grads)
        limits = (2, 2)
    except torch.OutOfMemoryError:  # a reference that stores what the kernel avoids: compare with a peer instead
        theirs = exact = by_a_peer(entry, inputs, wrt, grads)
        limits = (0, 16)
        if exact is None:
            return "neither the reference nor a peer fits into memory, so nothing vouches for the result"
    except Exception as error:
        return f"its reference stops with {short(error)}"
    if len(ours) != len(exact):
        return f"it returns {len(ours)} tensors with gradients, the reference {len(exact)}"
    for place, (got, want, peer) in enumerate(zip(ours, exact, theirs, strict=True)):
        name = f"result {place}" if place < len(ours) - len(wrt) else f"gradient {place - len(ours) + len(wrt)}"
        if reason := difference(got, want, peer, *limits):
            return f"{name} {reason}"
    return ""


def by_a_peer(entry, inputs, wrt, grads):
    for peer in (entry["peers"] or {}).values():
        try:
            return evaluate(peer, inputs, wrt, grads)
        except Exception:
            continue
    return None


# --- how long it takes


def held(run, flush, calls, wait):
    """Times of `calls` calls in ms, queued while the GPU sleeps for `wait` ms; None when it woke before the last.

    A short kernel is over before Python has launched the next, and then a clock on the GPU measures Python. So the
    stream is held until everything is in its queue. Before each call the L2 cache is overwritten, between the clocks.
    """
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(wait * DEVICE_WAIT))
    awake = torch.cuda.Event()
    awake.record()
    for first, last in marks:
        flush()
        first.record()
        run()
        last.record()
    slept = not awake.query()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in marks] if slept else None


def milliseconds(run, budget=0.3):
    """(median, 20th, 80th percentile of the time on the GPU in ms, ms that Python takes to launch, whether held).

    budget: seconds of calls in all. A function that waits for the GPU itself cannot be held; its time then has Python
    in it, and the last number says so.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    flush = cache.zero_
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    host = (time.perf_counter() - started) * 1e3  # of one call, launched into an empty queue
    torch.cuda.synchronize()
    whole = (time.perf_counter() - started) * 1e3
    calls = max(5, min(100, int(budget * 1e3 / max(whole, 0.1))))
    times, batch, wait, is_held = [], min(calls, 20), None, True
    while len(times) < calls:
        wait = wait or batch * (host + 0.2) * 1.5 + 2
        found = held(run, flush, batch, wait)
        if found is None and wait < 200:
            wait *= 3
            continue
        if found is None:  # it waits for the GPU: time it as it is
            is_held = False
            found = []
            for _ in range(batch):
                flush()
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                run()
                marks[1].record()
                torch.cuda.synchronize()
                found.append(marks[0].elapsed_time(marks[1]))
        times += found
    times = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8]))
    return (*times.tolist(), host, is_held)


def timed(function, inputs, wrt, direction):
    """`milliseconds` of a call, or of its backward pass alone."""
    if direction == "forward":
        with torch.no_grad():
            return milliseconds(lambda: function(*inputs))
    inputs = [x.detach().requires_grad_() if i in wrt else x for i, x in enumerate(inputs)]
    out = [t for t in tensors(function(*inputs)) if t.requires_grad]
    grads, leaves = [torch.randn_like(t) for t in out], [inputs[i] for i in wrt]
    return milliseconds(lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True, allow_unused=True))


def ceilings(dtype):
    """(bytes per ms of a copy of 1 GiB, operations per ms of a product of 8192 x 8192 matrices)."""
    if INTERPRET:
        raise RuntimeError("ceilings are measured on a GPU")
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))[0]
    del source, target
    a, b = torch.randn(2, 8192, 8192, dtype=dtype, device="cuda").unbind(0)
    return copy, 2 * 8192**3 / milliseconds(lambda: a @ b)[0]
