"""Products with 8-bit weights: a scale for each output channel, and for each row of the input if it is 8-bit too."""

import math

import torch
from torch import nn
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
    tl,
    triton,
)
from .matmul import IN_THE_INTERPRETER, configurations, fitting, tile_of, tuning_key


def reference(x, weight_int8, scale):
    """x (weight scale)^T: the weight is made float again and multiplied."""
    return x @ (weight_int8.to(x.dtype) * scale.to(x.dtype)[:, None]).t()


def reference_dynamic(x, weight_int8, scale):
    """Each row of x is quantized too: whole numbers are multiplied and added, then both scales are applied."""
    codes, steps = reference_quantize(x.flatten(0, -2))
    whole = codes.long() @ weight_int8.long().t()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = whole.to(wide) * steps.to(wide)[:, None] * scale.to(wide)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight_int8))


def reference_quantize(weight):
    """Codes round(weight / scale) and scale = largest size in a row / 127 (1 for a row of zeros)."""
    high = weight.float().abs().amax(-1)
    scale = torch.where(high > 0, high / 127, torch.ones_like(high))
    return (weight.float() / scale[:, None] + 0.5).floor().clamp(-127, 127).to(torch.int8), scale


@jit
def _quantize(W, CODES, SCALE, n, k, wn, wk, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows: first the largest size, block by block, then the codes. A step of a row is its size / 127."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    high = tl.zeros((ROWS,), tl.float32)
    for start in range(0, k, BLOCK):
        inside = (row < n)[:, None] & (start + column < k)[None, :]
        place = row[:, None] * wn + (start + column).to(tl.int64)[None, :] * wk
        high = tl.maximum(high, tl.max(tl.abs(tl.load(W + place, mask=inside, other=0.0).to(tl.float32)), 1))
    scale = tl.where(high > 0, high / 127.0, 1.0)
    tl.store(SCALE + row, scale, mask=row < n)
    for start in range(0, k, BLOCK):
        inside = (row < n)[:, None] & (start + column < k)[None, :]
        place = row[:, None] * wn + (start + column).to(tl.int64)[None, :] * wk
        w = tl.load(W + place, mask=inside, other=0.0).to(tl.float32)
        code = tl.floor(w / scale[:, None] + 0.5)
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        tl.store(CODES + row[:, None] * k + (start + column)[None, :], code.to(tl.int8), mask=inside)


TILES = [  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
    *[(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 128, 8, 3), (128, 256, 128, 8, 3), (256, 128, 128, 8, 3)],
    *[(64, 128, 64, 4, 4), (64, 128, 128, 4, 4), (64, 64, 64, 4, 4), (16, 64, 256, 4, 4), (16, 128, 128, 4, 4)],
    *[(16, 32, 256, 4, 4), (32, 64, 128, 4, 4), (16, 32, 64, 4, 3), (64, 64, 32, 4, 3)],
]


@autotune(
    configurations(TILES),
    key=["tune"],
    interpret=dict(IN_THE_INTERPRETER),
    prune_configs_by={"early_config_prune": fitting},
)
@triton.heuristics({"WHOLE_K": lambda arguments: arguments["k"] % arguments["BLOCK_K"] == 0})
@jit
def _product(
    X,
    W,
    STEP,
    SCALE,
    C,
    m,
    n,
    k,
    xm,
    xk,
    wk,
    wn,
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
    """One tile of C = STEP (X W) SCALE. W is int8; so is X if OPERAND is, and then the sums are int32 and exact."""
    i, j = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x = X + (row % m).to(tl.int64)[:, None] * xm + inner.to(tl.int64)[None, :] * xk
    w = W + inner.to(tl.int64)[:, None] * wk + (column % n).to(tl.int64)[None, :] * wn
    SUM: tl.constexpr = tl.int32 if OPERAND == tl.int8 else ACC
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for start in range(0, k, BLOCK_K):
        if WHOLE_K:
            a, b = tl.load(x), tl.load(w)
        else:
            a = tl.load(x, mask=inner[None, :] < k - start, other=0)
            b = tl.load(w, mask=inner[:, None] < k - start, other=0)
        total = tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision=PRECISION, out_dtype=SUM)
        x += tl.cast(xk, tl.int64) * BLOCK_K
        w += tl.cast(wk, tl.int64) * BLOCK_K
    y = total.to(ACC)
    if STEP is not None:
        y *= tl.load(STEP + row, mask=row < m, other=0.0).to(ACC)[:, None]
    if SCALE is not None:
        y *= tl.load(SCALE + column, mask=column < n, other=0.0).to(ACC)[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(C + row.to(tl.int64)[:, None] * n + column[None, :], y.to(C.dtype.element_ty), mask=inside)


def _launch(x, weight, scale, like, step=None):
    """x (m, k) times weight (k, n), times step of the row and scale of the column, in the dtype of `like`: (m, n)."""
    (m, k), n = x.shape, weight.shape[1]
    c = empty((m, n), like=like)
    if c.numel() == 0:
        return c
    _product[lambda constants: (triton.cdiv(m, constants["BLOCK_M"]) * triton.cdiv(n, constants["BLOCK_N"]),)](
        *(x, weight, step, scale, c, m, n, k, *x.stride(), *weight.stride(), tuning_key(x, weight)),
        ACC=accumulator(like.dtype),
        OPERAND=tl.int8 if x.dtype == torch.int8 else operand(x.dtype),
        PRECISION=precision(like.dtype),
    )
    return c


def _rows(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@operator(
    "(Tensor x, Tensor weight, Tensor scale) -> Tensor",
    lambda x, weight, scale: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
def compute(x, weight, scale):
    return _launch(_rows(x), weight.t(), scale, x).view(*x.shape[:-1], len(weight))


@operator(
    "(Tensor dy, Tensor weight, Tensor scale) -> Tensor",
    lambda dy, weight, scale: dy.new_empty(*dy.shape[:-1], weight.shape[1]),
)
def differentiate(dy, weight, scale):
    scaled = (_rows(dy) * scale).to(dy.dtype)  # the scale belongs to what is summed over here
    return _launch(scaled, weight, None, dy).view(*dy.shape[:-1], weight.shape[1])


@operator(
    "(Tensor x, Tensor weight, Tensor scale) -> Tensor",
    lambda x, weight, scale: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
def compute_dynamic(x, weight, scale):
    codes, step = compute_codes(_rows(x))
    return _launch(codes, weight.t(), scale, x, step).view(*x.shape[:-1], len(weight))


@operator(
    "(Tensor weight) -> (Tensor, Tensor)",
    lambda weight: (
        weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)
    ),
)  # fmt: skip
def compute_codes(weight):
    n, k = weight.shape
    codes, scale = empty((n, k), like=weight, dtype=torch.int8), empty((n,), like=weight, dtype=torch.float32)
    if n:
        rows, block = (16, 1024) if INTERPRET else (4, 1024)
        _quantize[(triton.cdiv(n, rows),)](weight, codes, scale, n, k, *weight.stride(), ROWS=rows, BLOCK=block)
    return codes, scale


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, scale):
        return compute(x, weight, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return differentiate(dy, *ctx.saved_tensors), None, None


def _checked(name, x, weight, scale):
    check(name, x=x)
    check(name, dtypes=(torch.int8,), weight_int8=weight)
    check(name, dtypes=(torch.float32,), scale=scale)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} and weight_int8 {tuple(weight.shape)} must be (..., k) and (n, k)"
        )
    if scale.shape != weight.shape[:1]:
        raise ValueError(f"{name}: scale is {tuple(scale.shape)}; {len(weight)} output channels need ({len(weight)},)")


def quantize(weight):
    """(n, k) to int8 codes (n, k) and one fp32 scale for each row (n,): weight is about codes * scale[:, None].

    scale = largest size in the row / 127, or 1 for a row of zeros; codes are rounded to the nearest of -127 .. 127.
    So no entry is off by more than scale / 2 (and the rounding of fp32). Any strides. Not differentiable. The weight
    is read twice. Raises ValueError for another device or dtype, or if there are not two dimensions.
    """
    check("quantize", weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"quantize: weight must be (n, k), it is {tuple(weight.shape)}")
    return compute_codes(weight.detach())


def int8_matmul(x, weight_int8, scale):
    """x (weight scale)^T with the weight in 8 bits: (..., k), int8 (n, k) and a fp32 scale (n,) for its rows; (..., n).

    x: fp32, fp16, bf16 or fp64, any strides. A tile of the weight becomes x's type on its way to the tensor cores
    (every code is exact there), the scale is applied to the finished sums. With few rows of x the time is that of
    reading the weight, and it is half or a quarter as long. With codes and scale from `quantize(weight)`

        |y_ij - (x weight^T)_ij| <= scale_j / 2 * sum_k |x_ik|       (and the rounding of x's type).

    The gradient goes to x alone: dx = (dy scale) weight, through the same kernel; the weight is frozen. Kept: weight
    and scale. Raises ValueError for another device or dtype, or sizes that do not fit.
    Source: "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022.
    """
    (x,) = autocast(x)
    _checked("int8_matmul", x, weight_int8, scale)
    return _Int8Matmul.apply(x, weight_int8, scale.contiguous())


def int8_matmul_dynamic(x, weight_int8, scale):
    """The same with x in 8 bits as well: each row of x gets a step from its largest entry, at run time.

    int8 times int8 is summed in int32, exactly (for k up to 133,000), on tensor cores that do twice the work of bf16.
    On top of the error of `int8_matmul` comes that of x: step_i / 2 * sum_k |codes_jk| scale_j. One large entry in a
    row makes the step of that row large. For inference: no gradient. Shapes, dtypes, errors and source as there.
    """
    (x,) = autocast(x)
    _checked("int8_matmul_dynamic", x, weight_int8, scale)
    return compute_dynamic(x.detach(), weight_int8, scale.contiguous())


class Int8Linear(nn.Module):
    """A trained nn.Linear with its weight in 8 bits: Int8Linear(layer). The bias stays as it is; nothing is trained."""

    def __init__(self, layer, multiply=int8_matmul):
        super().__init__()
        codes, scale = quantize(layer.weight)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.multiply = multiply

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # .bfloat16() changes the bias; a scale of 8 bits would cost accuracy
        return self

    def forward(self, x):
        y = self.multiply(x, self.weight_int8, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def benchmarks():
    """What kernels/bench.py measures: one token, sixteen, and many; against a bf16 product with the unpacked weight."""

    def inputs(s, dtype, device):
        weight = torch.randn(s["n"], s["k"], device=device)
        x = torch.randn(s["m"], s["k"], dtype=dtype, device=device)
        return x, *quantize(weight), weight.to(dtype)  # the last for those who multiply without codes

    common = {
        "sizes": [{"m": m, "n": 16384, "k": 4096} for m in (1, 16, 128, 8192)],
        "inputs": inputs,
        "peers": {"16 bits": lambda x, codes, scale, weight: x @ weight.t()},
        "differentiate": (),
        "bytes": lambda s, itemsize: (s["m"] * (s["k"] + s["n"])) * itemsize + s["n"] * (s["k"] + 4),
        "flops": lambda s: 2 * s["m"] * s["n"] * s["k"],
        "backward_bytes": None,
        "backward_flops": None,
    }
    pair = lambda ours, theirs: {"ours": lambda x, codes, scale, _: ours(x, codes, scale),
                                 "reference": lambda x, codes, scale, _: theirs(x, codes, scale)}  # fmt: skip
    return [
        {**common, "name": "int8_matmul", **pair(int8_matmul, reference)},
        {**common, "name": "int8_matmul_dynamic", **pair(int8_matmul_dynamic, reference_dynamic)},
    ]
