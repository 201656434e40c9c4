"""Attention tile by tile: softmax(q k^T scale + bias) v without ever holding the n x m scores, forward and backward.

A program owns a block of queries and walks over the blocks of keys that those queries may see. It keeps three things:
the largest score so far, the sum of exp2(score - largest) and the sum of the values weighted so; when the largest
grows, both sums are rescaled. What it saves for the backward pass is one number a query, the log-sum-exp, from which
any tile of weights can be computed again: P = exp(S - lse). Then dS = P * (dP - delta) with delta = rowsum(o * do).
"""

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
    config,
    empty,
    jit,
    limits,
    operand,
    operator,
    precision,
    spread,
    tl,
    triton,
    wide,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e38)  # the first running maximum: finite, so that a row that sees nothing is no inf - inf
FAR = 2**30  # a window without an end


def reference(q, k, v, causal=False, window=None, bias=None, scale=None, return_lse=False, *, mask=None):
    """What `flash_attention` computes, written out: it holds the n x m weights. Same arguments and results."""
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    position, key = torch.arange(n, device=q.device)[:, None] + m - n, torch.arange(m, device=q.device)
    allowed = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (key <= position)
    if window is not None:
        allowed = allowed & ((position - key).abs() < window)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (b, h, n, m)
    if bias is not None:
        scores = scores + (-bias[:, None, None] * (position - key).abs() if bias.ndim == 1 else bias).to(q.dtype)
    allowed = (allowed if mask is None else allowed & mask) & (scores > -torch.inf)
    blind = ~allowed.any(-1, keepdim=True)  # (b, h, n, 1): these rows see nothing
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(blind, 0)
    out = scores.softmax(-1).masked_fill(~allowed, 0) @ v
    return (out, scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)) if return_lse else out


# ------------------------------------------------------------------------------------------------ shared by all kernels


@jit
def _tile(
    pointer, rows, stride, size,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows of a (size, WIDTH) matrix as a (rows, BLOCK) tile with zeros outside; EDGE: rows may lie outside."""
    columns = tl.arange(0, BLOCK)
    at = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if EDGE:
        if WIDTH == BLOCK:
            x = tl.load(at, mask=rows[:, None] < size, other=0.0)
        else:
            x = tl.load(at, mask=(rows[:, None] < size) & (columns[None, :] < WIDTH), other=0.0)
    else:
        if WIDTH == BLOCK:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    return x.to(OPERAND)


@jit
def _put(pointer, x, rows, stride, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a (rows, BLOCK) tile into a (size, WIDTH) matrix."""
    columns = tl.arange(0, BLOCK)
    at = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, x, mask=(rows[:, None] < size) & (columns[None, :] < WIDTH))


@jit
def _band(low, high, before, after, size, BLOCK: tl.constexpr):
    """Which of `size` places the places low .. high see, when x sees x - before .. x + after: four bounds.

    From the first to the last bound somebody sees something; between the two in the middle everybody sees everything,
    so these blocks need no mask. Bounds are multiples of BLOCK, or the last.
    """
    first = tl.maximum(low - before, 0) // BLOCK * BLOCK
    last = tl.maximum(tl.minimum(high + after + 1, size), first)
    inner = (tl.maximum(high - before, 0) + BLOCK - 1) // BLOCK * BLOCK
    inner = tl.minimum(tl.maximum(inner, first), last)
    outer = tl.maximum(tl.minimum(low + after + 1, size), 0) // BLOCK * BLOCK
    return first, inner, tl.maximum(inner, outer), last


