"""Take the padding out of a batch, and put it back: two moves of whole rows, each the backward of the other."""

import torch

from ._runtime import FLOATS, autotune, check, config, empty, jit, operator, readable, tl, triton

ANY = (*FLOATS, torch.int64, torch.int32, torch.uint8)


def reference(x, mask):
    """`pack` in plain torch."""
    return x[mask], torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()


def unpack_reference(packed, offsets, length):
    """`unpack` in plain torch."""
    real = torch.arange(length, device=packed.device) < offsets.diff()[:, None]  # (b, n)
    out = packed.new_zeros(*real.shape, *packed.shape[1:])
    return out.masked_scatter(real.reshape(*real.shape, *[1] * (packed.ndim - 1)), packed)


@jit
def _lengths(mask, lengths, n, stride, BLOCK: tl.constexpr):
    """Program b counts the real tokens of sequence b."""
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count += tl.load(mask + sequence * stride + i, mask=i < n, other=0).to(tl.int32)
    tl.store(lengths + sequence, tl.sum(count))


@jit
def _offsets(lengths, offsets, b, BLOCK: tl.constexpr):
    """One program adds up all lengths: offsets[i + 1] = lengths[0] + ... + lengths[i], and offsets[0] = 0."""
    before = 0
    tl.store(offsets, before)
    for start in range(0, b, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(lengths + i, mask=i < b, other=0)
        tl.store(offsets + 1 + i, before + tl.cumsum(x, 0), mask=i < b)
        before += tl.sum(x)


@jit
def _places(mask, offsets, source, slot, n, stride, PREFIX: tl.constexpr, BLOCK: tl.constexpr):
    """Program b writes where each token of sequence b goes: slot[b, i] is its packed row, or -1 for padding.

    source turns that around: packed row r comes from token source[r], counted through the whole padded batch.
    With PREFIX the real tokens are the first of each sequence, and no mask is read.
    """
    sequence = tl.program_id(0)
    row = tl.load(offsets + sequence)
    length = tl.load(offsets + sequence + 1) - row
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if PREFIX:
            real = (i < length).to(tl.int32)
        else:
            real = tl.load(mask + sequence.to(tl.int64) * stride + i, mask=i < n, other=0).to(tl.int32)
        place = row + tl.cumsum(real, 0) - real  # how many real tokens lie before this one
        token = sequence.to(tl.int64) * n + i
        tl.store(slot + token, tl.where(real > 0, place, -1), mask=i < n)
        tl.store(source + place, token.to(tl.int32), mask=real > 0)
        row += tl.sum(real)


@autotune(
    [config(ROWS=r, COLUMNS=c, num_warps=w) for r, c, w in [(1, 1024, 4), (4, 1024, 8), (8, 256, 4), (32, 128, 4)]],
    key=["width"], interpret={"ROWS": 64, "COLUMNS": 64},
)  # fmt: skip
@jit
def _move(x, index, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[r] = x[index[r]], and zeros where index[r] is -1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row[:, None] < rows) & (column[None] < width)
    origin = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    values = tl.load(x + origin[:, None] * width + column[None], mask=there & (origin[:, None] >= 0), other=0)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None], values, mask=there)


@operator("(Tensor x, Tensor index) -> Tensor", lambda x, index: x.new_empty(index.shape[0], x.shape[1]))
def compute(x, index):
    """Row index[r] of x as row r, zeros where it is -1."""
    out = empty((len(index), x.shape[1]), like=x)
    _move[lambda meta: (triton.cdiv(len(index), meta["ROWS"]), triton.cdiv(x.shape[1], meta["COLUMNS"]))](
        x.contiguous(), index, out, len(index), x.shape[1]
    )
    return out


