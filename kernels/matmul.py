"""Matrix product in tiles, with bias and activation applied before the result leaves the registers."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ._runtime import (
    HAS_TRITON,
    INTERPRET,
    accumulator,
    autocast,
    autotune,
    check,
    config,
    empty,
    in_shared,
    jit,
    operand,
    operator,
    precision,
    spread,
    tl,
    triton,
)

ACTIVATIONS = {"relu": F.relu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def reference(a, b, bias=None, activation=None):
    """activation(a b + bias), one step at a time: every step reads and writes the whole result."""
    y = a @ b if bias is None else a @ b + bias
    return y if activation is None else ACTIVATIONS[activation](y)


@jit
def tile_of(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles are worked off column by column, then the next GROUP.

    Programs that run at the same time then share rows of A and columns of B, and find them in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = program // (GROUP * tiles_n)
    within = program % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)  # the last group may be lower
    return group * GROUP + within % height, within // height


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu, silu = x sigmoid(x), or gelu in tanh form: (1 + tanh u) / 2 = sigmoid(2 u), u = 0.798 (x + 0.0447 x^3)."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # and not maximum(x, 0), which would hide a NaN
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(tl.maximum(x, -80.0))  # the bound keeps exp(-x) finite
    elif ACTIVATION == "gelu":
        u = tl.minimum(tl.maximum(x, -10.0), 10.0)  # beyond, the gate is 0 or 1
        x = x * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    return x


@jit
def slope(x, ACTIVATION: tl.constexpr):
    """Derivative of `activate`. For relu x may be the result as well: it is positive where the input was."""
    if ACTIVATION == "relu":
        x = tl.where(x > 0, 1.0, x * 0.0)
    elif ACTIVATION == "silu":
        x = tl.maximum(x, -80.0)
        s = tl.sigmoid(x)
        x = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        x = tl.minimum(tl.maximum(x, -10.0), 10.0)
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        x = s * (1.0 + x * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return x


TILES = [  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: large products, smaller ones, few rows; then for wider numbers
    *[(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 3)],
    *[(128, 128, 64, 4, 4), (128, 128, 128, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 256, 64, 4, 4)],
    *[(64, 64, 64, 4, 4), (32, 128, 128, 4, 4), (16, 64, 128, 4, 4), (16, 128, 128, 4, 4), (16, 64, 256, 4, 3)],
    *[(128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 3), (16, 64, 32, 4, 3)],
]
IN_THE_INTERPRETER = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 2}


def configurations(tiles):
    """What autotune tries on a GPU, of what `fitting` leaves."""
    if not HAS_TRITON:
        return []
    return [config(w, s, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8) for m, n, k, w, s in tiles]


def fitting(configs, arguments, **_):
    """The configurations whose tile fits the GPU and is not mostly outside of the product."""
    a, b = [x for x in arguments.values() if isinstance(x, torch.Tensor)][:2]

    def need(c):  # bytes of shared memory: a tile of each operand for every stage of the pipeline
        m, n, k = (c.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
        return c.num_stages * k * (m * a.element_size() + n * b.element_size())

    configs = in_shared(configs, a, need)
    high, wide = (triton.next_power_of_2(arguments[size]) for size in ("m", "n"))
    lowest, highest = (0, 32) if high <= 32 else (64, high)
    configs = [c for c in configs if lowest <= c.kwargs["BLOCK_M"] <= highest] or configs
    narrowest = min(c.kwargs["BLOCK_N"] for c in configs)
    return [c for c in configs if c.kwargs["BLOCK_N"] <= max(wide, narrowest)]


_before = {}


def remember(arguments, reset_only=False):
    """Before a run of the search: keep what the kernel adds to. A result that is only written needs no copy."""
    if arguments["ADD"] and not reset_only:
        _before["C"] = arguments["C"].clone()


def restore(arguments, exception=None):
    """After it: put that back."""
    if arguments["ADD"]:
        arguments["C"].copy_(_before.pop("C"))


def tuning_key(a, b):
    """One whole number for all products that share a configuration: sizes by powers of two, and which stride is 1.

    With the exact sizes every batch of another length would start a new search.
    """
    (m, k), n = a.shape, b.shape[1]
    key = 0
    for size in (m, n, k):
        key = key * 64 + (size - 1).bit_length()
    return (key * 4 + 2 * (a.stride(1) == 1) + (b.stride(1) == 1)) * 16  # multiples of 16: one compilation serves all


@autotune(
    configurations(TILES),
    key=["tune"],
    interpret=dict(IN_THE_INTERPRETER),
    prune_configs_by={"early_config_prune": fitting},
    pre_hook=remember,  # tuning runs the kernel many times, and it may add to what C holds
    post_hook=restore,
)
@triton.heuristics({"WHOLE_K": lambda arguments: arguments["k"] % arguments["BLOCK_K"] == 0})
@jit
def _product(
    A,
    B,
    BIAS,
    C,
    PRE,
    m,
    n,
    k,
    am,
    ak,
    bk,
    bn,
    tune,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    """One tile of C = activation(A B + bias), or of C + A B: walk along k, keep the sum in registers, store it once."""
    i, j = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column = j * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns behind the edge wrap around to the start: any value will do there, and no mask slows the loop.
    a = A + (row % m).to(tl.int64)[:, None] * am + inner.to(tl.int64)[None, :] * ak
    b = B + inner.to(tl.int64)[:, None] * bk + (column % n).to(tl.int64)[None, :] * bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, k, BLOCK_K):
        if WHOLE_K:
            x, y = tl.load(a), tl.load(b)
        else:  # behind the end of k zeros, which add nothing
            x = tl.load(a, mask=inner[None, :] < k - start, other=0.0)
            y = tl.load(b, mask=inner[:, None] < k - start, other=0.0)
        acc = tl.dot(x.to(OPERAND), y.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        a += tl.cast(ak, tl.int64) * BLOCK_K
        b += tl.cast(bk, tl.int64) * BLOCK_K
    place = row.to(tl.int64)[:, None] * n + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    if BIAS is not None:
        acc += tl.load(BIAS + column, mask=column < n, other=0.0).to(ACC)[None, :]
    if PRE is not None:
        tl.store(PRE + place, acc.to(C.dtype.element_ty), mask=inside)
    if ADD:
        acc += tl.load(C + place, mask=inside, other=0.0).to(ACC)
    tl.store(C + place, activate(acc, ACTIVATION).to(C.dtype.element_ty), mask=inside)


@jit
def _through_activation(X, DY, DX, count, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy times the slope of the activation at x, element by element."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + place, mask=place < count, other=0.0).to(ACC)
    dy = tl.load(DY + place, mask=place < count, other=0.0).to(ACC)
    tl.store(DX + place, (dy * slope(x, ACTIVATION)).to(DX.dtype.element_ty), mask=place < count)


def product(a, b, bias=None, activation=None, pre=None, add_to=None):
    """Launch the kernel, inside of an operator: a (m, k) and b (k, n) of any strides; (m, n), or added to `add_to`.

    pre: contiguous tensor that receives what goes into the activation. No gradient: this is what `matmul`, its
    backward and `linear_cross_entropy` are made of.
    """
    (m, k), n = a.shape, b.shape[1]
    c = empty((m, n), like=a) if add_to is None else add_to
    if c.numel() == 0:
        return c
    _product[lambda constants: (triton.cdiv(m, constants["BLOCK_M"]) * triton.cdiv(n, constants["BLOCK_N"]),)](
        *(a, b, bias, c, pre, m, n, k, *a.stride(), *b.stride(), tuning_key(a, b)),
        ACTIVATION=activation,
        ADD=add_to is not None,
        ACC=accumulator(a.dtype),
        OPERAND=operand(a.dtype),
        PRECISION=precision(a.dtype),
    )
    return c


def _rows(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@operator(
    "(Tensor a, Tensor b, Tensor? bias, str? activation, bool keep) -> Tensor[]",
    lambda a, b, bias, activation, keep: [a.new_empty(*a.shape[:-1], b.shape[1]) for _ in range(1 + keep)],
)
def compute(a, b, bias, activation, keep):
    """The result and, if it is to be kept, what went into the activation."""
    shape = (*a.shape[:-1], b.shape[1])
    pre = [empty(shape, like=a)] if keep else []
    c = product(_rows(a), b, None if bias is None else bias.contiguous(), activation, *pre)
    return [c.view(shape), *pre]


@operator(
    "(Tensor a, Tensor b, Tensor? x, Tensor dy, str? activation, bool[] needs) -> Tensor[]",
    lambda a, b, x, dy, activation, needs: [
        a.new_empty(shape) for shape, need in zip((a.shape, b.shape, b.shape[1:]), needs, strict=True) if need
    ],
)
def differentiate(a, b, x, dy, activation, needs):
    """The gradients of a, b and the bias, those that are needed."""
    flat, dy = _rows(a), _rows(dy)
    if activation is not None and dy.numel():
        dy, dx, block = dy.contiguous(), empty(dy.shape, like=dy), 16384 if INTERPRET else 2048
        grid = (triton.cdiv(dy.numel(), block),)
        acc = accumulator(dy.dtype)
        _through_activation[grid](x, dy, dx, dy.numel(), ACTIVATION=activation, ACC=acc, BLOCK=block)
        dy = dx
    da = [product(dy, b.t()).view(a.shape)] if needs[0] else []
    db = [product(flat.t(), dy)] if needs[1] else []
    return [*da, *db, *([dy.sum(0)] if needs[2] else [])]


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(a, b, bias, activation, keep):
        return tuple(compute(a, b, bias, activation, keep))

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, _, ctx.activation, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        x = output[0] if ctx.activation == "relu" else output[1] if len(output) > 1 else None
        ctx.save_for_backward(a, b, x)  # relu: its result tells as much as its input

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return None, None, None, None, None
        needs = list(ctx.needs_input_grad[:3])
        found = differentiate(*ctx.saved_tensors, dy, ctx.activation, needs)
        return *spread(found, needs), None, None


def matmul(a, b, bias=None, activation=None):
    """activation(a b + bias) in one kernel: (..., k) times (k, n), plus (n,), then "relu", "gelu" (tanh) or "silu".

    fp32, fp16, bf16 or fp64, all alike; sums are kept in fp32 (fp64 for fp64), and fp32 is multiplied in tf32 if
    `torch.set_float32_matmul_precision` allows it. Any strides: a transposed matrix costs no copy. The leading
    dimensions of `a` become rows (a copy where they cannot be a view). Returns (..., n), contiguous.

    Backward uses the same kernel: with g = dy activation'(a b + bias), da = g b^T, db = a^T g, dbias = sum of g over
    the rows. Deterministic. Kept for it: a and b, for gelu and silu also a b + bias, (..., n); for relu the result.
    With tiles of (M, N), a is read n / N times and b m / M times; from the L2 cache where the order of the programs
    allows it. 2 m n k operations. The epilogue saves 2 m n elements of traffic for the bias and for the activation.

    Raises ValueError for sizes that do not fit, another device or dtype, or an unknown activation.
    Source: "Triton: an intermediate language and compiler for tiled neural network computations", 2019.
    """
    a, b, bias = autocast(a, b, bias)
    check("matmul", a=a, b=b, bias=bias)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"matmul: activation is {activation!r}; it must be None or {', '.join(ACTIVATIONS)}")
    if a.dim() < 1 or b.dim() != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"matmul: a {tuple(a.shape)} and b {tuple(b.shape)} must be (..., k) and (k, n)")
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"matmul: bias is {tuple(bias.shape)}; b {tuple(b.shape)} needs ({b.shape[1]},)")
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, bias))
    return _Matmul.apply(a, b, bias, activation, learns and activation in ("gelu", "silu"))[0]


class Linear(nn.Linear):
    """nn.Linear by `matmul`, with the activation that follows it: Linear(64, 256, activation="gelu").

    The same parameters and state dict as nn.Linear. Raises ValueError for an unknown activation.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, activation=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"Linear: activation is {activation!r}; it must be None or {', '.join(ACTIVATIONS)}")
        self.activation = activation

    def forward(self, x):
        return matmul(x, self.weight.t(), self.bias, self.activation)

    def extra_repr(self):
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def benchmarks():
    """What kernels/bench.py measures: squares, the two products of a feed-forward layer, few rows; then an epilogue."""
    shapes = [(1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192)]
    shapes += [(16384, 16384, 4096), (16384, 4096, 16384), (16, 16384, 4096)]
    common = {
        "sizes": [{"m": m, "n": n, "k": k} for m, n, k in shapes],
        "differentiate": (0, 1),
        "bytes": lambda s, itemsize: (s["m"] * s["k"] + s["k"] * s["n"] + s["m"] * s["n"]) * itemsize,
        "flops": lambda s: 2 * s["m"] * s["n"] * s["k"],
        "backward_bytes": lambda s, itemsize: 2 * (s["m"] * s["k"] + s["k"] * s["n"] + s["m"] * s["n"]) * itemsize,
        "backward_flops": lambda s: 4 * s["m"] * s["n"] * s["k"],
    }

    def inputs(s, dtype, device):
        draw = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
        return draw(s["m"], s["k"]), draw(s["k"], s["n"]) * s["k"] ** -0.5, draw(s["n"])

    gelu = lambda function: lambda a, b, bias: function(a, b, bias, "gelu")
    pair = lambda s, dtype, device: inputs(s, dtype, device)[:2]
    cublas = {"cuBLAS, then gelu": lambda a, b, bias: F.gelu(torch.addmm(bias, a, b), approximate="tanh")}
    plain = {"name": "matmul", "inputs": pair, "ours": matmul, "reference": reference}
    fused = {"name": "matmul_bias_gelu", "inputs": inputs, "ours": gelu(matmul), "reference": gelu(reference)}
    return [{**common, **plain, "peers": {"cuBLAS": torch.matmul}}, {**common, **fused, "peers": cublas}]
