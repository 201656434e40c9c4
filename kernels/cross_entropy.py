"""Cross-entropy of logits: the log-sum-exp of a row block by block, probabilities never stored."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._rows import as_rows
from ._runtime import INTERPRET, accumulator, autotune, check, config, empty, jit, operator, readable, tl, triton, wide


def reference(logits, targets, ignore_index=-100):
    """Mean of log(sum(exp(logits))) - logits[target] over the targets that are not ignore_index."""
    rows, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    kept = wanted != ignore_index
    picked = rows.gather(1, wanted.where(kept, 0).long()[:, None])[:, 0]
    return (rows.logsumexp(-1) - picked).where(kept, 0).sum() / kept.sum()


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((2048, 4), (4096, 4), (8192, 8), (16384, 16), (32768, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _forward(X, T, LOSS, LSE, stride, n, ignore, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and log-sum-exp of one row in a single pass. A row that is ignored is not read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    target = tl.load(T + row)
    skip = target == ignore
    high = tl.full([], float("-inf"), ACC)
    total = tl.full([], 0.0, ACC)
    for start in range(0, tl.where(skip, 0, n), BLOCK):
        x = tl.load(X + row * stride + start + column, mask=start + column < n, other=float("-inf")).to(ACC)
        higher = tl.maximum(high, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf so far: exp(-inf - 0) is the 0 that is meant
        total = total * tl.exp(high - shift) + tl.sum(tl.exp(x - shift), 0)
        high = higher
    lse = tl.where(skip, float("inf"), high + tl.log(tl.where(skip, 1.0, total)))
    known = (target >= 0) & (target < n) & (target != ignore)
    picked = tl.load(X + row * stride + target, mask=known, other=float("nan")).to(ACC)
    tl.store(LOSS + row, tl.where(skip, 0.0, lse - picked))
    tl.store(LSE + row, lse)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _backward(X, T, LSE, SCALE, DX, stride, n, ignore, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """(softmax - one-hot) * scale for one block of a row; zeros for a row that is ignored, which is not read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(T + row)
    skip = target == ignore
    x = tl.load(X + row * stride + column, mask=column < tl.where(skip, 0, n), other=0.0).to(ACC)
    one_hot = tl.where(column == target, 1.0, 0.0)
    factor = tl.where((target >= 0) & (target < n), tl.load(SCALE).to(ACC), float("nan"))
    dx = tl.where(skip, 0.0, (tl.exp(x - tl.load(LSE + row)) - one_hot) * factor)
    tl.store(DX + row * n + column, dx.to(DX.dtype.element_ty), mask=column < n)


@operator(
    "(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor)",
    lambda logits, targets, ignore_index: tuple(
        logits.new_empty(targets.numel(), dtype=wide(logits.dtype)) for _ in "ab"
    ),
)
def compute(logits, targets, ignore_index):
    """Loss and log-sum-exp of each row."""
    flat, wanted = as_rows(logits), targets.reshape(-1).contiguous()
    (rows, n), acc = flat.shape, accumulator(logits.dtype)
    loss, lse = (empty((rows,), like=logits, dtype=wide(logits.dtype)) for _ in range(2))
    _forward[(rows,)](flat, wanted, loss, lse, flat.stride(0), n, ignore_index, ACC=acc)
    return loss, lse


@operator(
    "(Tensor logits, Tensor targets, Tensor lse, Tensor scale, int ignore_index) -> Tensor",
    lambda logits, *_: logits.new_empty(logits.shape),
)
def differentiate(logits, targets, lse, scale, ignore_index):
    flat, wanted = as_rows(logits), targets.reshape(-1).contiguous()
    (rows, n), acc = flat.shape, accumulator(flat.dtype)
    dx = empty(logits.shape, like=flat)
    grid = lambda constants: (rows, triton.cdiv(n, constants["BLOCK"]))
    _backward[grid](flat, wanted, lse, scale, dx, flat.stride(0), n, ignore_index, ACC=acc)
    return dx


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits, targets, ignore_index):
        loss, lse = compute(logits, targets, ignore_index)
        count = (targets != ignore_index).sum()
        return loss.sum() / count, lse, count

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, targets, ctx.ignore_index = inputs
        _, lse, count = output
        ctx.mark_non_differentiable(lse, count)
        ctx.save_for_backward(logits, targets, lse, count)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        logits, targets, lse, count = ctx.saved_tensors
        return differentiate(logits, targets, lse, dloss / count, ctx.ignore_index), None, None


def cross_entropy(logits, targets, ignore_index=-100):
    """Mean cross-entropy in nats of the targets that are not ignore_index: log(sum(exp(logits))) - logits[target].

    logits: (..., V), fp32, fp16, bf16 or fp64, any strides; targets: (...) of int64 or int32. The classes lie in the
    last dimension, so that (b, n, V) needs no reshaping; for (N, V) it is F.cross_entropy. Returns a number in fp32
    (fp64 for fp64), also for 16-bit logits, whose own type has too few digits for a loss. NaN when nothing is kept.

    Forward reads the logits once and stores one log-sum-exp per row (F.cross_entropy stores log-probabilities, as many
    as logits). Backward reads the logits again and writes (softmax - one-hot) / kept. Ignored rows are never read.
    Raises ValueError for another device, dtype or shape and, in the interpreter, for a target outside 0 .. V - 1. A GPU
    is not kept waiting for that check: there such a target makes the loss and the gradient of its row NaN.
    Source: "Online normalizer calculation for softmax", 2018.
    """
    check("cross_entropy", logits=logits)
    _check_targets(logits, targets, ignore_index)
    if targets.numel() == 0:
        return logits.sum() / 0  # the mean of nothing, as in torch
    return _CrossEntropy.apply(logits, targets, ignore_index)[0]


def _check_targets(logits, targets, ignore_index):
    if not isinstance(targets, torch.Tensor) or targets.dtype not in (torch.int64, torch.int32):
        kind = targets.dtype if isinstance(targets, torch.Tensor) else type(targets).__name__
        raise ValueError(f"cross_entropy: targets must be int64 or int32, they are {kind}")
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: targets have shape {tuple(targets.shape)}, and logits {tuple(logits.shape)}: they must "
            "agree but for the last dimension of the logits, the classes"
        )
    if targets.device != logits.device:
        raise ValueError(f"cross_entropy: targets are on {targets.device} and logits on {logits.device}")
    if INTERPRET and readable(targets):
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= logits.shape[-1]))
        if wrong.any():
            raise ValueError(f"cross_entropy: target {targets[wrong][0]} is not among {logits.shape[-1]} classes")


def benchmarks():
    """What kernels/bench.py measures: tokens of a batch against the vocabularies of known models."""
    return [
        {
            "name": "cross_entropy",
            "sizes": [{"rows": rows, "columns": n} for rows, n in ((16384, 4096), (8192, 32000), (8192, 128256))],
            "inputs": lambda s, dtype, device: (
                torch.randn(s["rows"], s["columns"], dtype=dtype, device=device),
                torch.randint(s["columns"], (s["rows"],), device=device),
            ),
            "ours": cross_entropy,
            "reference": reference,
            "peers": {"torch": F.cross_entropy},
            "differentiate": (0,),
            "bytes": lambda s, itemsize: s["rows"] * s["columns"] * itemsize,
            "flops": None,
            "backward_bytes": lambda s, itemsize: 2 * s["rows"] * s["columns"] * itemsize,
            "backward_flops": None,
        }
    ]
