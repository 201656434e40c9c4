"""The sum of two tensors: the smallest kernel that is worth writing, and the pattern of all the others."""

import torch

from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton


def reference(x, y):
    """x + y in plain torch, for two tensors of one shape."""
    return x + y


# An elementwise kernel reuses nothing, so all that matters is that enough bytes are under way at any time: each
# thread should load 16 bytes at once, twice or more. The search is repeated for each power of two, not each size.
@autotune(
    [config(BLOCK=1024, num_warps=4), config(BLOCK=2048, num_warps=8), config(BLOCK=4096, num_warps=8)],
    key=["magnitude"],
    interpret={"BLOCK": 65536},
)
@jit(do_not_specialize=["magnitude"])
def _add(x_ptr, y_ptr, out_ptr, size, magnitude, ACC: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK  # 64 bits: a tensor may have more than 2**31 elements
    at = tl.arange(0, BLOCK)
    mask = at < size - start  # only the last program has anything to mask
    x = tl.load(x_ptr + start + at, mask=mask).to(ACC)
    y = tl.load(y_ptr + start + at, mask=mask).to(ACC)
    tl.store(out_ptr + start + at, (x + y).to(out_ptr.dtype.element_ty), mask=mask)


@operator("(Tensor x, Tensor y) -> Tensor", lambda x, y: x.new_empty(x.shape))
def compute(x, y):
    x, y = x.contiguous(), y.contiguous()
    out = empty(x.shape, like=x)
    size = x.numel()
    if size:
        grid = lambda meta: (triton.cdiv(size, meta["BLOCK"]),)
        _add[grid](x, y, out, size, size.bit_length(), ACC=accumulator(x.dtype))
    return out


class _VectorAdd(torch.autograd.Function):
    @staticmethod
    def forward(x, y):
        return compute(x, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # the gradient needs nothing

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


def vector_add(x, y):
    """The elementwise sum x + y of two tensors of one shape and dtype.

    x, y: any shape, float32, float16, bfloat16 or float64; what is not contiguous is copied first. The sum is taken in
    float32 (float64 for float64) and rounded once. The gradient of both is the gradient of the sum itself: nothing is
    stored for the backward pass and nothing is computed there. Traffic: 3 times the bytes of x (two reads, one write)
    for one addition per element, so memory bandwidth alone decides the time.

    Raises ValueError for tensors of different shape, dtype or device, or on a device where the kernels do not run.
    """
    check("vector_add", x=x, y=y)
    if x.shape != y.shape:
        raise ValueError(f"vector_add: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; they must be equal")
    return _VectorAdd.apply(x, y)


def benchmarks():
    return [
        {
            "name": "vector_add",
            "sizes": [{"elements": 2**power} for power in (16, 20, 24, 26, 28, 30)],
            "inputs": lambda size, dtype, device: tuple(torch.randn(2, size["elements"], dtype=dtype, device=device)),
            "ours": vector_add,
            "reference": reference,
            "peers": {},
            "differentiate": (),
            "bytes": lambda size, itemsize: 3 * size["elements"] * itemsize,
            "flops": None,
        }
    ]
