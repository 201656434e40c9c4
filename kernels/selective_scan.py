"""The selective scan of Mamba: a state for every channel whose decay and input depend on the token.

    h_t = exp(delta_t a) h_{t-1} + delta_t x_t b_t        (channels, states)
    y_t = c_t . h_t + d x_t                               (channels,)

Each entry of h is a linear recurrence (see kernels/scan.py), computed as an associative scan over CHUNK tokens whose
result carries over to the next chunk. The (n, channels, states) tensor of states never leaves the chip: forward keeps
the state before each chunk, and backward, walking from the last chunk to the first, computes the others again. Its own
recurrence runs from the end: with w_t = dy_t c_t,
    G_t = w_t + exp(delta_{t+1} a) G_{t+1}                the gradient of h_t
Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
"""

import torch
from torch.autograd.function import once_differentiable

from ._runtime import INTERPRET, accumulator, autotune, check, config, empty, jit, operator, spread, tl, triton, wide
from .scan import compose, doubling

CHUNK = 8 if INTERPRET else 16  # tokens between two stored states; the interpreter scans element by element


def reference(x, delta, a, b, c, d=None, state=None, return_state=False):
    """The recurrence, one token at a time, in the dtype of x. Arguments as for `selective_scan`."""
    a, d = a.to(x.dtype), None if d is None else d.to(x.dtype)
    h = x.new_zeros(x.shape[0], *a.shape) if state is None else state.to(x.dtype)
    out = []
    for t in range(x.shape[1]):
        step, new = delta[:, t, :, None], (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        h = torch.exp(step * a) * h + new  # (batch, channels, states)
        out.append((h * c[:, t, None]).sum(-1))
    y = torch.stack(out, 1) if out else x
    y = y if d is None else y + d * x
    return (y, h) if return_state else y


def materialized(x, delta, a, b, c, d=None):
    """The same with all states in memory, (batch, n, channels, states), as a scan in log2(n) steps."""
    h = doubling(torch.exp(delta[..., None] * a), (delta * x)[..., None] * b[:, :, None])
    y = (h * c[:, :, None]).sum(-1)
    return y if d is None else y + d * x


@jit
def _load(x, t, columns, stride, n, width):
    """x[t, columns], zeros for tokens outside 0 .. n - 1. A delta of zero is a step that changes nothing."""
    mask = ((t >= 0) & (t < n))[:, None] & (columns < width)[None, :]
    return tl.load(x + t[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@jit
def _row(x, rows, row):
    """x[row] of a (CHUNK, channels, states) tile."""
    return tl.sum(tl.where((rows == row)[:, None, None], x, 0.0), 0)


@autotune(
    [config(BLOCK=block, num_warps=warps) for block, warps in [(16, 4), (32, 4), (32, 8), (64, 8)]],
    key=["channels", "S"],
    interpret={"BLOCK": 2},
)
@jit
def _forward(
    x, delta, a, b, c, d, state, y, last, starts, n, channels, x_b, x_n, dt_b, dt_n, b_b, b_n, c_b, c_n,
    S: tl.constexpr, STATES: tl.constexpr, SKIP: tl.constexpr, GIVEN: tl.constexpr, KEEP: tl.constexpr,
    ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program walks through the tokens of BLOCK channels with all their states, a chunk at a time."""
    blocks, chunks = tl.cdiv(channels, BLOCK), tl.cdiv(n, CHUNK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    s, rows = tl.arange(0, STATES), tl.arange(0, CHUNK)
    place = channel[:, None] * S + s[None, :]
    known = (channel < channels)[:, None] & (s < S)[None, :]
    rate = tl.load(a + place, mask=known, other=0.0) * 1.4426950408889634  # exp(z) = 2^(z log2 e)
    h = tl.zeros((BLOCK, STATES), ACC)
    if GIVEN:
        h = tl.load(state + batch * channels * S + place, mask=known, other=0.0)
    for start in range(0, n, CHUNK):
        t = start + rows.to(tl.int64)
        if KEEP:
            tl.store(starts + (batch * chunks + start // CHUNK) * channels * S + place, h, mask=known)
        inputs = _load(x + batch * x_b, t, channel, x_n, n, channels).to(ACC)  # (CHUNK, BLOCK)
        step = _load(delta + batch * dt_b, t, channel, dt_n, n, channels).to(ACC)
        b_t = _load(b + batch * b_b, t, s, b_n, n, S).to(ACC)  # (CHUNK, STATES)
        c_t = _load(c + batch * c_b, t, s, c_n, n, S).to(ACC)
        decay = tl.exp2(step[:, :, None] * rate[None, :, :])
        new = (step * inputs)[:, :, None] * b_t[:, None, :]
        faded, sums = tl.associative_scan((decay, new), 0, compose)
        hidden = sums + faded * h[None, :, :]  # (CHUNK, BLOCK, STATES)
        result = tl.sum(hidden * c_t[:, None, :], 2)
        if SKIP:
            result += tl.load(d + channel, mask=channel < channels, other=0.0)[None, :] * inputs
        inside = (t < n)[:, None] & (channel < channels)[None, :]
        tl.store(y + (batch * n + t[:, None]) * channels + channel[None, :], result, mask=inside)
        h = _row(hidden, rows, CHUNK - 1)
    tl.store(last + batch * channels * S + place, h, mask=known)


@jit
def _backward(
    x, delta, a, b, c, d, starts, dy, grad_last, dx, ddelta, da, db, dc, dd, dstate, n, channels, count,
    x_b, x_n, dt_b, dt_n, b_b, b_n, c_b, c_n, dy_b, dy_n,
    S: tl.constexpr, STATES: tl.constexpr, SKIP: tl.constexpr, GIVEN: tl.constexpr, ENDED: tl.constexpr,
    ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: states again from the stored one, their gradients by a scan from the end."""
    blocks, chunks = tl.cdiv(channels, BLOCK), tl.cdiv(n, CHUNK)
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    s, rows = tl.arange(0, STATES), tl.arange(0, CHUNK)
    place = channel[:, None] * S + s[None, :]
    known = (channel < channels)[:, None] & (s < S)[None, :]
    rate = tl.load(a + place, mask=known, other=0.0)
    rate2 = rate * 1.4426950408889634
    x, delta, b, c, dy = x + batch * x_b, delta + batch * dt_b, b + batch * b_b, c + batch * c_b, dy + batch * dy_b
    skip = tl.zeros((BLOCK,), ACC)
    if SKIP:
        skip = tl.load(d + channel, mask=channel < channels, other=0.0)
    ahead = tl.zeros((BLOCK, STATES), ACC)  # the gradient of the first state of the chunk behind
    if ENDED:
        ahead = tl.load(grad_last + batch * channels * S + place, mask=known, other=0.0)
    sum_a, sum_d = tl.zeros((BLOCK, STATES), ACC), tl.zeros((BLOCK,), ACC)

    for back in range(0, chunks):
        chunk = chunks - 1 - back
        t = chunk * CHUNK + rows.to(tl.int64)
        inputs = _load(x, t, channel, x_n, n, channels).to(ACC)  # (CHUNK, BLOCK)
        step = _load(delta, t, channel, dt_n, n, channels).to(ACC)
        grad = _load(dy, t, channel, dy_n, n, channels).to(ACC)
        b_t = _load(b, t, s, b_n, n, S).to(ACC)  # (CHUNK, STATES)
        c_t = _load(c, t, s, c_n, n, S).to(ACC)

        # h_{t-1} decayed: a scan over the steps of the tokens before (none for row 0), then one step's decay
        early = tl.where(rows > 0, t - 1, -1)
        step_1 = _load(delta, early, channel, dt_n, n, channels).to(ACC)
        new_1 = step_1 * _load(x, early, channel, x_n, n, channels).to(ACC)
        b_1 = _load(b, early, s, b_n, n, S).to(ACC)
        faded, sums = tl.associative_scan(
            (tl.exp2(step_1[:, :, None] * rate2[None, :, :]), new_1[:, :, None] * b_1[:, None, :]), 0, compose
        )
        h = tl.load(starts + (batch * chunks + chunk) * channels * S + place, mask=known, other=0.0)
        decayed = tl.exp2(step[:, :, None] * rate2[None, :, :]) * (sums + faded * h[None, :, :])

        # G_t: a scan from the end whose decay is the next token's
        step_2 = _load(delta, t + 1, channel, dt_n, n, channels).to(ACC)
        faded, sums = tl.associative_scan(
            (tl.exp2(step_2[:, :, None] * rate2[None, :, :]), grad[:, :, None] * c_t[:, None, :]), 0, compose,
            reverse=True,
        )  # fmt: skip
        g = sums + faded * ahead[None, :, :]  # (CHUNK, BLOCK, STATES)
        ahead = _row(g, rows, 0)

        through = g * decayed  # the gradient by delta_t a
        along = tl.sum(g * b_t[:, None, :], 2)  # the gradient by delta_t x_t
        sum_a += tl.sum(through * step[:, :, None], 0)
        sum_d += tl.sum(grad * inputs, 0)
        inside = (t < n)[:, None] & (channel < channels)[None, :]
        here = (batch * n + t[:, None]) * channels + channel[None, :]
        tl.store(dx + here, along * step + skip[None, :] * grad, mask=inside)
        tl.store(ddelta + here, along * inputs + tl.sum(through * rate[None, :, :], 2), mask=inside)
        new = (step * inputs)[:, :, None]
        there = ((block * count + batch) * n + t[:, None]) * S + s[None, :]  # one sum for each block of channels
        mask = (t < n)[:, None] & (s < S)[None, :]
        tl.store(db + there, tl.sum(g * new, 1), mask=mask)
        tl.store(dc + there, tl.sum((decayed + new * b_t[:, None, :]) * grad[:, :, None], 1), mask=mask)

    tl.store(da + batch * channels * S + place, sum_a, mask=known)
    if SKIP:
        tl.store(dd + batch * channels + channel, sum_d, mask=channel < channels)
    if GIVEN:
        first = tl.load(delta + channel, mask=channel < channels, other=0.0).to(ACC)
        tl.store(dstate + batch * channels * S + place, ahead * tl.exp2(first[:, None] * rate2), mask=known)


@operator(
    "(Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? state, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, delta, a, b, c, d, state, keep: (
        x.new_empty(x.shape), a.new_empty(x.shape[0], *a.shape),
        a.new_empty((x.shape[0], -(-x.shape[1] // CHUNK), *a.shape) if keep else 0),
    ),
)  # fmt: skip
def compute(x, delta, a, b, c, d, state, keep):
    """The result, the state behind the last token and, if they are to be kept, the states before each chunk."""
    (batch, n, channels), states, acc = x.shape, a.shape[1], wide(x.dtype)
    y, last = empty(x.shape, like=x), empty((batch, channels, states), like=x, dtype=acc)
    starts = empty((batch, triton.cdiv(n, CHUNK), channels, states) if keep else 0, like=x, dtype=acc)
    _forward[lambda meta: (batch * triton.cdiv(channels, meta["BLOCK"]),)](
        x, delta, a, b, c, a if d is None else d, a if state is None else state, y, last, starts, n, channels,
        *_strides(x, delta, b, c), S=states, STATES=triton.next_power_of_2(states), SKIP=d is not None,
        GIVEN=state is not None, KEEP=keep, ACC=accumulator(x.dtype), CHUNK=CHUNK,
    )  # fmt: skip
    return y, last, starts


@operator(
    "(Tensor x, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? state, Tensor starts, Tensor? grad,"
    " Tensor? grad_last) -> Tensor[]",
    lambda x, delta, a, b, c, d, state, *_: [
        t.new_empty(t.shape) for t in (x, delta, a, b, c, d, state) if t is not None
    ],
)
def differentiate(x, delta, a, b, c, d, state, starts, grad, grad_last):
    """The gradients of x, delta, a, b and c, and of d and the state if they are there."""
    (batch, n, channels), states = x.shape, a.shape[1]
    grad = torch.zeros_like(x) if grad is None else _rows(grad)
    block = 2 if INTERPRET else 32 if states <= 16 else 16 if states <= 32 else 8
    blocks = triton.cdiv(channels, block)
    part = lambda *shape: empty(shape, like=a)
    dx, ddelta = empty(x.shape, like=x), empty(x.shape, like=x)
    da, dd, dstate = part(batch, channels, states), part(batch, channels), part(batch, channels, states)
    db, dc = part(blocks, batch, n, states), part(blocks, batch, n, states)
    _backward[(batch * blocks,)](
        x, delta, a, b, c, a if d is None else d, starts, grad, a if grad_last is None else grad_last.contiguous(),
        dx, ddelta, da, db, dc, dd, dstate, n, channels, batch, *_strides(x, delta, b, c, grad), S=states,
        STATES=triton.next_power_of_2(states), SKIP=d is not None, GIVEN=state is not None,
        ENDED=grad_last is not None, ACC=accumulator(x.dtype), CHUNK=CHUNK, BLOCK=block, num_warps=8,
    )  # fmt: skip
    found = [dx, ddelta, da.sum(0), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)]
    return [*found, *([] if d is None else [dd.sum(0)]), *([] if state is None else [dstate])]


class SelectiveScan(torch.autograd.Function):
    """Stores the inputs and the state before each chunk."""

    @staticmethod
    def forward(x, delta, a, b, c, d, state, keep):
        return compute(x, delta, a, b, c, d, state, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:7], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_last, _starts):
        _, _, _, _, _, d, state, _ = ctx.saved_tensors
        found = differentiate(*ctx.saved_tensors, grad, grad_last)
        return *spread(found, [True] * 5 + [d is not None, state is not None]), None


def _rows(x):
    """Channels (or states) must be contiguous; batch and tokens may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:2]]


def selective_scan(x, delta, a, b, c, d=None, state=None, return_state=False):
    """h_t = exp(delta_t a) h_{t-1} + delta_t x_t b_t, y_t = c_t . h_t + d x_t, for every channel.

    x, delta (batch, n, channels), delta positive (after its softplus); a (channels, states) negative; b, c (batch, n,
    states) shared by the channels; d (channels,) or None; state (batch, channels, states) is h before the first token.
    Returns y (batch, n, channels), with return_state=True (y, h after the last token).
    float16, bfloat16, float32, float64, one for x, delta, b and c; a, d and state may have another float dtype and are
    used in float32 (float64 for float64), like the states. Rows are read in place when they are contiguous, else
    copied. A positive a is a state that grows; it is not refused, because looking would stop a GPU's queue.
    Gradients by all seven. Each block of channels leaves its own share of db and dc, added up afterwards, so there are
    no atomics and results repeat exactly. Stored for backward: the inputs and (n / CHUNK, channels, states) states in
    float32, as many bytes as x in float32 for 16 states. Forward reads x, delta, b, c and writes y; backward reads x,
    delta, dy, b, c and the states, writes dx, ddelta and 2 states for each token and block of channels.
    Raises ValueError for shapes, dtypes and devices that do not fit, and for more than 64 states.
    Source: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    check("selective_scan", x=x, delta=delta, b=b, c=c)
    check("selective_scan", a=a)
    if x.ndim != 3 or delta.shape != x.shape:
        raise ValueError(
            f"selective_scan needs x, delta (batch, n, channels); got {tuple(x.shape)}, {tuple(delta.shape)}"
        )
    (batch, n, channels), states = x.shape, a.shape[-1]
    wanted = {"a": (channels, states), "b": (batch, n, states), "c": (batch, n, states), "d": (channels,)}
    wanted["state"] = (batch, channels, states)
    for name, tensor in {"a": a, "b": b, "c": c, "d": d, "state": state}.items():
        if tensor is not None and tensor.shape != wanted[name]:
            raise ValueError(
                f"selective_scan: {name} must be {wanted[name]} for x {tuple(x.shape)} and {states} states, "
                f"it is {tuple(tensor.shape)}"
            )
    if states > 64:
        raise ValueError(f"selective_scan keeps the states of a channel in registers, at most 64; got {states}")
    acc = wide(x.dtype)
    for name, tensor in {"d": d, "state": state}.items():
        check("selective_scan", **{name: tensor})
    if not x.numel() or not states:
        return reference(x, delta, a, b, c, d, None if state is None else state.to(acc), return_state)
    a, d, state = (None if t is None else t.to(acc).contiguous() for t in (a, d, state))
    inputs = _rows(x), _rows(delta), a, _rows(b), _rows(c), d, state
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, last, _ = SelectiveScan.apply(*inputs, keep)
    return (y, last) if return_state else y


def benchmarks():
    def inputs(size, dtype, device):
        make = lambda *shape: torch.randn(shape, device=device, dtype=dtype)
        shape, states = (size["batch"], size["tokens"], size["channels"]), size["states"]
        a = -torch.arange(1, states + 1, device=device, dtype=torch.float32).repeat(size["channels"], 1)
        b, c = make(*shape[:2], states), make(*shape[:2], states)
        return make(*shape), 0.1 * make(*shape).abs(), a, b, c, make(size["channels"])

    entries = lambda size: size["batch"] * size["tokens"] * size["channels"]
    return [
        {
            "name": "selective_scan",
            "sizes": [{"batch": 4, "tokens": n, "channels": 2048, "states": 16} for n in (1024, 4096)],
            "inputs": inputs,
            "ours": selective_scan,
            "reference": materialized,  # the recurrence is a loop over tokens, which torch.compile would unroll
            "peers": {},
            "differentiate": (0, 1, 2, 3, 4, 5),
            "bytes": lambda size, itemsize: 3 * entries(size) * itemsize,
            "flops": lambda size: 6 * entries(size) * size["states"],
            "backward_bytes": lambda size, itemsize: 5 * entries(size) * itemsize,
            "backward_flops": lambda size: 20 * entries(size) * size["states"],
        }
    ]
