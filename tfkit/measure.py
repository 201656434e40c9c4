"""Parameters, FLOPs, memory and time, measured so that the numbers mean something on any machine.

Time is only ever a ratio against something else timed in the same run. Memory is counted in bytes of tensors.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def parameters(module: nn.Module) -> int:
    """Number of trainable scalars; a shared parameter counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(fn: Callable, *inputs) -> int:
    """Floating-point operations of one call, by torch's counter: a multiply-add is two, elementwise work is not
    counted.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows neither the CPU's fused attention nor the fast path of torch's own Transformer layers, so both
    # are counted in their written-out form.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            fn(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


class Ratio(NamedTuple):
    """Median time of each function in seconds, and the first over the second."""

    ratio: float
    seconds: float
    reference_seconds: float


def time_ratio(fn: Callable, reference: Callable, *, repeats: int = 15, warmup: int = 2) -> Ratio:
    """How long `fn()` takes relative to `reference()`: both are called in turn and each ratio is taken within one turn.

    The median over turns is robust against other work on the machine.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        fn(), reference()
    ours, theirs = [], []
    with _no_garbage_collection():
        for turn in range(repeats):
            pair = [(fn, ours), (reference, theirs)]
            for call, times in pair if turn % 2 else pair[::-1]:
                times.append(_seconds(call))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Ratio(ratio, statistics.median(ours), statistics.median(theirs))


def seconds(fn: Callable, *, repeats: int = 5, warmup: int = 1) -> float:
    """Shortest of several calls, in seconds. Good for growth over sizes; to compare two functions use `time_ratio`."""
    for _ in range(warmup):
        fn()
    with _no_garbage_collection():
        return min(_seconds(fn) for _ in range(repeats))


def _seconds(fn: Callable) -> float:
    """One call in seconds: of processor time where one thread does the work, so that other programs do not count."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    started = clock()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


@contextlib.contextmanager
def _no_garbage_collection():
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def peak_bytes(fn: Callable, *inputs) -> int:
    """Largest amount of tensor memory (bytes) that `fn(*inputs)` holds at one time beyond its inputs, by torch's
    profiler.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes its start and stop to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the profiler's first use; keeps its log out of notebooks
    from torch.profiler import ProfilerActivity, profile

    cuda = any(isinstance(x, Tensor) and x.is_cuda for x in inputs)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, profile_memory=True, acc_events=True) as prof:
        result = fn(*inputs)
    del result
    held = peak = 0
    changes = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(fn: Callable, *inputs) -> int:
    """Bytes that autograd keeps for the backward pass of `fn(*inputs)`, without parameters and inputs; each storage
    counts once.
    """
    known = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    if isinstance(fn, nn.Module):
        known |= {p.untyped_storage().data_ptr() for p in fn.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept[address] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn(*inputs)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del result
    return total


class Growth(NamedTuple):
    """value = factor * size ** exponent, with the standard error of the exponent."""

    exponent: float
    error: float
    factor: float

    def __str__(self) -> str:
        return f"grows as size to the power {self.exponent:.2f} +- {self.error:.2f}"


def growth(sizes: Sequence[float], values: Sequence[float]) -> Growth:
    """Fit value = factor * size ** exponent by least squares on logarithms: three sizes or more, all positive."""
    if len(sizes) != len(values) or len(sizes) < 3:
        raise ValueError(f"need at least three sizes and as many values, got {len(sizes)} and {len(values)}")
    if min(sizes) <= 0 or min(values) <= 0:
        raise ValueError(f"sizes and values must be positive, got {list(sizes)} and {list(values)}")
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    sxx = sum((a - mx) ** 2 for a in x)
    if sxx == 0:
        raise ValueError(f"sizes must differ from each other, got {list(sizes)}")
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sxx
    residual = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(residual / (len(x) - 2) / sxx)
    return Growth(slope, error, math.exp(my - slope * mx))


def readable(count: float, unit: str = "") -> str:
    """A number with a metric prefix: readable(12345678) is "12.3M"."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.3g}{prefix}{unit}"
    return f"{count:.3g}{unit}"


def compare(mechanisms: dict[str, Callable], purpose: dict[str, str] | None = None, *, repeats: int = 7) -> None:
    """Print one line per mechanism: parameters, FLOPs, time of a training step relative to the first, and what it is
    for.

    mechanisms  name -> function without arguments that builds (module, inputs); the first is the reference
    """
    purpose = purpose or {}
    built = {name: make() for name, make in mechanisms.items()}
    reference = _training_step(*next(iter(built.values())))
    wide = max(map(len, built))
    print(f"{'':{wide}}  parameters     FLOPs  cost ratio  for")
    for name, (module, inputs) in built.items():
        ratio = time_ratio(_training_step(module, inputs), reference, repeats=repeats).ratio
        work = readable(flops(module, *inputs))
        cost = f"\u27e8{ratio:8.2f}\u27e9"  # in angle brackets: differs from run to run
        print(f"{name:{wide}}  {parameters(module):10,}  {work:>8}  {cost}  {purpose.get(name, '')}".rstrip())


def _training_step(module: nn.Module, inputs: tuple) -> Callable[[], None]:
    def step() -> None:
        result = module(*inputs)
        if result.requires_grad:
            result.square().mean().backward()
            module.zero_grad(set_to_none=True)

    return step
