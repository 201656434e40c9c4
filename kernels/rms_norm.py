"""Root-mean-square normalization over the last dimension, with the residual addition before it fused in."""

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
from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton, wide

LONGEST = 16384  # columns that the one-pass forward kernel holds in registers
LONGEST_BACKWARD = 8192  # backward holds two rows and a sum of rows
COLUMNS = {"ROWS": 32, "BLOCK": 128, "num_warps": 4}  # tile of `_columns`: 256 bytes of a row in 16 bits


def default_eps(x):
    """Torch's choice for eps=None: the machine epsilon of the type that is computed in."""
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def reference(x, weight=None, eps=None, residual=None):
    """x / sqrt(mean(x^2) + eps) * weight; with a residual, of x + residual, which is returned too."""
    eps = default_eps(x) if eps is None else eps
    total = x if residual is None else x + residual
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if residual is None else (y, total)


@jit
def _forward(X, R, S, W, Y, RSTD, x_stride, r_stride, rows, n, eps, ACC: tl.constexpr, ROWS: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """ROWS whole rows: the mean square, then the output. Read once, written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    valid, inside = column < n, (row < rows) & (column < n)
    row = tl.minimum(row, rows - 1)  # behind the last row: the last row again, not stored
    x = load_sum(X, R, S, row * x_stride + column, row * r_stride + column, row * n + column, valid, inside, ACC)
    rstd = tl.rsqrt(tl.sum(x * x, 1)[:, None] / n + eps)  # the padding is 0 and adds nothing; n counts the real ones
    y = scale(x * rstd, W, None, column, valid, ACC)
    tl.store(Y + row * n + column, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((4096, 4), (8192, 8), (8192, 16), (16384, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _forward_long(X, R, S, W, Y, RSTD, x_stride, r_stride, n, eps, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One row, block by block: first the sum of squares, then the output."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), ACC)  # one sum in each lane; added up once, behind the loop
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        x = load_sum(X, R, S, row * x_stride + column, row * r_stride + column, row * n + column, mask, mask, ACC)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        if R is None:
            x = tl.load(X + row * x_stride + column, mask=mask, other=0.0).to(ACC)
        else:
            x = tl.load(S + row * n + column, mask=mask, other=0.0).to(ACC)
        y = scale(x * rstd, W, None, column, mask, ACC)
        tl.store(Y + row * n + column, y.to(Y.dtype.element_ty), mask=mask)
    tl.store(RSTD + row, rstd)


@jit
def _backward(S, DY, DS, W, RSTD, DX, DW, s_stride, dy_stride, ds_stride, rows, n, ACC: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dx of ROWS rows at a time, and one row of partial sums for dweight per program."""
    column = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        normal = tl.load(S + row * s_stride + column, mask=inside, other=0.0).to(ACC) * rstd
        dy = tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(ACC)
        dn = scale(dy, W, None, column, column < n, ACC)
        along = tl.sum(dn * normal, 1)[:, None] / n
        dx = (dn - normal * along) * rstd
        if DS is not None:
            dx += tl.load(DS + row * ds_stride + column, mask=inside, other=0.0).to(ACC)
        tl.store(DX + row * n + column, dx.to(DX.dtype.element_ty), mask=inside)
        dw += dy * normal
    column = tl.arange(0, BLOCK)
    if DW is not None:
        tl.store(DW + tl.program_id(0) * n + column, tl.sum(dw, 0), mask=column < n)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((4096, 4), (4096, 8), (8192, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _backward_long(S, DY, DS, W, RSTD, DX, s_stride, dy_stride, ds_stride, n, ACC: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """dx of one row, block by block: first the mean of the formula, then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    rstd = tl.load(RSTD + row)
    along = tl.zeros((BLOCK,), ACC)
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        s = tl.load(S + row * s_stride + column, mask=mask, other=0.0).to(ACC)
        dn = scale(tl.load(DY + row * dy_stride + column, mask=mask, other=0.0).to(ACC), W, None, column, mask, ACC)
        along += dn * (s * rstd)
    mean = tl.sum(along, 0) / n
    for start in range(0, n, BLOCK):
        column = start + offset
        mask = column < n
        s = tl.load(S + row * s_stride + column, mask=mask, other=0.0).to(ACC)
        dn = scale(tl.load(DY + row * dy_stride + column, mask=mask, other=0.0).to(ACC), W, None, column, mask, ACC)
        dx = (dn - s * rstd * mean) * rstd
        if DS is not None:
            dx += tl.load(DS + row * ds_stride + column, mask=mask, other=0.0).to(ACC)
        tl.store(DX + row * n + column, dx.to(DX.dtype.element_ty), mask=mask)


@jit
def _columns(S, DY, RSTD, DW, s_stride, dy_stride, rows, n, ACC: tl.constexpr, ROWS: tl.constexpr,
             BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Partial sums for dweight of BLOCK columns, where rows are too long for `_backward` to hold them."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros((ROWS, BLOCK), ACC)
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        s = tl.load(S + row * s_stride + column, mask=inside, other=0.0).to(ACC)
        dw += tl.load(DY + row * dy_stride + column, mask=inside, other=0.0).to(ACC) * (s * rstd)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(DW + tl.program_id(0) * n + column, tl.sum(dw, 0), mask=column < n)


@operator(
    "(Tensor x, Tensor? weight, float eps, Tensor? residual) -> Tensor[]",
    lambda x, weight, eps, residual: shapes_forward(x, residual, 1),
)
def compute(x, weight, eps, residual):
    """y, rstd of each row, and x + residual where there is one."""
    flat, y = as_rows(x), empty(x.shape, like=x)
    other = None if residual is None else as_rows(residual)
    total = None if residual is None else empty(x.shape, like=x)
    (rows, n), acc = flat.shape, accumulator(x.dtype)
    rstd = empty((rows,), like=x, dtype=wide(x.dtype))
    tensors = (flat, other, total, weight, y, rstd)
    strides = (flat.stride(0), 0 if other is None else other.stride(0))
    if n <= LONGEST:
        sizes = tile(n, rows)
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](*tensors, *strides, rows, n, eps, ACC=acc, **sizes)
    else:
        _forward_long[(rows,)](*tensors, *strides, n, eps, ACC=acc)
    return [y, rstd] if total is None else [y, rstd, total]


@operator(
    "(Tensor s, Tensor? weight, Tensor rstd, Tensor? dy, Tensor? dtotal) -> Tensor[]",
    lambda s, weight, *_: shapes_backward(s, weight),
)
def differentiate(s, weight, rstd, dy, dtotal):
    """dx, and dweight if there is a weight."""
    dx, s = empty(s.shape, like=s), as_rows(s)
    (rows, n), acc = s.shape, accumulator(s.dtype)
    dy = as_rows(torch.zeros_like(s) if dy is None else dy)
    dtotal = None if dtotal is None else as_rows(dtotal)
    strides = (s.stride(0), dy.stride(0), 0 if dtotal is None else dtotal.stride(0))
    sizes = tile(n, rows, each=16)
    ahead = stages(s, sizes["ROWS"] * sizes["BLOCK"])
    count = programs(s.device, triton.cdiv(rows, sizes["ROWS"]), sizes["num_warps"])
    dw = partial_sums(weight, count, rstd)
    if n <= LONGEST_BACKWARD:
        _backward[(count,)](s, dy, dtotal, weight, rstd, dx, dw, *strides, rows, n, ACC=acc, STAGES=ahead, **sizes)
    else:
        _backward_long[(rows,)](s, dy, dtotal, weight, rstd, dx, *strides, n, ACC=acc)
        if dw is not None:
            grid = (count, triton.cdiv(n, COLUMNS["BLOCK"]))
            _columns[grid](s, dy, rstd, dw, *strides[:2], rows, n, ACC=acc, STAGES=3, **COLUMNS)
    return [dx] if dw is None else [dx, dw.sum(0).to(weight.dtype)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, eps, residual):
        return tuple(compute(x, weight, eps, residual))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, residual = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x if residual is None else output[2], weight, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _rstd, dtotal=None):
        dx, *dw = differentiate(*ctx.saved_tensors, dy, dtotal)
        return dx, dw[0] if dw else None, None, dx if ctx.needs_input_grad[3] else None


def rms_norm(x, weight=None, eps=None, residual=None):
    """Root-mean-square normalization over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

    With `residual` it normalizes s = x + residual and returns (y, s): the addition costs no extra pass over memory.
    With n = normalized entry and g = dy * weight: dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps) and dweight = sum of
    dy n over all rows. Nothing is centered, so the term mean(g) of layer normalization is missing.

    x and residual: (..., n) of one dtype, weight: (n,) or None, of one that may be another: fp32, fp16, bf16 or fp64.
    y and s have the dtype of x, under autocast too. eps: None means the machine
    epsilon of fp32 (of fp64 for fp64), as in torch; that is also the type of the computation. s is rounded to its dtype
    before it is normalized. Any strides: rows that do not lie together in memory are copied first.

    Forward reads x once (twice beyond LONGEST columns) and writes y; the residual adds one read and one write. Stored
    for backward: x or s, and 1 number per row. Backward reads it and dy once and writes dx; each program sums the
    weight's gradient over its rows and torch adds those sums, in a fixed order and without atomics: the same bits every
    time. Beyond LONGEST_BACKWARD columns the weight's gradient has a kernel of its own, and all is read 3 times.
    Raises ValueError for another device, dtype or shape.
    Source: "Root Mean Square Layer Normalization", 2019.
    """
    x, residual = one_type(x, residual)
    check("rms_norm", x=x, residual=residual)
    check("rms_norm", weight=weight)
    check_shapes("rms_norm", x, residual, weight=weight)
    if x.numel() == 0:
        return reference(x, weight, eps, residual)
    eps = default_eps(x) if eps is None else eps
    y, _, *total = _RMSNorm.apply(x, None if weight is None else weight.contiguous(), eps, residual)
    return (y, *total) if total else y


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` of the last dimension, computed by `rms_norm`; same constructor, weight and state dict.

    forward(x) returns the normalized x, forward(x, residual) the pair (normalized x + residual, x + residual).
    Raises ValueError for a normalized shape of several dimensions.
    """

    def __init__(self, normalized_shape, *args, **kwargs):
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"RMSNorm: only the last dimension is normalized, not {tuple(self.normalized_shape)}")

    def forward(self, x, residual=None):
        return rms_norm(x, self.weight, self.eps, residual)


def _inputs(size, dtype, device, residual):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    shape = (size["rows"], size["columns"])
    return (make(*shape), make(shape[1]), 1e-6, *((make(*shape),) if residual else ()))


def _reach(n, direction, residual):
    """The share of the copy bandwidth that the traffic of long rows allows: they are read more than once."""
    if direction == "forward":
        least = 4 if residual else 2
        return 1.0 if n <= LONGEST else least / (least + 1)  # what is normalized is read again
    return 1.0 if n <= LONGEST_BACKWARD else (3 + residual) / (7 + residual)  # s and dy three times, not once


def benchmarks():
    """What kernels/bench.py measures: alone and with a residual, over the widths of models and beyond."""
    torch_norm = lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)
    torch_sum = lambda x, w, eps, r: (F.rms_norm(x + r, w.shape, w, eps), x + r)
    return [
        {
            "name": name,
            "sizes": [{"rows": 16384, "columns": n} for n in (256, 1024, 4096, 8192, 16384, 32768)],
            "inputs": lambda s, dtype, device, residual=residual: _inputs(s, dtype, device, residual),
            "ours": rms_norm,
            "reference": reference,
            "peers": {"torch": torch_sum if residual else torch_norm},
            "differentiate": (0, 1, 3) if residual else (0, 1),
            "bytes": lambda s, size, residual=residual: (4 if residual else 2) * s["rows"] * s["columns"] * size,
            "flops": None,
            "backward_bytes": lambda s, size, residual=residual: (3 + residual) * s["rows"] * s["columns"] * size,
            "backward_flops": None,
            "reach": lambda s, direction, residual=residual: _reach(s["columns"], direction, residual),
        }
        for name, residual in (("rms_norm", False), ("rms_norm with residual", True))
    ]
