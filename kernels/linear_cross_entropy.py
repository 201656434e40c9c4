"""The loss of a language model's head without storing its logits: block by block of tokens and words."""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._runtime import (
    INTERPRET,
    accumulator,
    autocast,
    autotune,
    check,
    empty,
    jit,
    operand,
    operator,
    precision,
    spread,
    tl,
    triton,
    wide,
)
from .matmul import IN_THE_INTERPRETER, configurations, fitting, product, tile_of, tuning_key

TOKENS, WORDS = (1024, 1024) if INTERPRET else (8192, 8192)  # the largest table that is ever stored
BLOCK_WORDS = 128  # words in a tile of the forward kernel: each tile leaves one number for a token
SMALLER = [(128, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 32, 4, 3), (16, 128, 128, 4, 4), (16, 128, 32, 4, 3)]
FORWARD_TILES = [(128, BLOCK_WORDS, 64, 8, 3), (256, BLOCK_WORDS, 64, 8, 3), *SMALLER]
SLOPE_TILES = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), *SMALLER]


def reference(x, weight, targets, ignore_index=-100):
    """Cross-entropy of the logits x weight^T, all of them stored."""
    return F.cross_entropy((x @ weight.t()).flatten(0, -2), targets.flatten(), ignore_index=ignore_index)


@jit
def _logits(
    X,
    W,
    i,
    j,
    n,
    v,
    d,
    xn,
    xd,
    wv,
    wd,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """Tile (i, j) of x weight^T, as in matmul."""
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    word = j * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x = X + (row % n).to(tl.int64)[:, None] * xn + inner.to(tl.int64)[None, :] * xd
    w = W + inner.to(tl.int64)[:, None] * wd + (word % v).to(tl.int64)[None, :] * wv
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, d, BLOCK_K):
        if WHOLE_K:
            a, b = tl.load(x), tl.load(w)
        else:
            a = tl.load(x, mask=inner[None, :] < d - start, other=0.0)
            b = tl.load(w, mask=inner[:, None] < d - start, other=0.0)
        acc = tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        x += tl.cast(xd, tl.int64) * BLOCK_K
        w += tl.cast(wd, tl.int64) * BLOCK_K
    return acc


def _tuned(tiles):
    """Autotuned on a GPU; in the interpreter few, large blocks."""
    interpret = {**IN_THE_INTERPRETER, "BLOCK_N": BLOCK_WORDS}
    prune = {"early_config_prune": fitting}
    tune = autotune(configurations(tiles), key=["tune"], interpret=interpret, prune_configs_by=prune)
    whole = triton.heuristics({"WHOLE_K": lambda arguments: arguments["d"] % arguments["BLOCK_K"] == 0})
    return lambda kernel: tune(whole(kernel))


