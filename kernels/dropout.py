"""Dropout whose mask is never stored: the backward pass draws the same random numbers again from the same seed."""

import torch
from torch import nn

from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton

ROUNDS = 7  # of Philox; Triton's default is 10, and 7 already pass every known statistical test at less arithmetic
SLICES = 8  # elements that share one draw: a draw makes four words of 32 bits, and an element needs 16 bits


def _philox(seed, counter):
    """The four 32-bit words that Philox makes from a seed and a tensor of counters, as int64: (4, *counter.shape)."""
    low = 0xFFFFFFFF
    c = [counter.long() & low, counter.long() >> 32, torch.zeros_like(counter).long(), torch.zeros_like(counter).long()]
    key = [seed & low, seed >> 32 & low]
    for _ in range(ROUNDS):
        # the upper halves of the 64-bit products mix, the lower halves stay
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & low) ^ c[1] ^ key[0], b & low, (a >> 32 & low) ^ c[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return torch.stack(c)


def _layout(size):
    """Elements of a slice: the tensor is cut into 8 of them, each a multiple of 16 so that loads are aligned."""
    return 16 * triton.cdiv(size, 16 * SLICES)


def reference(x, p, seed):
    """The same dropout in plain torch, with the same mask: element i of slice s keeps if its 16 bits say so."""
    if p == 1:
        return x * 0
    length = _layout(x.numel())
    words = _philox(seed, torch.arange(length, device=x.device))  # (4, length)
    halves = torch.stack([words & 0xFFFF, words >> 16], 1)  # (4, 2, length), one row for each slice
    keep = halves.flatten()[: x.numel()].view(x.shape) >= round(p * 65536)
    return torch.where(keep, x * (1 / (1 - p)), 0)


@autotune(
    [config(BLOCK=512, num_warps=4), config(BLOCK=1024, num_warps=4), config(BLOCK=1024, num_warps=8)],
    key=["magnitude"],
    interpret={"BLOCK": 16384},
)
@jit(do_not_specialize=["seed", "magnitude"])
def _dropout(
    x_ptr, out_ptr, size, length, seed, threshold, scale, magnitude,
    ROUNDS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.randint4x(seed, at, ROUNDS)
    for s in tl.static_range(8):
        mask = (at < length) & (at < size)  # not into the next slice, and not behind the tensor
        bits = (words[s // 2].to(tl.uint32, bitcast=True) >> 16 * (s % 2)) & 0xFFFF
        x = tl.load(x_ptr + at, mask=mask).to(ACC)
        y = tl.where(bits.to(tl.int32) >= threshold, x * scale, 0.0)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
        x_ptr += length
        out_ptr += length
        size -= length


@operator("(Tensor x, float p, int seed) -> Tensor", lambda x, p, seed: x.new_empty(x.shape))
def compute(x, p, seed):
    x = x.contiguous()
    if p == 1:
        return torch.zeros_like(x)
    out, size = empty(x.shape, like=x), x.numel()
    if size:
        length = _layout(size)
        grid = lambda meta: (triton.cdiv(length, meta["BLOCK"]),)
        acc, threshold = accumulator(x.dtype), round(p * 65536)
        _dropout[grid](x, out, size, length, seed, threshold, 1 / (1 - p), size.bit_length(), ROUNDS=ROUNDS, ACC=acc)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed):
        return compute(x, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx, grad):
        return _Dropout.apply(grad, ctx.p, ctx.seed), None, None  # dropout is linear: its gradient is dropout again


def dropout(x, p, seed):
    """Each element of x is set to 0 with probability p and otherwise multiplied by 1 / (1 - p), so the mean stays.

    x: any shape, float32, float16, bfloat16 or float64; what is not contiguous is copied first. p: from 0 to 1, used as
    a multiple of 2**-16. seed: a whole number from 0 to 2**63 - 1; the same seed and number of elements give the same
    mask, whatever the shape, dtype, block size or machine. The mask comes from Philox (`tl.randint4x`) and is never
    stored: the backward pass stores two numbers and draws it again. Traffic: 2 times the bytes of x, forward and
    backward.

    Raises ValueError for p or seed out of range and for more than 2**34 elements.
    Source: "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; "Dropout", 2014.
    """
    check("dropout", x=x)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is a probability, from 0 to 1; got {p}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"dropout: the seed is a whole number from 0 to 2**63 - 1; got {seed!r}")
    if x.numel() > 2**34:
        raise ValueError(f"dropout: x has {x.numel()} elements; the counters reach 2**34")
    return _Dropout.apply(x, p, seed)


class Dropout(nn.Dropout):
    """`dropout` as a module in the place of nn.Dropout; each call takes its seed from torch's generator of the CPU.

    So torch.manual_seed makes a run repeatable, and torch.utils.checkpoint draws the same mask when it recomputes.
    Raises ValueError for p outside 0 .. 1 (when made) and for inplace=True.
    """

    def forward(self, x):
        if self.inplace:
            raise ValueError("Dropout: the kernel has no in-place form; got inplace=True")
        return dropout(x, self.p, int(torch.randint(2**62, ()))) if self.training and self.p else x


def benchmarks():
    return [
        {
            "name": "dropout",
            "sizes": [{"elements": 2**power} for power in (20, 24, 26, 28, 30)],
            "inputs": lambda size, dtype, device: (torch.randn(size["elements"], dtype=dtype, device=device), 0.1, 7),
            "ours": dropout,
            "reference": reference,
            "eager": lambda x, p, seed: nn.functional.dropout(x, p),  # what one would run: another mask, equal work
            "peers": {},
            "differentiate": (0,),
            "bytes": lambda size, itemsize: 2 * size["elements"] * itemsize,
            "flops": None,
            "backward_bytes": lambda size, itemsize: 2 * size["elements"] * itemsize,
            "backward_flops": None,
        }
    ]