class Move(torch.autograd.Function):
    """Rows of x by `index`. `back` is the same map read backward, so the gradient moves by `back`, and again by
    `index` if it is differentiated itself."""

    @staticmethod
    def forward(x, index, back):
        return compute(x, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        index, back = ctx.saved_tensors
        return _moved(grad, back, index), None, None


def block_of(n):
    """How many tokens of a mask a program looks at in one step."""
    return min(4096, triton.next_power_of_2(n))


def _moved(x, index, back):
    if 0 in (len(index), len(x), x.shape[1]):  # nothing to launch; a gradient still finds its way back
        out = x.new_zeros(len(index), x.shape[1])
        return out + 0 * x.sum() if x.requires_grad else out
    return Move.apply(x, index, back)


@operator(
    "(Tensor offsets, Tensor? mask, int b, int n, SymInt total) -> (Tensor, Tensor)",
    lambda offsets, mask, b, n, total: (offsets.new_empty(total), offsets.new_empty(b * n)),
)
def places(offsets, mask, b, n, total):
    """source (total,) and slot (b n,), see `_places`."""
    source = empty((total,), like=offsets)
    slot = empty((b * n,), like=offsets)
    if b * n:
        prefix = mask is None
        mask = None if prefix else (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)
        given, stride = (offsets, 0) if prefix else (mask, mask.stride(0))
        _places[(b,)](given, offsets, source, slot, n, stride, PREFIX=prefix, BLOCK=block_of(n))
    return source, slot


@operator("(Tensor mask) -> Tensor", lambda mask: mask.new_empty(mask.shape[0] + 1, dtype=torch.int32))
def offsets_of(mask):
    """Where each sequence begins once the padding is gone: (b + 1,) int32, from mask (b, n), True at real tokens.

    offsets[i] is the number of real tokens in sequences 0 .. i - 1: the prefix sum of the lengths, a zero in front.
    """
    b, n = mask.shape
    offsets = empty((b + 1,), like=mask, dtype=torch.int32)
    if mask.numel() == 0:
        return offsets.zero_()
    lengths = empty((b,), like=offsets)
    mask = (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)
    _lengths[(b,)](mask, lengths, n, mask.stride(0), BLOCK=block_of(n))
    _offsets[(1,)](lengths, offsets, b, BLOCK=block_of(b))
    return offsets


def pack(x, mask):
    """The rows of the real tokens, one sequence behind another, and the offsets that say where each begins.

    x     (b, n, ...), any trailing sizes, floats or integers (token ids pack too); made contiguous first
    mask  (b, n) boolean, True at real tokens, which may lie anywhere: their order is kept

    Returns packed (total, ...) and offsets (b + 1,) int32, as `varlen_attention` takes them. Differentiable by x, any
    number of times: the gradient is put back to where the rows came from, zeros at padding. Nothing is computed, so the
    copy is exact. Kept for the backward: two int32 maps, 4 (total + b n) bytes. Traffic: twice the packed bytes, plus
    the mask and the maps. On a GPU the host waits once, because the size of the result depends on the mask.
    Raises ValueError for a mask of another type, shape or device, and beyond 2^31 tokens.
    Source: "ByteTransformer", 2022.
    """
    check("pack", ANY, x=x)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.device != x.device:
        found = f"{mask.dtype} on {mask.device}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"pack: mask is a boolean tensor on {x.device}, True at real tokens; got {found}")
    if x.ndim < 2 or mask.shape != x.shape[:2]:
        raise ValueError(f"pack: for x {tuple(x.shape)} the mask is {tuple(x.shape[:2])}; got {tuple(mask.shape)}")
    if mask.numel() >= 2**31:
        raise ValueError(f"pack: {mask.numel()} tokens do not fit 32-bit places")
    offsets = offsets_of(mask)
    total = int(offsets[-1])
    source, slot = places(offsets, mask, *mask.shape, total)
    rows = _moved(x.flatten(0, 1).flatten(1) if x.ndim > 2 else x.reshape(-1, 1), source, slot)
    return rows.reshape(total, *x.shape[2:]), offsets


def unpack(packed, offsets, length):
    """Rows (total, ...) to a padded batch (b, length, ...): sequence i at the front of row i, zeros behind it.

    offsets is (b + 1,) int32 as `pack` returns it; length is at least the longest sequence. With a mask whose real
    tokens come first, unpack(*pack(x, mask), n) is x with zeros at the padding. Differentiable, the gradient is packed.
    Traffic: the packed bytes once, the padded bytes once. Raises ValueError for offsets of another type or shape and,
    on the CPU, where looking is free, for offsets that do not fit or a sequence longer than `length`.
    Source: "ByteTransformer", 2022.
    """
    check("unpack", ANY, packed=packed)
    if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 1 or offsets.device != packed.device:
        found = f"{offsets.dtype} of shape {tuple(offsets.shape)} on {offsets.device}"
        raise ValueError(f"unpack: offsets is int32 (b + 1,) on {packed.device}; got {found}")
    if packed.ndim < 1:
        raise ValueError(f"unpack: packed is (total, ...); got {tuple(packed.shape)}")
    if readable(offsets):
        lengths = offsets.diff().tolist()
        if offsets[0] != 0 or offsets[-1] != len(packed) or min(lengths, default=0) < 0:
            raise ValueError(f"unpack: offsets rise from 0 to {len(packed)} rows; got {offsets.tolist()}")
        if max(lengths, default=0) > length:
            raise ValueError(f"unpack: a sequence of {max(lengths)} does not fit into length {length}")
    b = len(offsets) - 1
    source, slot = places(offsets.contiguous(), None, b, length, len(packed))
    rows = _moved(packed.flatten(1) if packed.ndim > 1 else packed[:, None], slot, source)
    return rows.reshape(b, length, *packed.shape[1:])


def benchmarks():
    """pack and unpack at a mean fill of 0.6; both move bytes and compute nothing."""

    def batch(size, device):
        lengths = torch.linspace(0.2, 1.0, size["b"]).mul(size["n"]).long()
        return (torch.arange(size["n"]) < lengths[:, None]).to(device)

    def padded(size, dtype, device):
        return torch.randn(size["b"], size["n"], size["d"], dtype=dtype, device=device), batch(size, device)

    def packed(size, dtype, device):
        return *reference(*padded(size, dtype, device)), size["n"]

    total = lambda size: int(torch.linspace(0.2, 1.0, size["b"]).mul(size["n"]).long().sum())
    whole = lambda size: size["b"] * size["n"]
    both = {
        "sizes": [{"b": 16, "n": n, "d": d} for n, d in ((512, 768), (2048, 1024), (8192, 4096))],
        "peers": {}, "differentiate": (0,), "flops": None, "backward_flops": None,
        "numbers": True, "tiny": {"b": 3, "n": 9, "d": 5},
    }  # fmt: skip
    there = lambda size, itemsize: 2 * total(size) * size["d"] * itemsize
    back = lambda size, itemsize: (total(size) + whole(size)) * size["d"] * itemsize
    return [
        {"name": "pack", "inputs": padded, "ours": lambda x, mask: pack(x, mask)[0], "bytes": there,
         "reference": lambda x, mask: x[mask], "backward_bytes": back, **both},
        {"name": "unpack", "inputs": packed, "ours": unpack, "reference": unpack_reference, "bytes": back,
         "backward_bytes": there, **both},
    ]  # fmt: skip
