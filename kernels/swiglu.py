"""SwiGLU, silu(gate) * up, in one pass forward and one backward; nothing but the two inputs is kept."""

import torch
import torch.nn.functional as F
from torch import nn

from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton


def reference(gate, up):
    """silu(gate) * up in plain torch."""
    return F.silu(gate) * up


# One axis of programs for all rows, since only the first axis of a GPU's grid is long enough: program i takes block
# i % blocks of row i // blocks. Contiguous tensors are one long row.
CONFIGS = [config(BLOCK=1024, num_warps=4), config(BLOCK=2048, num_warps=8), config(BLOCK=4096, num_warps=8)]


@autotune(CONFIGS, key=["magnitude"], interpret={"BLOCK": 16384})
@jit(do_not_specialize=["magnitude"])
def _forward(gate_ptr, up_ptr, out_ptr, gate_row, up_row, columns, magnitude, ACC: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < columns - start
    gate = tl.load(gate_ptr + (row * gate_row + start) + at, mask=mask).to(ACC)
    up = tl.load(up_ptr + (row * up_row + start) + at, mask=mask).to(ACC)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + (row * columns + start) + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@autotune(CONFIGS, key=["magnitude"], interpret={"BLOCK": 16384})
@jit(do_not_specialize=["magnitude"])
def _backward(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, gate_row, up_row, columns, magnitude,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < columns - start
    grad = tl.load(grad_ptr + (row * columns + start) + at, mask=mask).to(ACC)
    gate = tl.load(gate_ptr + (row * gate_row + start) + at, mask=mask).to(ACC)
    up = tl.load(up_ptr + (row * up_row + start) + at, mask=mask).to(ACC)
    share = tl.sigmoid(gate)
    grad_up = grad * gate * share
    grad_gate = grad * up * share * (1 + gate * (1 - share))
    tl.store(grad_gate_ptr + (row * columns + start) + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + (row * columns + start) + at, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)


def _rows(gate, up):
    """Both as (rows, columns) with neighbors side by side, without a copy where the strides allow it."""
    if gate.is_contiguous() and up.is_contiguous():
        return gate.view(1, -1), up.view(1, -1)
    columns = gate.shape[-1] if gate.dim() else 1
    pair = [x.reshape(-1, columns) for x in (gate, up)]
    return [x if columns == 1 or x.stride(1) == 1 else x.contiguous() for x in pair]


def _launch(kernel, gate, up, read, written):
    """Run a kernel whose other tensors, all contiguous, stand before (read) and behind (written) the two inputs."""
    (rows, columns), count = gate.shape, gate.numel()
    grid = lambda meta: (rows * triton.cdiv(columns, meta["BLOCK"]),)
    strides = gate.stride(0), up.stride(0)
    kernel[grid](*read, gate, up, *written, *strides, columns, count.bit_length(), ACC=accumulator(gate.dtype))


@operator("(Tensor gate, Tensor up) -> Tensor", lambda gate, up: gate.new_empty(gate.shape))
def compute(gate, up):
    out = empty(gate.shape, like=gate)
    if out.numel():
        _launch(_forward, *_rows(gate, up), [], [out])
    return out


@operator(
    "(Tensor gate, Tensor up, Tensor grad) -> (Tensor, Tensor)",
    lambda gate, up, grad: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
def differentiate(gate, up, grad):
    grads = empty(gate.shape, like=gate), empty(gate.shape, like=gate)
    if grad.numel():
        _launch(_backward, *_rows(gate, up), [grad.contiguous()], grads)
    return grads


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate, up):
        return compute(gate, up)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return differentiate(*ctx.saved_tensors, grad)


def swiglu(gate, up):
    """silu(gate) * up = gate * sigmoid(gate) * up, elementwise, computed in float32 and rounded once.

    gate, up: (..., columns) of one shape and dtype: float32, float16, bfloat16 or float64. Rows may lie apart, as in
    the two halves of one projection, `swiglu(*x.chunk(2, -1))`; other layouts are copied first. Kept for the backward
    pass: the two inputs, no activation (torch also keeps silu(gate)). With s = sigmoid(gate) that pass computes
    d_up = g gate s and d_gate = g up s (1 + gate (1 - s)). Traffic, in tensors: 3 forward (torch: 5), 5 backward
    (torch: 9). A second derivative is not available.

    Raises ValueError for different shapes, dtypes or devices.
    Source: "GLU Variants Improve Transformer", 2020.
    """
    check("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; they must be equal")
    return _SwiGLU.apply(gate, up)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x) for the feed-forward slot: (..., d) -> (..., d).

    Parameters are named as in chapter 07's `GatedFeedForward` and a state dict of one loads into the other. hidden
    defaults to 8/3 of the width, for which three matrices weigh as much as the two of a plain feed-forward of 4 d.
    """

    def __init__(self, width, hidden=None, bias=True):
        super().__init__()
        hidden = hidden or round(8 * width / 3)
        self.gate, self.up = (nn.Linear(width, hidden, bias) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x):
        return self.down(swiglu(self.gate(x), self.up(x)))


def benchmarks():
    return [
        {
            "name": "swiglu",
            "sizes": [{"rows": r, "columns": c} for r, c in ((512, 4096), (4096, 8192), (8192, 11008), (16384, 14336))],
            "inputs": lambda s, dtype, device: tuple(
                torch.randn(2, s["rows"], s["columns"], dtype=dtype, device=device)
            ),
            "ours": swiglu,
            "reference": reference,
            "peers": {},
            "differentiate": (0, 1),
            "bytes": lambda size, itemsize: 3 * size["rows"] * size["columns"] * itemsize,
            "flops": None,
            "backward_bytes": lambda size, itemsize: 5 * size["rows"] * size["columns"] * itemsize,
            "backward_flops": None,
        }
    ]