@jit
def _scores(
    dots, i, j, n, m, scale, ahead, behind, slope, bias, bias_n, bias_m, mask, mask_n, mask_m,
    TABLE: tl.constexpr, SLOPES: tl.constexpr, MASK: tl.constexpr,
    AHEAD: tl.constexpr, BEHIND: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """What is added to the products q k^T, or hides them. i, j: positions of queries and keys, shaped to broadcast.

    With a bias the result is in powers of two and scaled; without one the caller scales, in one fused multiply-add.
    EDGE: this tile leaves the band or the tensor somewhere, so it needs the mask. AHEAD, BEHIND: the band has an end
    to the right, to the left.
    """
    inside = (i < n) & (j < m)
    if TABLE:
        at = bias + i.to(tl.int64) * bias_n + j.to(tl.int64) * bias_m
        dots = (dots * scale + tl.load(at, mask=inside, other=0.0).to(dots.dtype)) * LOG2E
    if SLOPES:
        dots = (dots * scale - slope * tl.abs(i + (m - n) - j)) * LOG2E
    if MASK:
        at = mask + i.to(tl.int64) * mask_n + j.to(tl.int64) * mask_m
        dots = tl.where(tl.load(at, mask=inside, other=0) != 0, dots, float("-inf"))
    if EDGE:
        seen = inside
        if AHEAD:
            seen = seen & (j <= i + (m - n) + ahead)
        if BEHIND:
            seen = seen & (j >= i + (m - n) - behind)
        dots = tl.where(seen, dots, float("-inf"))
    return dots


def _fitting(needs):
    """Which configurations to try: those that fit a multiprocessor of this GPU, and small tiles for small problems.

    needs(M, N, E, C) gives the numbers held in shared memory (once, and a pipeline stage) and in registers. Exact
    float32 products use no tensor cores and are unrolled into single multiply-adds, so their tiles must be small.
    """

    def prune(configs, named, **given):
        given = {**named, **given}
        bytes_each, fits = given["q"].element_size(), []
        shared, _, target = limits(given["q"].device.index)
        wave = 32 if target is None else target.warp_size
        exact = bytes_each == 4 and given["PRECISION"] == "ieee"
        for c in configs:
            block, lanes = (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]), wave * c.num_warps
            held, stage, registers = needs(*block, given["BLOCK_E"], given["BLOCK_C"])
            unrolled = block[0] * block[1] * max(given["BLOCK_E"], given["BLOCK_C"]) if exact else 0
            if (
                (held + c.num_stages * stage) * bytes_each <= shared - 4096  # the compiler needs some, too
                and registers <= 200 * lanes
                and unrolled <= 1024 * lanes
            ):
                fits.append(c)
        fits = fits or configs[-1:]
        return fits if given["size"] else [c for c in fits if max(c.kwargs.values()) <= 64] or fits[-1:]

    return {"early_config_prune": prune}


KEY = ["size", "BLOCK_E", "BLOCK_C", "AHEAD", "BEHIND", "TABLE", "SLOPES", "MASK"]
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64}  # in the interpreter
TINY = [config(BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=1) for block in (32, 16)]  # for float32

# ---------------------------------------------------------------------------------------------------------- forward