@_tuned(FORWARD_TILES)
@jit
def _forward(
    X,
    W,
    TARGET,
    PART,
    PICKED,
    m,
    n,
    first,
    d,
    xn,
    xd,
    wv,
    wd,
    tune,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """A tile of logits, of which two things remain: log sum exp over its words, and the target's logit if it is here.

    m tokens, n words of which the first has the number `first`.
    """
    i, j = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    logits = _logits(
        *(X, W, i, j, m, n, d, xn, xd, wv, wd, ACC, OPERAND, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K)
    )
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    word = j * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = tl.where((word < n)[None, :], logits, float("-inf"))
    high = tl.max(logits, 1)
    high = tl.where(high == float("-inf"), 0.0, high)  # only words of weight zero: exp(-inf - 0) is the 0 that is meant
    total = tl.sum(tl.exp(logits - high[:, None]), 1)
    tl.store(PART + j.to(tl.int64) * m + row, high + tl.log(total), mask=row < m)
    target = tl.load(TARGET + row, mask=row < m, other=-1) - first
    here = target[:, None] == word[None, :]
    found = (row < m) & (target >= j * BLOCK_N) & (target < tl.minimum(n, (j + 1) * BLOCK_N))
    tl.store(PICKED + row, tl.sum(tl.where(here, logits, 0.0), 1), mask=found)


@_tuned(SLOPE_TILES)
@jit
def _slope(
    X,
    W,
    TARGET,
    LSE,
    D,
    m,
    n,
    first,
    d,
    xn,
    xd,
    wv,
    wd,
    ignored,
    tune,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """The same tile again, turned into the slope of the loss: softmax minus 1 at the target; 0 for ignored tokens."""
    i, j = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    logits = _logits(
        *(X, W, i, j, m, n, d, xn, xd, wv, wd, ACC, OPERAND, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE_K)
    )
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    word = j * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (word < n)[None, :]
    target = tl.load(TARGET + row, mask=row < m, other=0)
    lse = tl.load(LSE + row, mask=row < m, other=float("inf"))
    slope = tl.exp(logits - lse[:, None]) - ((target - first)[:, None] == word[None, :]).to(ACC)
    slope = tl.where((target != ignored)[:, None], slope, 0.0)
    tl.store(D + row.to(tl.int64)[:, None] * n + word[None, :], slope.to(D.dtype.element_ty), mask=inside)


def _launch(kernel, x, weight, *tensors, first, more=()):
    (m, d), n = x.shape, len(weight)
    if m == 0:
        return
    kernel[lambda constants: (triton.cdiv(m, constants["BLOCK_M"]) * triton.cdiv(n, constants["BLOCK_N"]),)](
        *(x, weight, *tensors, m, n, first, d, *x.stride(), *weight.stride(), *more, tuning_key(x, weight.t())),
        ACC=accumulator(x.dtype),
        OPERAND=operand(x.dtype),
        PRECISION=precision(x.dtype),
    )


@operator(
    "(Tensor x, Tensor weight, Tensor targets) -> (Tensor, Tensor)",
    lambda x, weight, targets: tuple(x.new_empty(x.shape[0], dtype=wide(x.dtype)) for _ in range(2)),
)
def compute(x, weight, targets):
    """The log-sum-exp of each token's logits, and the logit of its target: NaN where the target is no word."""
    lse = torch.full((len(x),), -torch.inf, dtype=wide(x.dtype), device=x.device)
    picked = torch.full_like(lse, torch.nan)
    for first in range(0, len(weight), WORDS):
        words = weight[first : first + WORDS]
        part = empty((triton.cdiv(len(words), BLOCK_WORDS), len(x)), like=lse)
        _launch(_forward, x, words, targets, part, picked, first=first)
        lse = torch.logaddexp(lse, part.logsumexp(0))  # the log-sum-exp so far, and that of these words
    return lse, picked


@operator(
    "(Tensor x, Tensor weight, Tensor targets, Tensor lse, Tensor scale, int ignored, bool[] needs) -> Tensor[]",
    lambda x, weight, targets, lse, scale, ignored, needs: [
        t.new_empty(t.shape) for t, need in zip((x, weight), needs, strict=True) if need
    ],
)
def differentiate(x, weight, targets, lse, scale, ignored, needs):
    """The gradients of x and the weight, those that are needed."""
    need_x, need_weight = needs
    dx = torch.zeros(x.shape, dtype=lse.dtype, device=x.device) if need_x else None
    dw = empty(weight.shape, like=weight) if need_weight else None
    for first in range(0, len(weight), WORDS):
        words = weight[first : first + WORDS]
        total = torch.zeros(words.shape, dtype=lse.dtype, device=x.device) if need_weight else None
        for begin in range(0, len(x), TOKENS):
            part = slice(begin, begin + TOKENS)
            slope = empty((len(x[part]), len(words)), like=x)
            _launch(_slope, x[part], words, targets[part], lse[part], slope, first=first, more=(ignored,))
            if need_x:
                product(slope, words, add_to=dx[part])
            if need_weight:
                product(slope.t(), x[part], add_to=total)
        if need_weight:
            dw[first : first + WORDS] = total * scale  # scaled last: softmax / count would vanish in fp16
    dx = [torch.empty_like(x, memory_format=torch.contiguous_format).copy_(dx.mul_(scale))] if need_x else []
    return [*dx, *([dw] if need_weight else [])]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, targets, ignored):
        lse, picked = compute(x, weight, targets)
        counts = targets != ignored
        count = counts.sum()
        return (torch.where(counts, lse - picked, 0.0).sum() / count).to(x.dtype), lse, count

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, targets, ctx.ignored = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, targets, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None, None, None
        x, weight, targets, lse, count = ctx.saved_tensors
        scale = grad.to(lse.dtype) / count.clamp_min(1)  # no token counts: NaN forward, zeros here, as in torch
        needs = list(ctx.needs_input_grad[:2])
        found = differentiate(x, weight, targets, lse, scale, ctx.ignored, needs)
        return *spread(found, needs), None, None


def linear_cross_entropy(x, weight, targets, ignore_index=-100):
    """Mean cross-entropy of the logits x weight^T: mean over tokens of log sum_w exp(x . w) - x . weight[target].

    x (..., d) and weight (v, d) of fp32, fp16, bf16 or fp64, any strides; targets (...) int64 in 0 .. v - 1, or
    ignore_index for tokens that do not count. Returns a scalar of x's dtype, computed in fp32 (fp64 for fp64); NaN if
    no token counts, as in torch, or if a target is no word.

    The n x v logits are never stored. Forward keeps of a tile of logits its log-sum-exp alone. Backward computes each
    block of at most TOKENS x WORDS logits again, turns it into its slope (softmax - 1 at the target), and multiplies
    it with the words for dx and with the tokens for dweight, both summed in fp32, block after block in a fixed order:
    deterministic. Memory beyond the gradients: fp32 sums of (n + WORDS) d, one block of slopes, and forward WORDS / 128
    numbers a token: nothing that grows with n v.
    8 n v d operations, 2 n v d more than with stored logits. Kept for backward: x, weight, targets and n numbers.

    Raises ValueError for sizes that do not fit, another device or dtype.
    Sources: "Cut Your Losses in Large-Vocabulary Language Models", 2024; "Liger Kernel: Efficient Triton Kernels for
    LLM Training", 2024.
    """
    x, weight = autocast(x, weight)
    check("linear_cross_entropy", x=x, weight=weight)
    check("linear_cross_entropy", dtypes=(torch.int64,), targets=targets)
    sizes = f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{sizes}: x and weight must be (..., d) and (v, d)")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"{sizes}: x needs targets {tuple(x.shape[:-1])}")
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _LinearCrossEntropy.apply(x, weight, targets.reshape(-1), ignore_index)[0]


def benchmarks():
    """What kernels/bench.py measures: the heads of GPT-2, Llama 2 and Llama 3 on 4,096 to 16,384 tokens."""

    def inputs(s, dtype, device):
        x = torch.randn(s["tokens"], s["width"], dtype=dtype, device=device)
        weight = torch.randn(s["words"], s["width"], dtype=dtype, device=device) * s["width"] ** -0.5
        return x, weight, torch.randint(s["words"], (s["tokens"],), device=device)

    sizes = [(8192, 50257, 768), (8192, 32000, 4096), (4096, 128256, 4096), (16384, 128256, 4096)]
    return [
        {
            "name": "linear_cross_entropy",
            "sizes": [{"tokens": n, "words": v, "width": d} for n, v, d in sizes],
            "inputs": inputs,
            "ours": linear_cross_entropy,
            "reference": reference,
            "peers": {},
            "differentiate": (0, 1),
            "bytes": None,
            "flops": lambda s: 2 * s["tokens"] * s["words"] * s["width"],
            "backward_bytes": None,
            "backward_flops": lambda s: 6 * s["tokens"] * s["words"] * s["width"],
        }
    ]
