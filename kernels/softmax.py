"""Softmax over the last dimension: one pass where a row fits into a program's registers, two passes where not."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._rows import as_rows, tile
from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton

LONGEST = 32768  # columns that the one-pass forward kernel takes: 64 numbers in each thread of 16 warps
LONGEST_BACKWARD = 16384  # the backward kernel holds two rows, the output and its gradient


def reference(x):
    """softmax(x) over the last dimension: exp(x - max) / sum of exp(x - max)."""
    weight = (x - x.amax(-1, keepdim=True)).exp()
    return weight / weight.sum(-1, keepdim=True)


@jit
def _forward(X, Y, stride, rows, n, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS whole rows: read once, written once. Behind the end of a row -inf, which has no weight."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    row = tl.minimum(row, rows - 1)  # behind the last row: the last row again, not stored
    x = tl.load(X + row * stride + column, mask=column < n, other=float("-inf")).to(ACC)
    weight = tl.exp(x - tl.max(x, 1)[:, None])
    y = weight / tl.sum(weight, 1)[:, None]
    tl.store(Y + row * n + column, y.to(Y.dtype.element_ty), mask=inside)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((4096, 4), (8192, 8), (8192, 4), (16384, 16), (16384, 8), (32768, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _forward_online(X, Y, stride, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One row, block by block: first the largest value and the sum in a single pass, then the output."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    high = tl.full([], float("-inf"), ACC)
    total = tl.full([], 0.0, ACC)
    for start in range(0, n, BLOCK):
        x = tl.load(X + row * stride + start + column, mask=start + column < n, other=float("-inf")).to(ACC)
        higher = tl.maximum(high, tl.max(x, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf so far: exp(-inf - 0) is the 0 that is meant
        total = total * tl.exp(high - shift) + tl.sum(tl.exp(x - shift), 0)
        high = higher
    shift = tl.where(high == float("-inf"), 0.0, high)
    for start in range(0, n, BLOCK):
        x = tl.load(X + row * stride + start + column, mask=start + column < n, other=float("-inf")).to(ACC)
        y = tl.exp(x - shift) / total
        tl.store(Y + row * n + start + column, y.to(Y.dtype.element_ty), mask=start + column < n)


@jit
def _backward(Y, DY, DX, stride, rows, n, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = y (dy - sum(y dy)) for ROWS whole rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    y = tl.load(Y + row * n + column, mask=inside, other=0.0).to(ACC)
    dy = tl.load(DY + row * stride + column, mask=inside, other=0.0).to(ACC)
    dx = y * (dy - tl.sum(y * dy, 1)[:, None])
    tl.store(DX + row * n + column, dx.to(DX.dtype.element_ty), mask=inside)


@autotune(
    [config(BLOCK=b, num_warps=w) for b, w in ((4096, 4), (8192, 8), (8192, 16), (16384, 16))],
    key=["n"],
    interpret={"BLOCK": 16384},
)
@jit
def _backward_long(Y, DY, DX, stride, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One row, block by block: first sum(y dy), then the gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)  # one sum in each lane; added up once, behind the loop
    for start in range(0, n, BLOCK):
        y = tl.load(Y + row * n + start + column, mask=start + column < n, other=0.0).to(ACC)
        total += y * tl.load(DY + row * stride + start + column, mask=start + column < n, other=0.0).to(ACC)
    dot = tl.sum(total, 0)
    for start in range(0, n, BLOCK):
        y = tl.load(Y + row * n + start + column, mask=start + column < n, other=0.0).to(ACC)
        dy = tl.load(DY + row * stride + start + column, mask=start + column < n, other=0.0).to(ACC)
        tl.store(DX + row * n + start + column, (y * (dy - dot)).to(DX.dtype.element_ty), mask=start + column < n)


@operator("(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape))
def compute(x):
    flat, y = as_rows(x), empty(x.shape, like=x)
    (rows, n), acc = flat.shape, accumulator(x.dtype)
    if n <= LONGEST:
        sizes = tile(n, rows)
        _forward[(triton.cdiv(rows, sizes["ROWS"]),)](flat, y, flat.stride(0), rows, n, ACC=acc, **sizes)
    else:
        _forward_online[(rows,)](flat, y, flat.stride(0), n, ACC=acc)
    return y


@operator("(Tensor y, Tensor dy) -> Tensor", lambda y, dy: y.new_empty(y.shape))
def differentiate(y, dy):
    flat, dx = as_rows(dy), empty(y.shape, like=y)
    (rows, n), acc = flat.shape, accumulator(y.dtype)
    if n <= LONGEST_BACKWARD:
        sizes = tile(n, rows)
        _backward[(triton.cdiv(rows, sizes["ROWS"]),)](y, flat, dx, flat.stride(0), rows, n, ACC=acc, **sizes)
    else:
        _backward_long[(rows,)](y, flat, dx, flat.stride(0), n, ACC=acc)
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return compute(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return differentiate(*ctx.saved_tensors, dy)


def softmax(x):
    """Softmax over the last dimension: y = exp(x - max(x)) / sum(exp(x - max(x))); gradient y (dy - sum(y dy)).

    x: (..., n), fp32, fp16, bf16 or fp64; returns the same shape and dtype, computed in fp32 (fp64 for fp64). Any
    strides: rows that do not lie together in memory are copied first. A row of -inf alone gives NaN, as in torch.

    Rows up to LONGEST stay in registers: every element is read once and written once. Longer rows are read twice
    (online softmax, then the output). Backward stores y alone, and reads y and dy once, twice beyond LONGEST_BACKWARD.
    Raises ValueError for another device or dtype, or for a tensor without dimensions.
    Source: "Online normalizer calculation for softmax", 2018.
    """
    check("softmax", x=x)
    if x.dim() == 0:
        raise ValueError("softmax: x must have a dimension to sum over, and has shape ()")
    return _Softmax.apply(x) if x.numel() else x.clone()


def _reach(size, direction):
    """The share of the copy bandwidth that the traffic of long rows allows: they are read twice."""
    if direction == "forward":
        return 1.0 if size["columns"] <= LONGEST else 2 / 3
    return 1.0 if size["columns"] <= LONGEST_BACKWARD else 3 / 5


def benchmarks():
    """What kernels/bench.py measures: square, wide, and rows longer than a block."""
    sizes = [(4096, 256), (4096, 1024), (4096, 4096), (4096, 16384), (4096, 32768), (4096, 65536), (4096, 262144)]
    return [
        {
            "name": "softmax",
            "sizes": [{"rows": rows, "columns": columns} for rows, columns in sizes],
            "inputs": lambda s, dtype, device: (torch.randn(s["rows"], s["columns"], dtype=dtype, device=device),),
            "ours": softmax,
            "reference": reference,
            "peers": {"torch": lambda x: F.softmax(x, -1)},
            "differentiate": (0,),
            "bytes": lambda s, itemsize: 2 * s["rows"] * s["columns"] * itemsize,
            "flops": None,
            "backward_bytes": lambda s, itemsize: 3 * s["rows"] * s["columns"] * itemsize,
            "backward_flops": None,
            "reach": _reach,
        }
    ]
