"""Attention of one new token per sequence against a long cache, contiguous or paged: the keys are split into parts."""

import math

import torch
import torch.nn.functional as F

from ._runtime import (
    INTERPRET,
    accumulator,
    autocast,
    autotune,
    check,
    config,
    empty,
    in_shared,
    jit,
    limits,
    operand,
    operator,
    precision,
    readable,
    tl,
    triton,
    wide,
)

LOG2E = math.log2(math.e)


def gather_pages(pages, table):
    """The cache (b, h_kv, max_pages page_size, e) that a table (b, max_pages) describes, copied together."""
    rows = pages[table.long().clamp(min=0)]  # (b, max_pages, h_kv, page_size, e)
    return rows.transpose(1, 2).flatten(2, 3)


def reference(q, k, v, lengths=None, table=None, scale=None):
    """The same in plain torch, with the pages copied together first. Arguments as for `decode_attention`."""
    if table is not None:
        k, v = gather_pages(k, table), gather_pages(v, table)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (b, h, m, e)
    scores = (k @ q[..., None])[..., 0] * (q.shape[-1] ** -0.5 if scale is None else scale)  # (b, h, m)
    if lengths is None:
        return (scores.softmax(-1)[:, :, None] @ v)[:, :, 0]
    seen = torch.arange(k.shape[2], device=q.device) < lengths[:, None, None]  # (b, 1, m)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    return (weights[:, :, None] @ torch.where(seen[..., None], v, 0.0))[:, :, 0]


def _that_fit(configs, arguments, BLOCK_E, **others):
    """Those whose tiles of keys and values fit into shared memory."""
    k = arguments["k"]
    return in_shared(configs, k, lambda c: (2 * c.num_stages * c.kwargs["N"] + 64) * BLOCK_E * k.element_size())


@autotune(
    [config(N=n, num_warps=w, num_stages=s)
     for n, w, s in [(64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 3), (32, 4, 2)]],
    key=["e", "GROUP", "bucket", "PAGED"], interpret={"N": 64},
    prune_configs_by={"early_config_prune": _that_fit},
)  # fmt: skip
@jit
def _parts(q, k, v, lengths, table, out, lse, m, parts, span, bucket, e, log_scale, kv_heads, stride_b, stride_h,
           stride_m, v_b, v_h, v_m, pages_of, PAGE: tl.constexpr, PAGED: tl.constexpr, RAGGED: tl.constexpr,
           GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr,
           OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A program for each part, kv head and sequence: attention of all the head's queries to one part of the keys.

    All on the first axis of the grid, the only one that is longer than 65,535.

    The part's output is normalized by the part's own sum; the log2 of that sum (lse) lets the next kernel undo it.
    """
    program = tl.program_id(0)
    part, head = program % parts, (program // parts % kv_heads).to(tl.int64)
    sequence = (program // parts // kv_heads).to(tl.int64)
    length = tl.minimum(tl.load(lengths + sequence), m) if RAGGED else m
    low, high = part * span, tl.minimum(part * span + span, length)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    asked = sequence * kv_heads * GROUP + head * GROUP + row  # the group's query heads, counted through the batch
    inside = (row[:, None] < GROUP) & (column[None] < e)
    tile_q = tl.load(q + asked[:, None] * e + column[None], mask=inside, other=0.0).to(OPERAND)
    acc = tl.zeros((ROWS, BLOCK_E), ACC)
    total, top = tl.zeros((ROWS,), ACC), tl.full((ROWS,), float("-inf"), ACC)
    for start in range(low, high, N):
        key = start + tl.arange(0, N)
        there = (key[:, None] < high) & (column[None] < e)
        if PAGED:  # key j stands in row j % PAGE of page table[sequence, j // PAGE]
            page = tl.load(table + sequence * pages_of + key // PAGE, mask=key < high, other=0).to(tl.int64)
            at_k = page * stride_b + head * stride_h + key % PAGE * stride_m
            at_v = page * v_b + head * v_h + key % PAGE * v_m
        else:
            at_k = sequence * stride_b + head * stride_h + key.to(tl.int64) * stride_m
            at_v = sequence * v_b + head * v_h + key.to(tl.int64) * v_m
        tile_k = tl.load(k + at_k[:, None] + column[None], mask=there, other=0.0).to(OPERAND)
        tile_v = tl.load(v + at_v[:, None] + column[None], mask=there, other=0.0).to(OPERAND)
        scores = tl.dot(tile_q, tl.trans(tile_k), input_precision=PRECISION, out_dtype=ACC) * log_scale
        scores = tl.where(key[None] < high, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - new[:, None]), tl.exp2(top - new)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(OPERAND), tile_v, input_precision=PRECISION, out_dtype=ACC)
        top = new
    some = total > 0  # a part behind the sequence's end has no key: zeros, with a weight of 2^-inf
    safe = tl.where(some, total, 1.0)
    place = asked * parts + part
    tl.store(out + place[:, None] * e + column[None], acc / safe[:, None], mask=inside)
    tl.store(lse + place, tl.where(some, top + tl.log2(safe), float("-inf")), mask=row < GROUP)


@jit
def _combine(out, lse, result, parts, e, PARTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Program i joins the parts of query head i: each part counts by the share of its sum in the sum of all."""
    head = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, PARTS), tl.arange(0, BLOCK_E)
    sums = tl.load(lse + head * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(sums, 0)
    share = tl.exp2(sums - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(share, 0)
    share = share / tl.where(total > 0, total, 1.0)  # a sequence without keys gets zeros
    inside = (part[:, None] < parts) & (column[None] < e)
    values = tl.load(out + (head * parts + part)[:, None] * e + column[None], mask=inside, other=0.0)
    joined = tl.sum(values * share[:, None], 0)
    tl.store(result + head * e + column, joined.to(result.dtype.element_ty), mask=column < e)


def parts_for(programs, m, device):
    """How many parts keep the whole GPU busy: two programs for each multiprocessor, parts of 128 keys or more."""
    processors = 2 if INTERPRET else limits(device.index)[1]
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(m, 128), 128))


