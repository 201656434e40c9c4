"""Rotary positions: planes of two features turned by an angle, in both pairings, read once and written once."""

import math
from functools import partial

import torch

from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton


def reference(x, cos, sin, pairs=False):
    """The rotation in plain torch: (a, b) becomes (a cos - b sin, a sin + b cos) in every plane."""
    c = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = (x[..., 0 : 2 * c : 2], x[..., 1 : 2 * c : 2]) if pairs else (x[..., :c], x[..., c : 2 * c])
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([a, b], -1).flatten(-2) if pairs else torch.cat([a, b], -1)
    return torch.cat([turned, x[..., 2 * c :]], -1)


# A program takes BLOCK tokens of HEADS heads, so that the tables are read once for several heads: they are small, but
# read again for each head they would cost as much of the cache's bandwidth as x costs of the memory's.
@autotune(
    [
        config(BLOCK=block, HEADS=heads, num_warps=warps)
        for block, heads, warps in ((8, 4, 4), (16, 2, 4), (16, 4, 4), (32, 2, 4), (32, 4, 8))
    ],
    key=["magnitude", "C", "PAIRS"],
    interpret={"BLOCK": 512, "HEADS": 2},
)
@jit(do_not_specialize=["magnitude"])
def _turn(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, tokens,
    x_b, x_h, x_n, x_e, cos_b, cos_h, cos_n, cos_c, sin_b, sin_h, sin_n, sin_c, out_b, out_h, out_n, magnitude,
    C: tl.constexpr, REST: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr, SHARED: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr, REST_WIDE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # one axis of programs: blocks of tokens, then groups of heads, then the batch
    blocks, groups = tl.cdiv(tokens, BLOCK), tl.cdiv(heads, HEADS)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    head = (tl.program_id(0) // blocks % groups).to(tl.int64) * HEADS
    batch = (tl.program_id(0) // blocks // groups).to(tl.int64)
    row, plane, rest = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDE)[None, :], tl.arange(0, REST_WIDE)[None, :]
    row, plane, rest = row.to(tl.int64), plane.to(tl.int64), rest.to(tl.int64)  # strides may be as large as tensors
    x_h, out_h = tl.cast(x_h, tl.int64), tl.cast(out_h, tl.int64)
    cos_h, sin_h = tl.cast(cos_h, tl.int64), tl.cast(sin_h, tl.int64)
    here = row < tokens - start
    x_ptr += batch * x_b + head * x_h + start * x_n
    out_ptr += batch * out_b + head * out_h + start * out_n
    cos_ptr += batch * cos_b + head * cos_h + start * cos_n
    sin_ptr += batch * sin_b + head * sin_h + start * sin_n
    cos_at, sin_at = row * cos_n + plane * cos_c, row * sin_n + plane * sin_c
    if SHARED:
        cos = tl.load(cos_ptr + cos_at, mask=here & (plane < C)).to(ACC)
        sin = tl.load(sin_ptr + sin_at, mask=here & (plane < C)).to(ACC)
    for i in tl.static_range(HEADS):
        there = row < tl.where(head + i < heads, tokens - start, 0)  # a head behind the last has no tokens
        if not SHARED:
            cos = tl.load(cos_ptr + i * cos_h + cos_at, mask=there & (plane < C)).to(ACC)
            sin = tl.load(sin_ptr + i * sin_h + sin_at, mask=there & (plane < C)).to(ACC)
        turn = -sin if BACK else sin  # the backward pass turns by minus the angle
        x, out = x_ptr + i * x_h + row * x_n, out_ptr + i * out_h + row * out_n
        if PAIRS:  # neighbors are loaded together and parted in registers
            both = tl.arange(0, 2 * WIDE)[None, :].to(tl.int64)
            mask = there & (both < 2 * C)
            pair = tl.load(x + both * x_e, mask=mask).to(ACC)
            a, b = tl.split(tl.reshape(pair, (BLOCK, WIDE, 2)))
            turned = tl.reshape(tl.join(a * cos - b * turn, a * turn + b * cos), (BLOCK, 2 * WIDE))
            tl.store(out + both, turned.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            mask = there & (plane < C)
            a = tl.load(x + plane * x_e, mask=mask).to(ACC)
            b = tl.load(x + (C + plane) * x_e, mask=mask).to(ACC)
            tl.store(out + plane, (a * cos - b * turn).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out + C + plane, (a * turn + b * cos).to(out_ptr.dtype.element_ty), mask=mask)
        if REST:  # features beyond the planes pass through
            mask = there & (rest < REST)
            tl.store(out + 2 * C + rest, tl.load(x + (2 * C + rest) * x_e, mask=mask), mask=mask)


def _four(x, lead):
    """x with its leading axes broadcast to `lead` and made two: (b, h, n, e), a view where the strides allow it."""
    x = x.expand(*lead, *x.shape[-2:])
    return x[(None,) * (2 - len(lead))] if len(lead) < 3 else x.reshape(-1, *x.shape[-3:])


@operator(
    "(Tensor x, Tensor cos, Tensor sin, bool pairs, bool back) -> Tensor",
    lambda x, cos, sin, pairs, back: x.new_empty(x.shape),
)
def compute(x, cos, sin, pairs, back):
    out = empty(x.shape, like=x)
    if not out.numel():
        return out
    shape, c, rest = x.shape, cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    x, cos, sin, flat = (_four(t, shape[:-2]) for t in (x, cos, sin, out))
    batch, heads, tokens, _ = x.shape
    strides = *x.stride(), *cos.stride(), *sin.stride(), *flat.stride()[:3]
    grid = lambda meta: (batch * triton.cdiv(heads, meta["HEADS"]) * triton.cdiv(tokens, meta["BLOCK"]),)
    _turn[grid](
        x, cos, sin, flat, heads, tokens, *strides, x.numel().bit_length(),
        C=c, REST=rest, PAIRS=pairs, BACK=back, SHARED=cos.stride(1) == sin.stride(1) == 0 or heads == 1,
        ACC=accumulator(x.dtype), WIDE=triton.next_power_of_2(max(c, 1)),
        REST_WIDE=triton.next_power_of_2(max(rest, 1)),
    )  # fmt: skip
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(x, cos, sin, pairs):
        return compute(x, cos, sin, pairs, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cos, sin, ctx.pairs = inputs
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(cos, sin, x if learned else None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin, x = ctx.saved_tensors
        grad_x = compute(grad, cos, sin, ctx.pairs, True) if ctx.needs_input_grad[0] else None
        if x is None:
            return grad_x, None, None, None
        c = cos.shape[-1]  # learned angles are rare: their gradient is left to torch
        parts = (slice(0, 2 * c, 2), slice(1, 2 * c, 2)) if ctx.pairs else (slice(c), slice(c, 2 * c))
        a, b, grad_a, grad_b = (t[..., part].to(cos.dtype) for t in (x, grad) for part in parts)
        grad_cos, grad_sin = grad_a * a + grad_b * b, grad_b * a - grad_a * b
        return grad_x, grad_cos.sum_to_size(cos.shape), grad_sin.sum_to_size(sin.shape), None


def rotary(x, cos, sin, pairs=False):
    """Turn plane j of every token by its angle: (a, b) becomes (a cos - b sin, a sin + b cos).

    x: (..., n, e), any strides. cos, sin: (..., n, c) with 2 c <= e, their leading axes broadcast to those of x;
    float32 tables serve x of any dtype, and products are taken in float32. Features from 2 c on pass through.
    pairs=False takes features j and j + c as plane j (Llama, GPT-NeoX), pairs=True features 2j and 2j + 1 (the paper,
    GPT-J). The result is contiguous. Kept for the backward pass: the tables alone, since the gradient of a rotation is
    the rotation by minus the angle (x too when the tables need gradients). Traffic: 2 times the bytes of x and the
    tables once for each group of heads, forward and backward. With more than two leading axes whose strides do not
    combine, x is copied. A second derivative is not available.

    Raises ValueError for tables that do not fit x or each other, and for dtypes and devices without a kernel.
    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    check("rotary", x=x)
    check("rotary", cos=cos, sin=sin)
    if cos.shape != sin.shape:
        raise ValueError(f"rotary: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; they must be equal")
    if x.dim() < 2 or cos.dim() < 2 or cos.shape[-2] != x.shape[-2] or 2 * cos.shape[-1] > x.shape[-1]:
        got = f"{tuple(x.shape)} and {tuple(cos.shape)}"
        raise ValueError(f"rotary: x ends in (n, e) and the tables in (n, c) with 2 c <= e; got {got}")
    have, want = cos.shape[:-2], x.shape[:-2]
    if len(have) > len(want) or any(h not in (1, w) for h, w in zip(have[::-1], want[::-1], strict=False)):
        raise ValueError(f"rotary: the tables {tuple(cos.shape)} do not broadcast to x {tuple(x.shape)}")
    return _Rotary.apply(x, cos, sin, pairs)


def rotate_halves(x, angle):
    """`rotary` with the signature of chapter 03's `rotate_halves`: x (..., n, e), angle (..., n, c) in radians."""
    return rotary(x, angle.cos(), angle.sin())


def rotate_pairs(x, angle):
    """`rotary` with the signature of chapter 03's `rotate_pairs`: features 2j and 2j + 1 make a plane."""
    return rotary(x, angle.cos(), angle.sin(), pairs=True)


def _inputs(size, dtype, device, pairs):
    b, h, n, e = (size[name] for name in ("batch", "heads", "tokens", "head_width"))
    x = torch.randn(b, n, h, e, dtype=dtype, device=device).transpose(1, 2)  # as it comes from a projection
    angle = torch.arange(n, device=device)[:, None] * 10000 ** (-torch.arange(0, e, 2, device=device) / e)
    return x, angle.cos(), angle.sin(), pairs


def benchmarks():
    count = lambda size, itemsize: 2 * math.prod(size.values()) * itemsize
    shapes = ((1, 32, 2048, 128), (4, 32, 4096, 128), (8, 32, 8192, 128))
    return [
        {
            "name": f"rotary_{name}",
            "sizes": [dict(zip(("batch", "heads", "tokens", "head_width"), s, strict=True)) for s in shapes],
            "inputs": partial(_inputs, pairs=name == "pairs"),
            "ours": rotary,
            "reference": reference,
            "peers": {},
            "differentiate": (0,),
            "bytes": count,
            "flops": None,
            "backward_bytes": count,
            "backward_flops": None,
        }
        for name in ("halves", "pairs")
    ]
