"""Attention on packed sequences: no padding is stored, read or multiplied, and no sequence sees another."""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._runtime import (
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
    readable,
    tl,
    triton,
    wide,
)

LOG2E = math.log2(math.e)  # exp(x) = exp2(x LOG2E), and exp2 is what the hardware has


def reference(q, k, v, offsets, max_length, causal=False, scale=None):
    """The same in plain torch: one sequence after another. Arguments and result as for `varlen_attention`."""
    parts = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        heads = [x[begin:end].transpose(0, 1) for x in (q, k, v)]  # (h, n, e)
        heads[1:] = [x.repeat_interleave(q.shape[1] // x.shape[0], 0) for x in heads[1:]]
        scores = heads[0] @ heads[1].transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        parts.append((scores.softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(parts) if parts else torch.empty_like(q)


@jit
def _rows(base, first, stride, limit, e, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """A tile (BLOCK, BLOCK_E): rows from `first` (64 bits), of which `limit` exist. Only what needs a mask has one."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    at = base + first * stride + row[:, None] * stride + column[None]
    if MASKED:
        return tl.load(at, mask=(row[:, None] < limit) & (column[None] < e), other=0.0)
    elif WIDE:  # the tile is wider than a head
        return tl.load(at, mask=column[None] < e, other=0.0)
    else:
        return tl.load(at)


@jit
def _spoil(base, begin, first, n, stride, e, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """NaN in the rows first .. n - 1 of a sequence that begins at row `begin`."""
    for start in range(first, n, BLOCK):
        row, column = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
        at = base + (begin + row[:, None]) * stride + column[None]
        nothing = tl.full((BLOCK, BLOCK_E), float("nan"), base.dtype.element_ty)
        tl.store(at, nothing, (row[:, None] < n) & (column[None] < e))


def _tiles(tiles):
    """Configurations from (M, N, num_warps, num_stages), the last of them for products without tensor cores."""
    return [config(M=m, N=n, num_warps=w, num_stages=s) for m, n, w, s in (*tiles, (32, 32, 8, 1))]


def _that_fit(configs, arguments, OPERAND, PRECISION, BLOCK_E, **others):
    """Those whose tiles fit into shared memory: the held one and for each stage two of the other kind.

    Exact float32 multiplies in registers, with every product of a tile written out: large tiles would spill.
    """
    if OPERAND == tl.float32 and PRECISION == "ieee":
        return configs[-1:]
    q, keys_held = arguments["q"], "dk" in arguments

    def need(c):
        held, moved = (c.kwargs["N"], c.kwargs["M"]) if keys_held else (c.kwargs["M"], c.kwargs["N"])
        return (2 * held + 2 * c.num_stages * moved) * BLOCK_E * q.element_size()

    return in_shared(configs, q, need)


CHOICE = {"key": ["e", "bucket", "CAUSAL"], "interpret": {"M": 64, "N": 64}, "prune_configs_by": {
    "early_config_prune": _that_fit}}  # fmt: skip


@jit
def _scan_keys(acc, total, top, q, k, v, begin, n, row, low, high, stride_k, stride_v, e, scale,
               M: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
               CAUSAL: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over the keys low .. high: running sums, their total, and the largest score so far."""
    for start in range(low, high, N):
        tile_k = _rows(k, begin + start, stride_k, n - start, e, N, BLOCK_E, WIDE, MASKED).to(OPERAND)
        scores = tl.dot(q, tl.trans(tile_k), input_precision=PRECISION, out_dtype=ACC) * scale
        if MASKED:
            key = start + tl.arange(0, N)
            seen = key[None] < n
            if CAUSAL:
                seen = seen & (key[None] <= row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weights, 1)
        tile_v = _rows(v, begin + start, stride_v, n - start, e, N, BLOCK_E, WIDE, MASKED).to(OPERAND)
        acc = acc * shrink[:, None] + tl.dot(weights.to(OPERAND), tile_v, input_precision=PRECISION, out_dtype=ACC)
        top = new
    return acc, total, top


# Programs lie in a line, the blocks of a sequence side by side (they share its keys in the cache): as many blocks for
# each sequence as the longest needs. What lies behind a sequence's end returns at once and costs next to nothing.
@autotune(_tiles([(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 4)]), **CHOICE)
@jit
def _forward(q, k, v, out, lse, offsets, tokens, blocks_of, bucket, e, scale, stride_q, head_q, stride_k, head_k,
             stride_v, head_v, stride_o, head_o, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
             BLOCK_E: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr,
             OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(blocks_of, M)
    sequence, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    if CAUSAL:
        block = blocks - 1 - block  # the longest work first
    begin = tl.load(offsets + sequence).to(tl.int64)
    n = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    if block == blocks - 1:  # a sequence longer than max_length says: NaN, and never what lay in memory
        _spoil(out + head * head_o, begin, blocks * M, n, stride_o, e, M, BLOCK_E)
        _spoil(lse + head * tokens, begin, blocks * M, n, 1, 1, M, 1)
    start = block * M
    if start < n:
        row = start + tl.arange(0, M)
        q += head * head_q
        k += head // GROUP * head_k
        v += head // GROUP * head_v
        tile_q = _rows(q, begin + start, stride_q, n - start, e, M, BLOCK_E, WIDE, True).to(OPERAND)
        acc = tl.zeros((M, BLOCK_E), ACC)
        total, top = tl.zeros((M,), ACC), tl.full((M,), float("-inf"), ACC)
        end = tl.minimum(start + M, n) if CAUSAL else n
        full = (start + 1) // N * N if CAUSAL else n // N * N  # every row sees the keys before
        acc, total, top = _scan_keys(acc, total, top, tile_q, k, v, begin, n, row, 0, full, stride_k, stride_v, e,
                                     scale, M, N, BLOCK_E, WIDE, False, CAUSAL, ACC, OPERAND, PRECISION)  # fmt: skip
        acc, total, top = _scan_keys(acc, total, top, tile_q, k, v, begin, n, row, full, end, stride_k, stride_v, e,
                                     scale, M, N, BLOCK_E, WIDE, True, CAUSAL, ACC, OPERAND, PRECISION)  # fmt: skip
        here, column = tl.arange(0, M), tl.arange(0, BLOCK_E)
        out += head * head_o + (begin + start) * stride_o
        keep = (row[:, None] < n) & (column[None] < e)
        tl.store(out + here[:, None] * stride_o + column[None], (acc / total[:, None]).to(out.dtype.element_ty), keep)
        tl.store(lse + head * tokens + begin + row, top + tl.log2(total), row < n)


@jit
def _delta(out, grad, delta, tokens, e, stride_o, head_o, stride_g, head_g, R: tl.constexpr,
           BLOCK_E: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """sum over the width of out * grad, for each token and head: what the softmax subtracts in its gradient."""
    first, head = tl.program_id(0).to(tl.int64) * R, tl.program_id(1).to(tl.int64)
    x = _rows(out + head * head_o, first, stride_o, tokens - first, e, R, BLOCK_E, True, True).to(ACC)
    g = _rows(grad + head * head_g, first, stride_g, tokens - first, e, R, BLOCK_E, True, True).to(ACC)
    row = first + tl.arange(0, R)
    tl.store(delta + head * tokens + row, tl.sum(x * g, 1), row < tokens)


@jit
def _scan_for_dq(dq, q, grad, lse, delta, k, v, begin, n, row, low, high, stride_k, stride_v, e, scale,
                 N: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
                 CAUSAL: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    for start in range(low, high, N):
        tile_k = _rows(k, begin + start, stride_k, n - start, e, N, BLOCK_E, WIDE, MASKED).to(OPERAND)
        tile_v = _rows(v, begin + start, stride_v, n - start, e, N, BLOCK_E, WIDE, MASKED).to(OPERAND)
        scores = tl.dot(q, tl.trans(tile_k), input_precision=PRECISION, out_dtype=ACC) * scale
        if MASKED:
            key = start + tl.arange(0, N)
            seen = key[None] < n
            if CAUSAL:
                seen = seen & (key[None] <= row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores - lse[:, None])
        wanted = tl.dot(grad, tl.trans(tile_v), input_precision=PRECISION, out_dtype=ACC)
        ds = weights * (wanted - delta[:, None])
        dq += tl.dot(ds.to(OPERAND), tile_k, input_precision=PRECISION, out_dtype=ACC)
    return dq


@autotune(_tiles([(128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3)]), **CHOICE)
@jit
def _backward_q(q, k, v, grad, dq, lse, delta, offsets, tokens, blocks_of, bucket, e, scale, log_scale,
                stride_q, head_q, stride_k, head_k, stride_v, head_v, stride_g, head_g, stride_d, head_d,
                GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
                CAUSAL: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq of one block of queries: the forward's walk over the keys, with the weights recomputed from lse."""
    blocks = tl.cdiv(blocks_of, M)
    sequence, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    if CAUSAL:
        block = blocks - 1 - block
    begin = tl.load(offsets + sequence).to(tl.int64)
    n = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    if block == blocks - 1:
        _spoil(dq + head * head_d, begin, blocks * M, n, stride_d, e, M, BLOCK_E)
    start = block * M
    if start < n:
        row, here, column = start + tl.arange(0, M), tl.arange(0, M), tl.arange(0, BLOCK_E)
        k += head // GROUP * head_k
        v += head // GROUP * head_v
        first, left = begin + start, n - start
        tile_q = _rows(q + head * head_q, first, stride_q, left, e, M, BLOCK_E, WIDE, True).to(OPERAND)
        tile_g = _rows(grad + head * head_g, first, stride_g, left, e, M, BLOCK_E, WIDE, True).to(OPERAND)
        place = head * tokens + begin + row
        row_lse = tl.load(lse + place, mask=row < n, other=float("inf"))  # weights of zero for rows that are not there
        row_delta = tl.load(delta + place, mask=row < n, other=0.0)
        dq_tile = tl.zeros((M, BLOCK_E), ACC)
        end = tl.minimum(start + M, n) if CAUSAL else n
        full = (start + 1) // N * N if CAUSAL else n // N * N
        dq_tile = _scan_for_dq(dq_tile, tile_q, tile_g, row_lse, row_delta, k, v, begin, n, row, 0, full, stride_k,
                               stride_v, e, log_scale, N, BLOCK_E, WIDE, False, CAUSAL, ACC, OPERAND,
                               PRECISION)  # fmt: skip
        dq_tile = _scan_for_dq(dq_tile, tile_q, tile_g, row_lse, row_delta, k, v, begin, n, row, full, end, stride_k,
                               stride_v, e, log_scale, N, BLOCK_E, WIDE, True, CAUSAL, ACC, OPERAND,
                               PRECISION)  # fmt: skip
        keep = (row[:, None] < n) & (column[None] < e)
        at = dq + head * head_d + first * stride_d + here[:, None] * stride_d + column[None]
        tl.store(at, (dq_tile * scale).to(dq.dtype.element_ty), keep)


@jit
def _scan_for_dkv(dk, dv, k, v, q, grad, lse, delta, begin, n, key, low, high, stride_q, stride_g, e, scale,
                  M: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
                  CAUSAL: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Over the queries low .. high, everything transposed: keys down, queries across."""
    for start in range(low, high, M):
        tile_q = _rows(q, begin + start, stride_q, n - start, e, M, BLOCK_E, WIDE, MASKED).to(OPERAND)
        tile_g = _rows(grad, begin + start, stride_g, n - start, e, M, BLOCK_E, WIDE, MASKED).to(OPERAND)
        row = start + tl.arange(0, M)
        row_lse = tl.load(lse + begin + row, mask=row < n, other=float("inf"))
        row_delta = tl.load(delta + begin + row, mask=row < n, other=0.0)
        scores = tl.dot(k, tl.trans(tile_q), input_precision=PRECISION, out_dtype=ACC) * scale
        weights = tl.exp2(scores - row_lse[None])
        if MASKED:
            seen = (key[:, None] < n) & (row[None] < n)
            if CAUSAL:
                seen = seen & (key[:, None] <= row[None])
            weights = tl.where(seen, weights, 0.0)
        dv += tl.dot(weights.to(OPERAND), tile_g, input_precision=PRECISION, out_dtype=ACC)
        wanted = tl.dot(v, tl.trans(tile_g), input_precision=PRECISION, out_dtype=ACC)
        ds = weights * (wanted - row_delta[None])
        dk += tl.dot(ds.to(OPERAND), tile_q, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@autotune(_tiles([(64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 2), (32, 64, 4, 2)]), **CHOICE)
@jit
def _backward_kv(q, k, v, grad, dk, dv, lse, delta, offsets, tokens, blocks_of, bucket, e, scale, log_scale,
                 stride_q, head_q, stride_k, head_k, stride_v, head_v, stride_g, head_g, stride_d, head_d,
                 GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
                 CAUSAL: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk and dv of one block of keys: over all queries that see it, of every head in the group, in a fixed order."""
    blocks = tl.cdiv(blocks_of, N)
    sequence, block, head = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1).to(tl.int64)
    begin = tl.load(offsets + sequence).to(tl.int64)
    n = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    if block == blocks - 1:
        _spoil(dk + head * head_d, begin, blocks * N, n, stride_d, e, N, BLOCK_E)
        _spoil(dv + head * head_d, begin, blocks * N, n, stride_d, e, N, BLOCK_E)
    start = block * N
    if start < n:
        key, here, column = start + tl.arange(0, N), tl.arange(0, N), tl.arange(0, BLOCK_E)
        first, left = begin + start, n - start
        tile_k = _rows(k + head * head_k, first, stride_k, left, e, N, BLOCK_E, WIDE, True).to(OPERAND)
        tile_v = _rows(v + head * head_v, first, stride_v, left, e, N, BLOCK_E, WIDE, True).to(OPERAND)
        dk_tile, dv_tile = tl.zeros((N, BLOCK_E), ACC), tl.zeros((N, BLOCK_E), ACC)
        # Queries low .. both meet the diagonal, both .. full see every key of the block, full .. n are the ragged end.
        low = start // M * M if CAUSAL else 0
        both = tl.minimum(tl.cdiv(start + N - 1, M) * M, n) if CAUSAL else 0
        full = tl.maximum(both, n // M * M)
        for member in range(GROUP):
            asked = head * GROUP + member
            q_head, g_head = q + asked * head_q, grad + asked * head_g
            lse_head, delta_head = lse + asked * tokens, delta + asked * tokens
            if CAUSAL:
                dk_tile, dv_tile = _scan_for_dkv(
                    dk_tile, dv_tile, tile_k, tile_v, q_head, g_head, lse_head, delta_head, begin, n, key, low, both,
                    stride_q, stride_g, e, log_scale, M, BLOCK_E, WIDE, True, CAUSAL, ACC, OPERAND,
                    PRECISION)  # fmt: skip
            dk_tile, dv_tile = _scan_for_dkv(
                dk_tile, dv_tile, tile_k, tile_v, q_head, g_head, lse_head, delta_head, begin, n, key, both, full,
                stride_q, stride_g, e, log_scale, M, BLOCK_E, WIDE, False, CAUSAL, ACC, OPERAND,
                PRECISION)  # fmt: skip
            dk_tile, dv_tile = _scan_for_dkv(
                dk_tile, dv_tile, tile_k, tile_v, q_head, g_head, lse_head, delta_head, begin, n, key, full, n,
                stride_q, stride_g, e, log_scale, M, BLOCK_E, WIDE, True, CAUSAL, ACC, OPERAND,
                PRECISION)  # fmt: skip
        keep = (key[:, None] < n) & (column[None] < e)
        at = head * head_d + first * stride_d + here[:, None] * stride_d + column[None]
        tl.store(dk + at, (dk_tile * scale).to(dk.dtype.element_ty), keep)
        tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), keep)


def _constants(q, group, causal):
    e = q.shape[-1]
    block = max(16, triton.next_power_of_2(e))
    kinds = {"ACC": accumulator(q.dtype), "OPERAND": operand(q.dtype), "PRECISION": precision(q.dtype)}
    return {"GROUP": group, "BLOCK_E": block, "WIDE": block != e, "CAUSAL": causal, **kinds}


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor offsets, int length, bool causal, float scale) -> (Tensor, Tensor)",
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide(q.dtype))),
)
def compute(q, k, v, offsets, length, causal, scale):
    """The output and the log-sum-exp of each head and row."""
    (tokens, heads, e), sequences = q.shape, len(offsets) - 1
    out, lse = empty(q.shape, like=q), empty((heads, tokens), like=q, dtype=wide(q.dtype))
    _forward[lambda meta: (sequences * triton.cdiv(length, meta["M"]), heads)](
        q, k, v, out, lse, offsets, tokens, length, triton.next_power_of_2(length), e, scale * LOG2E, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], **_constants(q, heads // k.shape[1], causal))  # fmt: skip
    return out, lse


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor offsets, Tensor grad, int length, bool causal,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
def differentiate(q, k, v, out, lse, offsets, grad, length, causal, scale):
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    (tokens, heads, e), sequences = q.shape, len(offsets) - 1
    constants = _constants(q, heads // k.shape[1], causal)
    delta, dq = empty(lse.shape, like=lse), empty(q.shape, like=q)
    dk, dv = empty(k.shape, like=k), empty(k.shape, like=k)
    _delta[(triton.cdiv(tokens, 64), heads)](
        out, grad, delta, tokens, e, *out.stride()[:2], *grad.stride()[:2], R=64, BLOCK_E=constants["BLOCK_E"],
        ACC=constants["ACC"])  # fmt: skip
    given = (lse, delta, offsets, tokens, length, triton.next_power_of_2(length), e, scale, scale * LOG2E)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])
    _backward_q[lambda meta: (sequences * triton.cdiv(length, meta["M"]), heads)](
        q, k, v, grad, dq, *given, *strides, *dq.stride()[:2], **constants
    )
    _backward_kv[lambda meta: (sequences * triton.cdiv(length, meta["N"]), k.shape[1])](
        q, k, v, grad, dk, dv, *given, *strides, *dk.stride()[:2], **constants
    )
    return dq, dk, dv


class VarlenAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the log-sum-exp of each row; the weights are computed again in the backward."""

    @staticmethod
    def forward(q, k, v, offsets, length, causal, scale):
        return compute(q, k, v, offsets, length, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, offsets, *ctx.numbers = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _lse):
        return *differentiate(*ctx.saved_tensors, grad, *ctx.numbers), None, None, None, None


def _check(q, k, v, offsets, max_length):
    check("varlen_attention", q=q, k=k, v=v)
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or len(k) != len(q) or k.shape[2] != q.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"varlen_attention: q is (total, h, e), k and v (total, h_kv, e); got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"varlen_attention: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if not 1 <= q.shape[2] <= 256:
        raise ValueError(f"varlen_attention: a head is 1 to 256 wide, not {q.shape[2]}")
    if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 1 or offsets.device != q.device:
        found = f"{offsets.dtype} of shape {tuple(offsets.shape)} on {offsets.device}"
        raise ValueError(f"varlen_attention: offsets is int32 (b + 1,) on {q.device}; got {found}")
    if readable(offsets):  # on a GPU a look at the values would wait for everything before
        lengths = offsets.diff().tolist()
        if offsets[0] != 0 or offsets[-1] != len(q) or min(lengths, default=0) < 0:
            raise ValueError(
                f"varlen_attention: offsets rise from 0 to the number of rows, {len(q)}; got {offsets.tolist()}"
            )
        if max(lengths, default=0) > max_length:
            raise ValueError(f"varlen_attention: a sequence of {max(lengths)} is longer than max_length {max_length}")


def varlen_attention(q, k, v, offsets, max_length, causal=False, scale=None):
    """Attention within each of the sequences that lie one behind another: softmax(q k^T scale) v, sequence by sequence.

    q          (total, h, e), the rows of all sequences, where total is the sum of their lengths
    k, v       (total, h_kv, e); h_kv divides h, and query heads i h / h_kv, ... share key head i (grouped queries)
    offsets    (b + 1,) int32: sequence i is rows offsets[i] .. offsets[i + 1] - 1; a sequence may be empty
    max_length at least the longest length. It sets how many programs start, not how much is computed
    causal     row i of a sequence sees its rows 0 .. i alone;  scale defaults to 1 / sqrt(e)

    Returns (total, h, e). float32, float16, bfloat16 (float64 in the interpreter); e from 1 to 256, any strides as
    long as the last is 1 (so views of one fused projection need no copy; other inputs are copied). Products are summed
    in float32. Work grows with the sum of the squared lengths, and causal blocks beyond the diagonal are skipped.
    Memory: the output, and one float32 log-sum-exp per row and head, which the backward uses to compute the weights
    again. Traffic per pass: q and the output once, k and v once for each block of 64 or 128 queries, from the cache
    mostly. The backward takes one kernel for dq and one for dk and dv; nothing is added atomically, so gradients are
    the same bits every time. Raises ValueError for shapes, types and (on the CPU, where looking is free) for offsets
    that do not fit; on a GPU wrong offsets are not seen, and the rows of a sequence beyond max_length, rounded up to a
    block, become NaN.
    Source: "FlashAttention-2", 2023; "ByteTransformer", 2022.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, offsets, max_length)
    if q.numel() == 0:
        return q * 1.0
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return VarlenAttention.apply(q, k, v, offsets.contiguous(), max_length, causal, float(scale))[0]


def _block(x, qkv, out, up, down, heads, attend):
    """A pre-norm encoder block on any rows: attend(q, k, v) of (..., h, e) is all that differs when padding is gone."""
    norm = lambda rows: F.layer_norm(rows, rows.shape[-1:])
    q, k, v = F.linear(norm(x), qkv).unflatten(-1, (3, heads, -1)).unbind(-3)
    x = x + F.linear(attend(q, k, v).flatten(-2), out)
    return x + F.linear(F.gelu(F.linear(norm(x), up), approximate="tanh"), down)


def benchmarks():
    """b sequences whose lengths spread evenly from a fifth of the longest to the longest (mean 0.6): the attention
    alone, and a whole padding-free encoder block beside the padded one."""

    def lengths(size):
        return torch.linspace(0.2, 1.0, size["b"]).mul(size["length"]).long()

    def inputs(size, dtype, device):
        n = lengths(size)
        offsets = torch.cat([n.new_zeros(1), n.cumsum(0)]).int().to(device)
        shape = (int(n.sum()), size["h"], size["e"])
        return *(torch.randn(shape, dtype=dtype, device=device) for _ in range(3)), offsets, size["length"]

    def padded(q, k, v, offsets, length):
        real = torch.arange(length, device=q.device) < offsets.diff()[:, None]  # (b, n)
        wide = [x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter_(real[..., None, None], x) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide), attn_mask=real[:, None, None])
        return out.transpose(1, 2)[real]

    def flash(q, k, v, offsets, length):
        return varlen_attn(q, k, v, offsets, offsets, length, length)

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        varlen_attn = None

    def block_inputs(size, dtype, device):
        d, (q, _, _, offsets, length) = size["h"] * size["e"], inputs(size, dtype, device)
        shapes = ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))
        weights = (torch.randn(shape, dtype=dtype, device=device) * shape[1] ** -0.5 for shape in shapes)
        return q.flatten(1), offsets, length, *weights, size["h"]

    def packed_block(x, offsets, length, *weights):
        return _block(x, *weights, lambda q, k, v: varlen_attention(q, k, v, offsets, length))

    def plain_block(x, offsets, length, *weights):
        return _block(x, *weights, lambda q, k, v: reference(q, k, v, offsets, length))

    def padded_block(x, offsets, length, *weights):
        real = torch.arange(length, device=x.device) < offsets.diff()[:, None]
        wide = x.new_zeros(*real.shape, x.shape[1]).masked_scatter_(real[..., None], x)

        def attend(q, k, v):
            heads = (y.transpose(1, 2) for y in (q, k, v))
            return F.scaled_dot_product_attention(*heads, attn_mask=real[:, None, None]).transpose(1, 2)

        return _block(wide, *weights, attend)[real]

    flops = lambda size: int(4 * size["h"] * size["e"] * lengths(size).square().sum())
    traffic = lambda size, itemsize, times: times * int(lengths(size).sum()) * size["h"] * size["e"] * itemsize
    sizes = [(16, 512, 64), (16, 2048, 64), (8, 8192, 128)]
    dense = lambda size: int(24 * lengths(size).sum() * (size["h"] * size["e"]) ** 2) + flops(size)
    common = {
        "sizes": [{"b": b, "length": n, "h": 16, "e": e} for b, n, e in sizes],
        "tiny": {"b": 3, "length": 70, "h": 2, "e": 16},
        "fill": lambda size: int(lengths(size).sum()) / (size["b"] * size["length"]),
    }
    return [{
        **common, "name": "padding_free_encoder", "ours": packed_block, "reference": plain_block, "eager": padded_block,
        "inputs": block_inputs, "peers": {"padded encoder": padded_block}, "differentiate": (0, 3, 4, 5, 6),
        "flops": dense, "backward_flops": lambda size: 2 * dense(size), "bytes": None, "backward_bytes": None,
    }, {
        **common, "name": "varlen_attention", "ours": varlen_attention, "reference": reference, "inputs": inputs,
        "peers": {**({"torch varlen": flash} if varlen_attn else {}), "padded SDPA": padded}, "eager": padded,
        "differentiate": (0, 1, 2), "flops": flops, "backward_flops": lambda size: flops(size) * 5 // 2,
        "bytes": lambda size, itemsize: traffic(size, itemsize, 4),
        "backward_bytes": lambda size, itemsize: traffic(size, itemsize, 8),
    }]  # fmt: skip