@autotune(
    [
        config(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2),
        config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
        config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
        config(BLOCK_M=128, BLOCK_N=64, num_warps=4, num_stages=3),
        config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
        config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        *TINY,
    ],
    key=KEY,
    interpret=SMALL,
    prune_configs_by=_fitting(lambda M, N, E, C: (M * E, N * (E + C), M * (C + N))),
)
@jit
def _forward(
    q, k, v, out, lse, bias, mask, slopes,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    heads, group, n, m, size, scale, ahead, behind,
    E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr, BEHIND: tl.constexpr, TABLE: tl.constexpr, SLOPES: tl.constexpr, MASK: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries against all keys they see. The last block sees most when causal, so it starts first."""
    blocks = tl.cdiv(n, BLOCK_M)
    turn = tl.program_id(0)
    i_first = (blocks - 1 - turn % blocks) * BLOCK_M
    b, h = (turn // blocks // heads).to(tl.int64), (turn // blocks % heads).to(tl.int64)
    q, k, v = q + b * q_b + h * q_h, k + b * k_b + h // group * k_h, v + b * v_b + h // group * v_h
    bias, mask = bias + b * bias_b + h * bias_h, mask + b * mask_b + h * mask_h
    slope = tl.load(slopes + h) if SLOPES else 0.0
    unit = 1.0 if TABLE or SLOPES else scale * LOG2E

    i = i_first + tl.arange(0, BLOCK_M)
    query = _tile(q, i, q_n, n, E, BLOCK_E, OPERAND, True)
    top = tl.full((BLOCK_M,), LOWEST, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    low, high = i_first + (m - n), tl.minimum(i_first + BLOCK_M, n) - 1 + (m - n)
    first, inner, outer, last = _band(low, high, behind, ahead, m, BLOCK_N)
    for part in tl.static_range(0 if BEHIND else 1, 3):  # 0: left edge of the window, 1: inside, 2: right edge
        start = first if part == 0 else inner if part == 1 else outer
        stop = inner if part == 0 else outer if part == 1 else last
        for j_first in range(start, stop, BLOCK_N):
            j = j_first + tl.arange(0, BLOCK_N)
            key = _tile(k, j, k_n, m, E, BLOCK_E, OPERAND, part != 1)
            s = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
            s = _scores(s, i[:, None], j[None, :], n, m, scale, ahead, behind, slope,
                        bias, bias_n, bias_m, mask, mask_n, mask_m, TABLE, SLOPES, MASK,
                        AHEAD, BEHIND, part != 1)  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1) * unit)
            p = tl.exp2(s * unit - new[:, None])
            shrink = tl.exp2(top - new)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            value = _tile(v, j, v_n, m, C, BLOCK_C, OPERAND, part != 1)
            acc = tl.dot(p.to(OPERAND), value, acc, input_precision=PRECISION, out_dtype=ACC)
            top = new

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    _put(out + (b * n * heads + h) * C, acc / total[:, None], i, heads * C, n, C, BLOCK_C)
    logsum = tl.where(seen, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse + (b * heads + h) * n + i, logsum, mask=i < n)


# ---------------------------------------------------------------------------------------------------------- backward


@jit
def _delta(
    out, dout, lse, dlse, delta, heads, n,
    DLSE: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(o * do), less the gradient of the log-sum-exp, which adds P * dlse to dS."""
    blocks = tl.cdiv(n, BLOCK_M)
    turn = tl.program_id(0)
    i = turn % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b, h = (turn // blocks // heads).to(tl.int64), (turn // blocks % heads).to(tl.int64)
    place, row = (b * n * heads + h) * C, (b * heads + h) * n + i
    o = _tile(out + place, i, heads * C, n, C, BLOCK_C, ACC, True)
    do = _tile(dout + place, i, heads * C, n, C, BLOCK_C, ACC, True)
    total = tl.sum(o * do, 1)
    if DLSE:
        total -= tl.load(dlse + row, mask=i < n, other=0.0).to(ACC)
    seen = tl.load(lse + row, mask=i < n, other=0.0) > float("-inf")
    tl.store(delta + row, tl.where(seen, total, 0.0), mask=i < n)


@jit
def _rows(lse, delta, i, n):
    """lse in powers of two and delta of the queries i; +inf for rows that see nothing, whose weights then become 0."""
    top = tl.load(lse + i, mask=i < n, other=float("inf"))
    return tl.where(top == float("-inf"), float("inf"), top) * LOG2E, tl.load(delta + i, mask=i < n, other=0.0)


@autotune(
    [
        config(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=2),
        config(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=2),
        config(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        config(BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2),
        config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
        *TINY,
    ],
    key=KEY,
    interpret=SMALL,
    prune_configs_by=_fitting(lambda M, N, E, C: (N * (E + C), M * (E + C), N * (E + C + 2 * M))),
)
@jit
def _backward_keys(
    q, k, v, dout, lse, delta, dk, dv, bias, mask, slopes,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    heads, group, n, m, size, scale, ahead, behind,
    E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr, BEHIND: tl.constexpr, TABLE: tl.constexpr, SLOPES: tl.constexpr, MASK: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys: all queries that see it, of all query heads that share it, in a fixed order.

    Tiles are transposed, keys down and queries across, so that weights go straight into the products with do and q.
    """
    blocks, few = tl.cdiv(m, BLOCK_N), heads // group
    turn = tl.program_id(0)
    j_first = turn % blocks * BLOCK_N
    b, h_kv = (turn // blocks // few).to(tl.int64), (turn // blocks % few).to(tl.int64)
    j = j_first + tl.arange(0, BLOCK_N)
    key = _tile(k + b * k_b + h_kv * k_h, j, k_n, m, E, BLOCK_E, OPERAND, True)
    value = _tile(v + b * v_b + h_kv * v_h, j, v_n, m, C, BLOCK_C, OPERAND, True)
    sum_k = tl.zeros((BLOCK_N, BLOCK_E), ACC)
    sum_v = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    unit = 1.0 if TABLE or SLOPES else scale * LOG2E
    low, high = j_first - (m - n), tl.minimum(j_first + BLOCK_N, m) - 1 - (m - n)
    first, inner, outer, last = _band(low, high, ahead, behind, n, BLOCK_M)
    for member in range(0, group):
        h = h_kv * group + member
        row, place = (b * heads + h) * n, (b * n * heads + h) * C
        slope = tl.load(slopes + h) if SLOPES else 0.0
        for part in tl.static_range(0, 3):
            start = first if part == 0 else inner if part == 1 else outer
            stop = inner if part == 0 else outer if part == 1 else last
            for i_first in range(start, stop, BLOCK_M):
                i = i_first + tl.arange(0, BLOCK_M)
                query = _tile(q + b * q_b + h * q_h, i, q_n, n, E, BLOCK_E, OPERAND, part != 1)
                do = _tile(dout + place, i, heads * C, n, C, BLOCK_C, OPERAND, part != 1)
                top, change = _rows(lse + row, delta + row, i, n)
                s = tl.dot(key, tl.trans(query), input_precision=PRECISION, out_dtype=ACC)
                s = _scores(s, i[None, :], j[:, None], n, m, scale, ahead, behind, slope,
                            bias + b * bias_b + h * bias_h, bias_n, bias_m,
                            mask + b * mask_b + h * mask_h, mask_n, mask_m, TABLE, SLOPES, MASK,
                        AHEAD, BEHIND, part != 1)  # fmt: skip
                p = tl.exp2(s * unit - top[None, :])
                sum_v = tl.dot(p.to(OPERAND), do, sum_v, input_precision=PRECISION, out_dtype=ACC)
                dp = tl.dot(value, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
                ds = p * (dp - change[None, :])
                sum_k = tl.dot(ds.to(OPERAND), query, sum_k, input_precision=PRECISION, out_dtype=ACC)

    _put(dk + (b * m * few + h_kv) * E, sum_k * scale, j, few * E, m, E, BLOCK_E)
    _put(dv + (b * m * few + h_kv) * C, sum_v, j, few * C, m, C, BLOCK_C)


@autotune(
    [
        config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
        config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
        config(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2),
        config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
        config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        config(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
        config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1),
        *TINY,
    ],
    key=KEY,
    interpret=SMALL,
    prune_configs_by=_fitting(lambda M, N, E, C: (M * (E + C), N * (E + C), M * (E + 2 * N))),
)
@jit
def _backward_queries(
    q, k, v, dout, lse, delta, dq, dslopes, bias, mask, slopes,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    heads, group, n, m, size, scale, ahead, behind,
    E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr, BEHIND: tl.constexpr, TABLE: tl.constexpr, SLOPES: tl.constexpr, MASK: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DSLOPES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and what each of them adds to the gradient of its head's slope."""
    blocks = tl.cdiv(n, BLOCK_M)
    turn = tl.program_id(0)
    i_first = (blocks - 1 - turn % blocks) * BLOCK_M
    b, h = (turn // blocks // heads).to(tl.int64), (turn // blocks % heads).to(tl.int64)
    k, v = k + b * k_b + h // group * k_h, v + b * v_b + h // group * v_h
    bias, mask = bias + b * bias_b + h * bias_h, mask + b * mask_b + h * mask_h
    slope = tl.load(slopes + h) if SLOPES else 0.0
    unit = 1.0 if TABLE or SLOPES else scale * LOG2E

    i, row = i_first + tl.arange(0, BLOCK_M), (b * heads + h) * n
    query = _tile(q + b * q_b + h * q_h, i, q_n, n, E, BLOCK_E, OPERAND, True)
    do = _tile(dout + (b * n * heads + h) * C, i, heads * C, n, C, BLOCK_C, OPERAND, True)
    top, change = _rows(lse + row, delta + row, i, n)
    acc = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    sum_slope = tl.zeros((BLOCK_M,), ACC)
    low, high = i_first + (m - n), tl.minimum(i_first + BLOCK_M, n) - 1 + (m - n)
    first, inner, outer, last = _band(low, high, behind, ahead, m, BLOCK_N)
    for part in tl.static_range(0 if BEHIND else 1, 3):
        start = first if part == 0 else inner if part == 1 else outer
        stop = inner if part == 0 else outer if part == 1 else last
        for j_first in range(start, stop, BLOCK_N):
            j = j_first + tl.arange(0, BLOCK_N)
            key = _tile(k, j, k_n, m, E, BLOCK_E, OPERAND, part != 1)
            value = _tile(v, j, v_n, m, C, BLOCK_C, OPERAND, part != 1)
            s = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
            s = _scores(s, i[:, None], j[None, :], n, m, scale, ahead, behind, slope,
                        bias, bias_n, bias_m, mask, mask_n, mask_m, TABLE, SLOPES, MASK,
                        AHEAD, BEHIND, part != 1)  # fmt: skip
            p = tl.exp2(s * unit - top[:, None])
            dp = tl.dot(do, tl.trans(value), input_precision=PRECISION, out_dtype=ACC)
            ds = p * (dp - change[:, None])
            if DSLOPES:
                sum_slope -= tl.sum(ds * tl.abs(i[:, None] + (m - n) - j[None, :]), 1)
            acc = tl.dot(ds.to(OPERAND), key, acc, input_precision=PRECISION, out_dtype=ACC)

    _put(dq + (b * n * heads + h) * E, acc * scale, i, heads * E, n, E, BLOCK_E)
    if DSLOPES:
        tl.store(dslopes + row + i, sum_slope, mask=i < n)


@autotune(
    [
        config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1),
        *TINY,
    ],
    key=KEY,
    interpret=SMALL,
    prune_configs_by=_fitting(lambda M, N, E, C: (0, (M + N) * (E + C), 4 * M * N)),
)
@jit
def _backward_bias(
    q, k, v, dout, lse, delta, dbias, bias, mask, slopes,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_h, mask_n, mask_m,
    batch, heads, group, n, m, size, scale, ahead, behind, many_b, many_h,
    E: tl.constexpr, C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    AHEAD: tl.constexpr, BEHIND: tl.constexpr, TABLE: tl.constexpr, SLOPES: tl.constexpr, MASK: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of one tile of the bias, summed over everything that the bias was broadcast over, in a fixed order.

    The bias is (many_b, many_h, n or 1, m or 1); ROWS, COLUMNS: it has the n rows, the m columns.
    """
    i_blocks, j_blocks = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    down, across = i_blocks if ROWS else 1, j_blocks if COLUMNS else 1
    turn = tl.program_id(0)
    tile_j, tile_i = turn % across, turn // across % down
    own_h, own_b = turn // across // down % many_h, turn // across // down // many_h
    wide = (turn * 0).to(tl.int64)  # makes offsets 64 bits wide
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for j_block in range(tile_j, tile_j + 1 if COLUMNS else j_blocks):
        j = j_block * BLOCK_N + tl.arange(0, BLOCK_N)
        low, high = j_block * BLOCK_N - (m - n), tl.minimum(j_block * BLOCK_N + BLOCK_N, m) - 1 - (m - n)
        first, inner, outer, last = _band(low, high, ahead, behind, n, BLOCK_M)
        start = tl.maximum(tile_i, first // BLOCK_M)
        stop = tl.minimum(tile_i + 1 if ROWS else i_blocks, (last + BLOCK_M - 1) // BLOCK_M)
        for i_block in range(start, stop):  # empty when none of these queries sees these keys
            i = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
            for b32 in range(own_b, batch, many_b):  # its own batch entry, or all
                for h32 in range(own_h, heads, many_h):
                    b, h = wide + b32, wide + h32
                    query = _tile(q + b * q_b + h * q_h, i, q_n, n, E, BLOCK_E, OPERAND, True)
                    do = _tile(dout + (b * n * heads + h) * C, i, heads * C, n, C, BLOCK_C, OPERAND, True)
                    key = _tile(k + b * k_b + h // group * k_h, j, k_n, m, E, BLOCK_E, OPERAND, True)
                    value = _tile(v + b * v_b + h // group * v_h, j, v_n, m, C, BLOCK_C, OPERAND, True)
                    row = (b * heads + h) * n
                    top, change = _rows(lse + row, delta + row, i, n)
                    s = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
                    s = _scores(s, i[:, None], j[None, :], n, m, scale, ahead, behind, 0.0,
                                bias + b * bias_b + h * bias_h, bias_n, bias_m,
                                mask + b * mask_b + h * mask_h, mask_n, mask_m, TABLE, SLOPES, MASK,
                                AHEAD, BEHIND, True)  # fmt: skip
                    p = tl.exp2(s - top[:, None])  # the bias is a table, so `_scores` has scaled
                    dp = tl.dot(do, tl.trans(value), input_precision=PRECISION, out_dtype=ACC)
                    total += p * (dp - change[:, None])

    i, j = (tile_i * BLOCK_M + tl.arange(0, BLOCK_M))[:, None], (tile_j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    rows, columns = n if ROWS else 1, m if COLUMNS else 1
    if not ROWS:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], (BLOCK_M, BLOCK_N))
    if not COLUMNS:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], (BLOCK_M, BLOCK_N))
    place = dbias + (own_b * many_h + own_h).to(tl.int64) * rows * columns
    tl.store(place + i.to(tl.int64) * columns + j, total, mask=(i < rows) & (j < columns))


# ------------------------------------------------------------------------------------------------------ public function


def _tokens_first(shape, like):
    """Memory for a (b, h, n, e) result that lies as (b, n, h, e), so that merging the heads copies nothing."""
    b, h, n, e = shape
    return empty((b, n, h, e), like).transpose(1, 2)


def _launch(kernel, blocks, shared, **own):
    kernel[lambda constants: (blocks(constants),)](**shared, **own)


def _arguments(q, k, v, bias, slopes, mask, scale, ahead, behind):
    """What all kernels take: tensors, strides, sizes and constants."""
    (b, h, n, e), (_, h_kv, m, c) = q.shape, v.shape
    strides = {}
    for name, x in {"q": q, "k": k, "v": v}.items():
        strides |= {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_n": x.stride(2)}
    for name, x in {"bias": bias, "mask": mask}.items():
        steps = (0, 0, 0, 0) if x is None else x.expand(b, h, n, m).stride()
        strides |= dict(zip((f"{name}_{axis}" for axis in "bhnm"), steps, strict=True))
    longest = max(n, m)
    return {
        "q": q, "k": k, "v": v, "bias": q if bias is None else bias, "slopes": q if slopes is None else slopes,
        "mask": q if mask is None else mask.view(torch.uint8), **strides, "heads": h, "group": h // h_kv,
        "n": n, "m": m, "size": 0 if longest < 512 else triton.next_power_of_2(longest), "scale": scale,
        "ahead": ahead, "behind": behind, "E": e, "C": c,
        "BLOCK_E": max(16, triton.next_power_of_2(e)), "BLOCK_C": max(16, triton.next_power_of_2(c)),
        "AHEAD": ahead < FAR, "BEHIND": behind < FAR,
        "TABLE": bias is not None, "SLOPES": slopes is not None, "MASK": mask is not None,
        "OPERAND": operand(q.dtype), "ACC": accumulator(q.dtype), "PRECISION": precision(q.dtype),
    }  # fmt: skip


def _new(shape, like):
    """`_tokens_first` for compilers."""
    b, h, n, e = shape
    return like.new_empty(b, n, h, e).transpose(1, 2)


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? mask, float scale, int ahead, int behind)"
    " -> (Tensor, Tensor)",
    lambda q, k, v, *_: (
        _new((*q.shape[:3], v.shape[3]), q), q.new_empty(q.shape[:3], dtype=wide(q.dtype)),
    ),
)  # fmt: skip
def compute(q, k, v, bias, slopes, mask, scale, ahead, behind):
    """The output and the log-sum-exp of each row."""
    b, h, n, _ = q.shape
    out = _tokens_first((b, h, n, v.shape[3]), q)
    lse = empty((b, h, n), q, wide(q.dtype))
    shared = _arguments(q, k, v, bias, slopes, mask, scale, ahead, behind)
    if out.numel() and k.numel():
        _launch(_forward, lambda x: b * h * triton.cdiv(n, x["BLOCK_M"]), shared, out=out, lse=lse)
    else:
        out.zero_(), lse.fill_(-math.inf)
    return out, lse


def _shapes(q, k, v, bias, slopes, mask, out, lse, dout, dlse, scale, ahead, behind, needs):
    """What `differentiate` returns, for compilers."""
    found = [_new(x.shape, x) for x, need in zip((q, k, v), needs, strict=False) if need]
    found += [bias.new_empty(bias.shape)] if needs[3] else []
    return found + ([slopes.new_empty(slopes.shape)] if needs[4] else [])


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? mask, Tensor out, Tensor lse, Tensor dout,"
    " Tensor? dlse, float scale, int ahead, int behind, bool[] needs) -> Tensor[]",
    _shapes,
)
def differentiate(q, k, v, bias, slopes, mask, out, lse, dout, dlse, scale, ahead, behind, needs):
    """The gradients of q, k, v, bias and slopes, those that are needed."""
    (b, h, n), (h_kv, m, c) = q.shape[:3], v.shape[1:]
    if not (out.numel() and k.numel()):
        return [torch.zeros_like(x) for x, need in zip((q, k, v, bias, slopes), needs, strict=True) if need]
    shared = _arguments(q, k, v, bias, slopes, mask, scale, ahead, behind)
    dout = dout.transpose(1, 2).contiguous().transpose(1, 2)  # as `out` lies: token, head, width
    delta = empty((b, h, n), lse)
    width, acc, rows = shared["BLOCK_C"], shared["ACC"], 64 if INTERPRET else max(8, 4096 // shared["BLOCK_C"])
    _delta[(b * h * triton.cdiv(n, rows),)](
        out, dout, lse, lse if dlse is None else dlse.contiguous(), delta, h, n,
        DLSE=dlse is not None, C=c, BLOCK_C=width, ACC=acc, BLOCK_M=rows,
    )  # fmt: skip
    shared |= {"dout": dout, "lse": lse, "delta": delta}
    dq = dk = dv = dbias = dslopes = None
    if needs[1] or needs[2]:
        dk, dv = _tokens_first(k.shape, k), _tokens_first(v.shape, v)
        _launch(_backward_keys, lambda x: b * h_kv * triton.cdiv(m, x["BLOCK_N"]), shared, dk=dk, dv=dv)
    if needs[0] or needs[4]:
        dq = _tokens_first(q.shape, q)
        dslopes = empty((b, h, n), lse) if needs[4] else delta
        _launch(
            _backward_queries, lambda x: b * h * triton.cdiv(n, x["BLOCK_M"]), shared,
            dq=dq, dslopes=dslopes, DSLOPES=needs[4],
        )  # fmt: skip
        dslopes = dslopes.sum((0, 2)) if needs[4] else None
    if needs[3]:
        dbias = empty(bias.shape, bias)
        many_b, many_h, rows, columns = bias.shape
        down, across = rows == n, columns == m  # a single query or key counts as present: nothing to sum

        def tiles(x):
            i_tiles = triton.cdiv(n, x["BLOCK_M"]) if down else 1
            return many_b * many_h * i_tiles * (triton.cdiv(m, x["BLOCK_N"]) if across else 1)

        _launch(
            _backward_bias, tiles, shared, dbias=dbias,
            batch=b, many_b=many_b, many_h=many_h, ROWS=down, COLUMNS=across,
        )  # fmt: skip
    return [x for x, need in zip((dq, dk, dv, dbias, dslopes), needs, strict=True) if need]


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, bias, slopes, mask, scale, ahead, behind):
        return compute(q, k, v, bias, slopes, mask, scale, ahead, behind)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.numbers = inputs[6:]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        out = ctx.saved_tensors[6]
        needs = list(ctx.needs_input_grad[:5])
        if dout is None and dlse is None:
            return (None,) * 9
        dout = out.new_zeros(out.shape) if dout is None else dout
        found = differentiate(*ctx.saved_tensors, dout, dlse, *ctx.numbers, needs)
        return *spread(found, needs), None, None, None, None


def _four(name, x, shape):
    """A bias or mask with four dimensions. Raises ValueError when it does not broadcast to (b, h, n, m)."""
    sizes = (1,) * (4 - x.ndim) + tuple(x.shape)
    if len(sizes) > 4 or any(have not in (1, want) for have, want in zip(sizes, shape, strict=True)):
        what = f"{name} {tuple(x.shape)}"
        raise ValueError(f"flash_attention: {what} does not broadcast to (b, h, n, m) = {tuple(shape)}")
    return x.reshape(sizes)


def flash_attention(q, k, v, causal=False, window=None, bias=None, scale=None, return_lse=False, *, mask=None):
    """Attention that never holds the n x m scores: softmax(q k^T scale + bias) v.

    q           (b, h, n, e), k (b, h_kv, m, e), v (b, h_kv, m, c); e and c from 1 to 256, h_kv divides h: the query
                heads 0 .. h / h_kv - 1 share the first head of keys, and so on. float32, float16, bfloat16.
    causal      query i sees the keys j <= i + m - n: the n queries are the last n of the m positions.
    window      each query sees `window` keys, itself and those before it, when causal; otherwise the keys less than
                `window` positions away on both sides.
    bias        added to the scores: any tensor that broadcasts to (b, h, n, m) and is read through stride 0, with its
                gradient; or one slope a head, (h,), for ALiBi: -slope |i + m - n - j|, made inside the kernels.
    scale       of the products; 1 / sqrt(e) by default.
    mask        boolean, True where attention is allowed, broadcast to (b, h, n, m); read through stride 0.
    return_lse  also return the log-sum-exp of each row's scores, (b, h, n), natural logarithm, float32, with gradient.

    A row that may see nothing gives 0, log-sum-exp -inf and no gradient. So `partial(flash_attention, causal=True)`
    stands wherever `tfkit.zoo.attention.causal_attention` does. The result lies in memory as (b, n, h, c).

    Traffic: q and out move once, k and v once for each block of queries that sees them. Blocks outside the causal band
    or the window are not visited, forward or backward; only blocks on the edge of the band are masked. Saved for the
    backward pass: the inputs, out and the log-sum-exp, so 4 bytes a row beyond what is there anyway; the backward pass
    takes 4 more (delta) and the gradients. dk and dv are summed over blocks of queries and over the heads that share
    them by one program, dq by another, and the gradient of a bias by a third over what it was broadcast over, each in
    a fixed order and without atomics: the same inputs give the same bits with the same block sizes.
    The last dimension of q, k and v must be contiguous, or they are copied; other strides are free.

    Raises ValueError for shapes that do not fit, a head width over 256, a window below 1, more queries than keys when
    causal, and a mask that is not boolean. Source: "FlashAttention", 2022, and "FlashAttention-2", 2023; the slopes:
    "Train Short, Test Long" (ALiBi), 2021.
    """
    q, k, v = autocast(q, k, v)
    check("flash_attention", q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"flash_attention: q, k, v must have four dimensions (b, h, n, e); got {shapes}")
    (b, h, n, e), (_, h_kv, m, c) = q.shape, v.shape
    if k.shape != (b, h_kv, m, e) or v.shape[0] != b:
        raise ValueError(f"flash_attention: need q (b, h, n, e), k (b, h_kv, m, e), v (b, h_kv, m, c); got {shapes}")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"flash_attention: {h} query heads do not divide into {h_kv} heads of keys and values")
    if not (1 <= e <= 256 and 1 <= c <= 256):
        raise ValueError(f"flash_attention: head widths must be 1 to 256; got {e} (q, k) and {c} (v)")
    if window is not None and window < 1:
        raise ValueError(f"flash_attention: a window must be at least 1; got {window}")
    if causal and n > m:
        raise ValueError(f"flash_attention: causal attention needs at least as many keys as queries; got {n} and {m}")
    slopes = None
    if bias is not None:
        check("flash_attention", bias=bias)
        if bias.ndim == 1:
            if len(bias) != h:
                raise ValueError(f"flash_attention: a bias of one dimension is a slope for each of {h} heads; "
                                 f"got {tuple(bias.shape)}. For one number a key pass (1, {m})")  # fmt: skip
            bias, slopes = None, bias.to(wide(q.dtype)).contiguous()
        else:
            bias = _four("bias", bias, (b, h, n, m))
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.device != q.device:
            what = f"{mask.dtype} on {mask.device}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"flash_attention: a mask is boolean, True where attention is allowed, on {q.device}; "
                             f"got {what}. Numbers go into bias=")  # fmt: skip
        mask = _four("mask", mask, (b, h, n, m))
    scale = float(e**-0.5 if scale is None else scale)
    if scale <= 0:  # the kernels scale a row's maximum instead of its scores, which needs a positive scale
        q, scale = q * (-1.0 if scale else 0.0), -scale or 1.0
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    behind = FAR if window is None else window - 1
    out, lse = _FlashAttention.apply(q, k, v, bias, slopes, mask, scale, 0 if causal else behind, behind)
    return (out, lse) if return_lse else out


def pairs(n, m, causal=False, window=None):
    """How many of the n m pairs of a query and a key are visible: what the FLOPs of a row of the benchmark count."""
    position = torch.arange(m - n, m)
    last = position if causal else (position + (m if window is None else window - 1)).clamp(max=m - 1)
    first = 0 if window is None else (position - window + 1).clamp(min=0)
    return int((last + 1 - first).clamp(min=0).sum())


def benchmarks():
    """For kernels/bench.py: 16k tokens and a model width of 2048, causal and not, at head widths 64, 128, 256."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def peer(backend, causal):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    lengths = (1024, 4096, 16384)

    def entry(causal):
        work = lambda s: 4 * s["b"] * s["h"] * s["e"] * pairs(s["n"], s["n"], causal)  # two products, forward
        return {
            "name": "flash_attention" + ("_causal" if causal else ""),
            "sizes": [{"b": 16384 // n, "h": 2048 // e, "n": n, "e": e} for e in (64, 128, 256) for n in lengths],
            "inputs": lambda s, dtype, device: tuple(
                torch.randn(s["b"], s["h"], s["n"], s["e"], dtype=dtype, device=device) for _ in range(3)
            ),
            "ours": lambda q, k, v: flash_attention(q, k, v, causal=causal),
            "reference": lambda q, k, v: reference(q, k, v, causal=causal),
            "peers": {"SDPA flash": peer(SDPBackend.FLASH_ATTENTION, causal),
                      "SDPA cuDNN": peer(SDPBackend.CUDNN_ATTENTION, causal)},
            "differentiate": (0, 1, 2), "bytes": None, "backward_bytes": None,
            "tiny": {"b": 2, "h": 2, "n": 40, "e": 16}, "eager": None,
            "part": lambda x: x[-1:, -1:],  # the last head of the last text: none depends on another
            "flops": work, "backward_flops": lambda s: 5 * work(s) // 2,  # five products, as FlashAttention-2 counts
        }  # fmt: skip

    return [entry(False), entry(True)]