def _check(q, k, v, lengths, table, parts):
    check("decode_attention", q=q, k=k, v=v)
    paged = table is not None
    cache = "(pages, h_kv, page_size, e)" if paged else "(b, h_kv, m, e)"
    if q.ndim != 3 or k.ndim != 4 or k.shape != v.shape or k.shape[3] != q.shape[2] or (not paged and len(k) != len(q)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"decode_attention: q is (b, h, e), k and v {cache}; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"decode_attention: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if not 1 <= q.shape[2] <= 256:
        raise ValueError(f"decode_attention: a head is 1 to 256 wide, not {q.shape[2]}")
    for name, x, ndim in (("lengths", lengths, 1), ("table", table, 2)):
        if x is not None and (x.dtype != torch.int32 or x.ndim != ndim or len(x) != len(q) or x.device != q.device):
            shape = "(b, max_pages)" if ndim == 2 else "(b,)"
            found = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise ValueError(f"decode_attention: {name} is int32 {shape} on {q.device}, b = {len(q)}; got {found}")
    if parts is not None and not 1 <= parts <= 128:
        raise ValueError(f"decode_attention: 1 to 128 parts are possible, not {parts}")
    if not readable(q):  # a look at the values would wait for everything before
        return
    m = table.shape[1] * k.shape[2] if paged else k.shape[2]
    if lengths is not None and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= m:
        raise ValueError(f"decode_attention: lengths lie between 0 and {m}; got {lengths.tolist()}")
    if paged and table.numel():
        used = torch.full((len(q),), m, dtype=torch.int32) if lengths is None else lengths
        named = table[torch.arange(table.shape[1]) * k.shape[2] < used[:, None]]
        if named.numel() and not 0 <= int(named.min()) <= int(named.max()) < len(k):
            found = f"the table names {int(named.min())} to {int(named.max())}"
            raise ValueError(f"decode_attention: the cache has pages 0 to {len(k) - 1}; {found}")


def decode_attention(q, k, v, lengths=None, table=None, scale=None, parts=None):
    """One query per sequence against its cache: softmax(q k^T scale) v. Forward only: it is a step of generation.

    q        (b, h, e), the newest token of each sequence; it sees the whole cache, its own key included
    k, v     (b, h_kv, m, e); query heads i h / h_kv, ... share key head i. With a table: (pages, h_kv, page_size, e)
    lengths  (b,) int32: how many keys of each sequence count; all m without it. A sequence without keys gives zeros
    table    (b, max_pages) int32: key j of sequence i is row j % page_size of page table[i, j // page_size]. Entries
             behind a sequence's length are never read. Any page size works, 16 or more keep reads in long runs
    scale    defaults to 1 / sqrt(e);  parts: into how many parts the keys are split, by default enough to fill the GPU

    Returns (b, h, e), with no gradient. One query makes b h_kv programs, too few for a GPU, and each would read all
    its keys in turn. So each part of the keys gets its own program, which stores the part's output o_p and the
    log-sum-exp l_p of its scores; a second kernel returns sum_p exp(l_p - l) o_p with l = log sum_p exp(l_p), which is
    exact: the result does not depend on the number of parts beyond rounding. All query heads of a group share one
    reading of their keys. Traffic: every key and value that counts, once, plus 8 h e bytes per part. float32, float16,
    bfloat16 (float64 in the interpreter); sums in float32; the last stride of k and v must be 1, else they are copied.
    Raises ValueError for shapes and types and, on the CPU, where looking is free, for lengths and pages outside the
    cache; RuntimeError when a gradient is asked for.
    Sources: "Flash-Decoding for long-context inference", 2023; "PagedAttention", 2023.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, lengths, table, parts)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RuntimeError("decode_attention has no backward: call it under torch.no_grad(), or train with another")
    e, m = q.shape[-1], k.shape[2] * (1 if table is None else table.shape[1])
    if q.numel() == 0 or m == 0:
        return torch.zeros_like(q)
    return compute(q, k, v, lengths, table, float(e**-0.5 if scale is None else scale), parts)


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? table, float scale, int? parts) -> Tensor",
    lambda q, *_: q.new_empty(q.shape),
)
def compute(q, k, v, lengths, table, scale, parts):
    (b, h, e), kv_heads, paged = q.shape, k.shape[1], table is not None
    m = table.shape[1] * k.shape[2] if paged else k.shape[2]
    q, (k, v) = q.contiguous(), (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    parts = parts_for(b * kv_heads, m, q.device) if parts is None else parts
    span = triton.cdiv(m, parts)
    span = span if span < 64 else triton.cdiv(span, 64) * 64  # whole tiles; the last parts may be empty
    out, lse = (empty(shape, like=q, dtype=wide(q.dtype)) for shape in ((b, h, parts, e), (b, h, parts)))
    group, block = h // kv_heads, max(16, triton.next_power_of_2(e))
    _parts[(parts * kv_heads * b,)](
        q, k, v, q if lengths is None else lengths.contiguous(), table.contiguous() if paged else q, out, lse, m, parts,
        span, triton.next_power_of_2(span), e, scale * LOG2E, kv_heads, *k.stride()[:3],
        *v.stride()[:3], table.shape[1] if paged else 0, PAGE=k.shape[2] if paged else 1, PAGED=paged,
        RAGGED=lengths is not None, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), BLOCK_E=block,
        ACC=accumulator(q.dtype), OPERAND=operand(q.dtype), PRECISION=precision(q.dtype))  # fmt: skip
    result = empty(q.shape, like=q)
    _combine[(b * h,)](out, lse, result, parts, e, PARTS=triton.next_power_of_2(parts), BLOCK_E=block)
    return result


def benchmarks():
    """One entry: 8 query heads per key head, the whole cache in use."""

    def inputs(size, dtype, device):
        shape = (size["b"], size["h"] // 8, size["m"], size["e"])
        q = torch.randn(size["b"], size["h"], size["e"], dtype=dtype, device=device)
        return q, *(torch.randn(shape, dtype=dtype, device=device) for _ in range(2))

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def traffic(size, itemsize):
        return itemsize * size["b"] * size["e"] * (2 * size["h"] + 2 * (size["h"] // 8) * size["m"])

    sizes = [(1, 65536), (1, 524288), (16, 8192), (64, 8192)]
    return [{
        "name": "decode_attention", "ours": decode_attention, "reference": reference, "peers": {"SDPA": fused},
        "sizes": [{"b": b, "h": 32, "m": m, "e": 128} for b, m in sizes], "inputs": inputs, "differentiate": (),
        "bytes": traffic, "flops": lambda size: 4 * size["b"] * size["h"] * size["m"] * size["e"],
        "backward_bytes": None, "backward_flops": None, "tiny": {"b": 2, "h": 16, "m": 130, "e": 16},
    }]  # fmt: skip
