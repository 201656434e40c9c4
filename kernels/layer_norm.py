"""Layer normalization over the last dimension, with the residual addition before it fused in."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ._rows import (
    as_rows,
    check_shapes,
    load_sum,
    one_type,
    partial_sums,
    programs,
    scale,
    shapes_backward,
    shapes_forward,
    stages,
    tile,
)
from ._runtime import accumulator, autotune, check, config, empty, jit, operator, spread, tl, triton, wide

LONGEST = 16384  # columns that the one-pass forward kernel holds in registers
LONGEST_BACKWARD = 8192  # backward holds two rows and two sums of rows
COLUMNS = {"ROWS": 32, "BLOCK": 128, "num_warps": 4}  # tile of `_columns`: 256 bytes of a row in 16 bits


def reference(x, weight=None, bias=None, eps=1e-5, residual=None):
    """(x - mean) / sqrt(variance + eps) * weight + bias; with a residual, of x + residual, which is returned too."""
    total = x if residual is None else x + residual
    centered = total - total.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if residual is None else (y, total)


@jit
def _forward(X, R, S, W, B, Y, MEAN, RSTD, x_stride, r_stride, rows, n, eps, ACC: tl.constexpr, ROWS: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """ROWS whole rows: mean, then the variance of what is left, then the output. Read once, written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    valid, inside = column < n, (row < rows) & (column < n)
    row = tl.minimum(row, rows - 1)  # behind the last row: the last row again, not stored
    x = load_sum(X, R, S, row * x_stride + column, row * r_stride + column, row * n + column, valid, inside, ACC)
    mean = tl.sum(x, 1)[:, None] / n
    centered = tl.where(valid, x - mean, 0.0)  # without the mask the padding would add mean^2 to the variance
    rstd = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] / n + eps)
    y = scale(centered * rstd, W, B, column, valid, ACC)
    tl.store(Y + row * n + column, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((4096, 4), (8192, 8), (8192, 16), (16384, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _forward_long(X, R, S, W, B, Y, MEAN, RSTD, x_stride, r_stride, n, eps, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One row, block by block: the mean and the squared distance of each block are merged, then the output."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    mean = tl.full([], 0.0, ACC)
    spread = tl.full([], 0.0, ACC)  # sum of (x - mean)^2 so far
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        x = load_sum(X, R, S, row * x_stride + column, row * r_stride + column, row * n + column, mask, mask, ACC)
        here = tl.minimum(BLOCK, n - start)
        average = tl.sum(x, 0) / here
        centered = tl.where(mask, x - average, 0.0)
        distance = average - mean
        mean += distance * here / (start + here)
        spread += tl.sum(centered * centered, 0) + distance * distance * start * here / (start + here)
    rstd = tl.rsqrt(spread / n + eps)
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        if R is None:
            x = tl.load(X + row * x_stride + column, mask=mask, other=0.0).to(ACC)
        else:
            x = tl.load(S + row * n + column, mask=mask, other=0.0).to(ACC)
        y = scale((x - mean) * rstd, W, B, column, mask, ACC)
        tl.store(Y + row * n + column, y.to(Y.dtype.element_ty), mask=mask)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@jit
def _backward(S, DY, DS, W, MEAN, RSTD, DX, DW, DB, s_stride, dy_stride, ds_stride, rows, n, ACC: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dx of ROWS rows at a time, and one row each of partial sums for dweight and dbias per program."""
    column = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        mean = tl.load(MEAN + row, mask=row < rows, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        s = tl.load(S + row * s_stride + column, mask=inside, other=0.0).to(ACC)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(ACC)
        normal = tl.where(inside, (s - mean) * rstd, 0.0)
        dn = scale(dy, W, None, column, column < n, ACC)
        along = tl.sum(dn * normal, 1)[:, None] / n
        dx = (dn - tl.sum(dn, 1)[:, None] / n - normal * along) * rstd
        if DS is not None:
            dx += tl.load(DS + row * ds_stride + column, mask=inside, other=0.0).to(ACC)
        tl.store(DX + row * n + column, dx.to(DX.dtype.element_ty), mask=inside)
        dw += dy * normal
        db += dy
    column = tl.arange(0, BLOCK)
    if DW is not None:
        tl.store(DW + tl.program_id(0) * n + column, tl.sum(dw, 0), mask=column < n)
    if DB is not None:
        tl.store(DB + tl.program_id(0) * n + column, tl.sum(db, 0), mask=column < n)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((4096, 4), (4096, 8), (8192, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _backward_long(S, DY, DS, W, MEAN, RSTD, DX, s_stride, dy_stride, ds_stride, n, ACC: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """dx of one row, block by block: first the two means of the formula, then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    mean = tl.load(MEAN + row)
    rstd = tl.load(RSTD + row)
    plain = tl.zeros((BLOCK,), ACC)
    along = tl.zeros((BLOCK,), ACC)
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        s = tl.load(S + row * s_stride + column, mask=mask, other=0.0).to(ACC)
        dn = scale(tl.load(DY + row * dy_stride + column, mask=mask, other=0.0).to(ACC), W, None, column, mask, ACC)
        plain += dn
        along += dn * ((s - mean) * rstd)  # behind the end dn is 0
    first, second = tl.sum(plain, 0) / n, tl.sum(along, 0) / n
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        s = tl.load(S + row * s_stride + column, mask=mask, other=0.0).to(ACC)
        dn = scale(tl.load(DY + row * dy_stride + column, mask=mask, other=0.0).to(ACC), W, None, column, mask, ACC)
        dx = (dn - first - (s - mean) * rstd * second) * rstd
        if DS is not None:
            dx += tl.load(DS + row * ds_stride + column, mask=mask, other=0.0).to(ACC)
        tl.store(DX + row * n + column, dx.to(DX.dtype.element_ty), mask=mask)


@jit
def _columns(S, DY, MEAN, RSTD, DW, DB, s_stride, dy_stride, rows, n, ACC: tl.constexpr, ROWS: tl.constexpr,
             BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Partial sums for dweight and dbias of BLOCK columns, where rows are too long for `_backward` to hold them."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    db = tl.zeros((ROWS, BLOCK), ACC)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        mean = tl.load(MEAN + row, mask=row < rows, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        s = tl.load(S + row * s_stride + column, mask=inside, other=0.0).to(ACC)
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(ACC)
        dw += dy * ((s - mean) * rstd)  # outside dy is 0
        db += dy
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if DW is not None:
        tl.store(DW + tl.program_id(0) * n + column, tl.sum(dw, 0), mask=column < n)
    if DB is not None:
        tl.store(DB + tl.program_id(0) * n + column, tl.sum(db, 0), mask=column < n)


@operator(
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual) -> Tensor[]",
    lambda x, weight, bias, eps, residual: shapes_forward(x, residual, 2),
)
def compute(x, weight, bias, eps, residual):
    """y, mean and rstd of each row, and x + residual where there is one."""
    flat, y = as_rows(x), empty(x.shape, like=x)
    other = None if residual is None else as_rows(residual)
    total = None if residual is None else empty(x.shape, like=x)
    (rows, n), acc = flat.shape, accumulator(x.dtype)
    mean, rstd = (empty((rows,), like=x, dtype=wide(x.dtype)) for _ in range(2))
    tensors = (flat, other, total, weight, bias, y, mean, rstd)
    strides = (flat.stride(0), 0 if other is None else other.stride(0))
    if n <= LONGEST:
        sizes = tile(n, rows)
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](*tensors, *strides, rows, n, eps, ACC=acc, **sizes)
    else:
        _forward_long[(rows,)](*tensors, *strides, n, eps, ACC=acc)
    return [y, mean, rstd] if total is None else [y, mean, rstd, total]


@operator(
    "(Tensor s, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? dy, Tensor? dtotal) -> Tensor[]",
    lambda s, weight, bias, *_: shapes_backward(s, weight, bias),
)
def differentiate(s, weight, bias, mean, rstd, dy, dtotal):
    """dx, and of those that are there dweight and dbias."""
    dx, s = empty(s.shape, like=s), as_rows(s)
    (rows, n), acc = s.shape, accumulator(s.dtype)
    dy = as_rows(torch.zeros_like(s) if dy is None else dy)
    dtotal = None if dtotal is None else as_rows(dtotal)
    strides = (s.stride(0), dy.stride(0), 0 if dtotal is None else dtotal.stride(0))
    sizes = tile(n, rows, each=16)
    ahead = stages(s, sizes["ROWS"] * sizes["BLOCK"])
    count = programs(s.device, triton.cdiv(rows, sizes["ROWS"]), sizes["num_warps"])
    dw, db = partial_sums(weight, count, mean), partial_sums(bias, count, mean)
    if n <= LONGEST_BACKWARD:
        inputs = (s, dy, dtotal, weight, mean, rstd, dx, dw, db)
        _backward[(count,)](*inputs, *strides, rows, n, ACC=acc, STAGES=ahead, **sizes)
    else:
        _backward_long[(rows,)](s, dy, dtotal, weight, mean, rstd, dx, *strides, n, ACC=acc)
        if weight is not None or bias is not None:
            grid = (count, triton.cdiv(n, COLUMNS["BLOCK"]))
            _columns[grid](s, dy, mean, rstd, dw, db, *strides[:2], rows, n, ACC=acc, STAGES=3, **COLUMNS)
    return [dx, *(part.sum(0).to(p.dtype) for part, p in ((dw, weight), (db, bias)) if p is not None)]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, eps, residual):
        return tuple(compute(x, weight, bias, eps, residual))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, residual = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:3])
        ctx.save_for_backward(x if residual is None else output[3], weight, bias, *output[1:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _mean, _rstd, dtotal=None):
        _, weight, bias, *_ = ctx.saved_tensors
        found = differentiate(*ctx.saved_tensors, dy, dtotal)
        dx, dw, db = spread(found, [True, weight is not None, bias is not None])
        return dx, dw, db, None, dx if ctx.needs_input_grad[4] else None


def layer_norm(x, weight=None, bias=None, eps=1e-5, residual=None):
    """Layer normalization over the last dimension: y = (x - mean) / sqrt(variance + eps) * weight + bias.

    With `residual` it normalizes s = x + residual and returns (y, s): the addition costs no extra pass over memory.
    With n = normalized entry and g = dy * weight: dx = (g - mean(g) - n mean(g n)) / sqrt(variance + eps), dweight =
    sum of dy n and dbias = sum of dy over all rows.

    x and residual: (..., n) of one dtype, weight and bias: (n,) or None, of one that may be another: fp32, fp16, bf16
    or fp64. y and s have the shape and dtype of x, under autocast too. Computed in fp32 (fp64 for fp64); s is rounded
    to its dtype before it is normalized. Any strides: rows that do not lie together in memory are copied first.

    Forward reads x once (twice beyond LONGEST columns) and writes y; the residual adds one read and one write. Stored
    for backward: x or s, and 2 numbers per row. Backward reads it and dy once and writes dx; each program sums
    the weight's gradient over its rows and torch adds those sums, in a fixed order and without atomics: the same bits
    every time. Beyond LONGEST_BACKWARD columns the weight's gradient has a kernel of its own, and all is read 3 times.
    Raises ValueError for another device, dtype or shape. Source: "Layer Normalization", 2016.
    """
    x, residual = one_type(x, residual)
    check("layer_norm", x=x, residual=residual)
    check("layer_norm", weight=weight, bias=bias)
    check_shapes("layer_norm", x, residual, weight=weight, bias=bias)
    if x.numel() == 0:
        return reference(x, weight, bias, eps, residual)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    y, _, _, *total = _LayerNorm.apply(x, weight, bias, eps, residual)
    return (y, *total) if total else y


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` of the last dimension, computed by `layer_norm`; same constructor, weights and state dict.

    forward(x) returns the normalized x, forward(x, residual) the pair (normalized x + residual, x + residual).
    Raises ValueError for a normalized shape of several dimensions.
    """

    def __init__(self, normalized_shape, *args, **kwargs):
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"LayerNorm: only the last dimension is normalized, not {tuple(self.normalized_shape)}")

    def forward(self, x, residual=None):
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


def _inputs(size, dtype, device, residual):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    shape = (size["rows"], size["columns"])
    return (make(*shape), make(shape[1]), make(shape[1]), 1e-5, *((make(*shape),) if residual else ()))


def _reach(n, direction, residual):
    """The share of the copy bandwidth that the traffic of long rows allows: they are read more than once."""
    if direction == "forward":
        least = 4 if residual else 2
        return 1.0 if n <= LONGEST else least / (least + 1)  # what is normalized is read again
    return 1.0 if n <= LONGEST_BACKWARD else (3 + residual) / (7 + residual)  # s and dy three times, not once


def benchmarks():
    """What kernels/bench.py measures: alone and with a residual, over the widths of models and beyond."""
    torch_norm = lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps)
    torch_sum = lambda x, w, b, eps, r: (F.layer_norm(x + r, w.shape, w, b, eps), x + r)
    return [
        {
            "name": name,
            "sizes": [{"rows": 16384, "columns": n} for n in (256, 1024, 4096, 8192, 16384, 32768)],
            "inputs": lambda s, dtype, device, residual=residual: _inputs(s, dtype, device, residual),
            "ours": layer_norm,
            "reference": reference,
            "peers": {"torch": torch_sum if residual else torch_norm},
            "differentiate": (0, 1, 2, 4) if residual else (0, 1, 2),
            "bytes": lambda s, size, residual=residual: (4 if residual else 2) * s["rows"] * s["columns"] * size,
            "flops": None,
            "backward_bytes": lambda s, size, residual=residual: (3 + residual) * s["rows"] * s["columns"] * size,
            "backward_flops": None,
            "reach": lambda s, direction, residual=residual: _reach(s["columns"], direction, residual),
        }
        for name, residual in (("layer_norm", False), ("layer_norm with residual", True))
    ]
