"""The first-order linear recurrence h_t = a_t h_{t-1} + x_t, as an associative scan in chunks.

A step is the map h -> a h + x, written (a, x). Two steps one after the other are one step again,
    (a1, x1) then (a2, x2)  =  (a1 a2, a2 x1 + x2)
and this `compose` is associative, so the steps of a chunk can be combined in a tree, log2(chunk) levels deep. The state
at the end of a chunk enters the next one: h_t = H_t + A_t h_before, with (A_t, H_t) the composition of the chunk's
steps up to t. The gradient is a scan in the other direction: with g the gradient of h,
    dx_t = g_t + a_{t+1} dx_{t+1},   da_t = dx_t h_{t-1}
State-space models, gated recurrences and moving averages are made of it. Source: "Prefix sums and their applications",
1990.
"""

import torch
from torch.autograd.function import once_differentiable

from ._runtime import accumulator, autotune, check, config, empty, jit, operator, tl, triton, wide


def reference(decay, x, state=None, return_state=False):
    """The recurrence, one token at a time. Arguments as for `linear_scan`."""
    h = torch.zeros_like(x[:, 0]) if state is None and x.shape[1] else state
    h = x.new_zeros(x.shape[0], x.shape[2]) if h is None else h.to(x.dtype)
    out = []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t]
        out.append(h)
    out = torch.stack(out, 1) if out else x
    return (out, h) if return_state else out


def doubling(decay, x):
    """The scan in log2(n) steps over whole tensors: step by step each token hears twice as far. n log2(n) work.

    Any trailing dimensions: decay and x are (b, n, ...).
    """
    reach = 1
    while reach < x.shape[1]:
        x = torch.cat([x[:, :reach], x[:, reach:] + decay[:, reach:] * x[:, :-reach]], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return x


@jit
def compose(decay1, x1, decay2, x2):
    """Step 1, then step 2, as one step: h -> decay2 (decay1 h + x1) + x2."""
    return decay1 * decay2, decay2 * x1 + x2


SIZES = [(64, 32, 4), (128, 32, 4), (32, 64, 4), (64, 64, 8)]
CONFIGS = [config(BLOCK_T=t, BLOCK_C=c, num_warps=warps) for t, c, warps in SIZES]
SMALL = {"BLOCK_T": 16, "BLOCK_C": 4}  # the interpreter walks through a scan element by element


@autotune(CONFIGS, key=["channels"], interpret=SMALL)
@jit
def _forward(
    decay, x, state, out, last, n, channels, a_b, a_n, x_b, x_n,
    GIVEN: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program walks through the tokens of BLOCK_C channels, BLOCK_T tokens at a time."""
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.arange(0, BLOCK_T)
    h = tl.zeros((BLOCK_C,), ACC)
    if GIVEN:
        h = tl.load(state + batch * channels + c, mask=c < channels, other=0.0)
    for start in range(0, n, BLOCK_T):
        t = start + i.to(tl.int64)
        inside = (t < n)[:, None] & (c < channels)[None, :]
        # behind the end: decay 1 and nothing added, so the last row holds the last token's state
        a = tl.load(decay + batch * a_b + t[:, None] * a_n + c[None, :], mask=inside, other=1.0).to(ACC)
        new = tl.load(x + batch * x_b + t[:, None] * x_n + c[None, :], mask=inside, other=0.0).to(ACC)
        faded, sums = tl.associative_scan((a, new), 0, compose)
        values = sums + faded * h[None, :]
        tl.store(out + (batch * n + t[:, None]) * channels + c[None, :], values, mask=inside)
        h = tl.sum(tl.where((i == BLOCK_T - 1)[:, None], values, 0.0), 0)
    tl.store(last + batch * channels + c, h, mask=c < channels)


@autotune(CONFIGS, key=["channels"], interpret=SMALL)
@jit
def _backward(
    decay, out, state, grad, grad_last, dx, da, dstate, n, channels, a_b, a_n, g_b, g_n,
    GIVEN: tl.constexpr, ENDED: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same walk from the end: row i is token n - 1 - i, and its step decays by the token after it."""
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i, known = tl.arange(0, BLOCK_T), c < channels
    carried = tl.zeros((BLOCK_C,), ACC)
    if ENDED:
        carried = tl.load(grad_last + batch * channels + c, mask=known, other=0.0)
    decay += batch * a_b + c[None, :]
    for start in range(0, n, BLOCK_T):
        t = n - 1 - (start + i.to(tl.int64))
        inside = (t >= 0)[:, None] & known[None, :]
        after = (t >= 0) & (t < n - 1)
        a = tl.load(decay + (t + 1)[:, None] * a_n, mask=after[:, None] & known[None, :], other=1.0).to(ACC)
        new = tl.load(grad + batch * g_b + t[:, None] * g_n + c[None, :], mask=inside, other=0.0).to(ACC)
        faded, sums = tl.associative_scan((a, new), 0, compose)
        values = sums + faded * carried[None, :]
        here = (batch * n + t[:, None]) * channels + c[None, :]
        before = tl.load(out + here - channels, mask=(t > 0)[:, None] & known[None, :], other=0.0).to(ACC)
        if GIVEN:
            first = tl.load(state + batch * channels + c, mask=known, other=0.0)
            before = tl.where((t == 0)[:, None], first[None, :], before)
        tl.store(dx + here, values, mask=inside)
        tl.store(da + here, values * before, mask=inside)
        carried = tl.sum(tl.where((i == BLOCK_T - 1)[:, None], values, 0.0), 0)
    if GIVEN:
        first = tl.load(decay, mask=known[None, :], other=0.0).to(ACC)
        tl.store(dstate + batch * channels + c[None, :], carried[None, :] * first, mask=known[None, :])


@operator(
    "(Tensor decay, Tensor x, Tensor? state) -> (Tensor, Tensor)",
    lambda decay, x, state: (x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], dtype=wide(x.dtype))),
)
def compute(decay, x, state):
    """The result and the state behind the last token."""
    b, n, channels = x.shape
    out, last = empty(x.shape, like=x), empty((b, channels), like=x, dtype=wide(x.dtype))
    _forward[lambda meta: (b * triton.cdiv(channels, meta["BLOCK_C"]),)](
        decay, x, last if state is None else state, out, last, n, channels, *decay.stride()[:2], *x.stride()[:2],
        GIVEN=state is not None, ACC=accumulator(x.dtype),
    )  # fmt: skip
    return out, last


@operator(
    "(Tensor decay, Tensor out, Tensor? state, Tensor? grad, Tensor? grad_last) -> Tensor[]",
    lambda decay, out, state, *_: [t.new_empty(t.shape) for t in (out, out, state) if t is not None],
)
def differentiate(decay, out, state, grad, grad_last):
    """The gradients of decay, of x and of the state, if there is one."""
    b, n, channels = out.shape
    grad = torch.zeros_like(out) if grad is None else _rows(grad)
    grad_last = None if grad_last is None else grad_last.contiguous()
    dx, da = empty(out.shape, like=out), empty(out.shape, like=out)
    dstate = None if state is None else empty(state.shape, like=state)
    _backward[lambda meta: (b * triton.cdiv(channels, meta["BLOCK_C"]),)](
        decay, out, out if state is None else state, grad, grad if grad_last is None else grad_last, dx, da,
        dx if state is None else dstate, n, channels, *decay.stride()[:2], *grad.stride()[:2],
        GIVEN=state is not None, ENDED=grad_last is not None, ACC=accumulator(out.dtype),
    )  # fmt: skip
    return [da, dx] if state is None else [da, dx, dstate]


class LinearScan(torch.autograd.Function):
    """Stores decay and the result."""

    @staticmethod
    def forward(decay, x, state):
        return compute(decay, x, state)

    @staticmethod
    def setup_context(ctx, inputs, output):
        decay, _, state = inputs
        ctx.save_for_backward(decay, output[0], state)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_last):
        da, dx, *dstate = differentiate(*ctx.saved_tensors, grad, grad_last)
        return da, dx, dstate[0] if dstate else None


def _rows(x):
    """Channels must be contiguous; batch and tokens may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def linear_scan(decay, x, state=None, return_state=False):
    """h_t = decay_t h_{t-1} + x_t for every channel, all tokens at once.

    decay, x (b, n, c); state (b, c) is h before the first token (default zero); the result is h (b, n, c), with
    return_state=True (h, h after the last token). A decay may be any number, also negative or zero: nothing is divided.
    float16, bfloat16, float32, float64, one for both; carried in float32 (float64 for float64), states likewise.
    Channels are read in place when they are contiguous, else copied. Gradients by decay, x and state, without atomics.
    Stored for backward: decay and h. Traffic: forward 3 numbers an entry, backward 5. One program walks along the
    tokens of a block of channels, so a GPU is full when b c reaches some ten thousand.
    Raises ValueError for shapes, dtypes and devices that do not fit.
    Source: "Prefix sums and their applications", 1990.
    """
    check("linear_scan", decay=decay, x=x)
    if x.ndim != 3 or decay.shape != x.shape:
        raise ValueError(f"linear_scan needs decay and x (b, n, c); got {tuple(decay.shape)} and {tuple(x.shape)}")
    if state is not None:
        check("linear_scan", state=state)
        if state.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"linear_scan: state must be {(x.shape[0], x.shape[2])} for x {tuple(x.shape)}, "
                f"it is {tuple(state.shape)}"
            )
        state = state.to(wide(x.dtype)).contiguous()
    if not x.numel():
        return reference(decay, x, state, return_state)
    out, last = LinearScan.apply(_rows(decay), _rows(x), state)
    return (out, last) if return_state else out


def benchmarks():
    def inputs(size, dtype, device):
        shape = size["batch"], size["tokens"], size["channels"]
        return torch.rand(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype)

    numbers = lambda size: size["batch"] * size["tokens"] * size["channels"]
    return [
        {
            "name": "linear_scan",
            "sizes": [{"batch": 8, "tokens": n, "channels": 4096} for n in (1024, 4096)],
            "inputs": inputs,
            "ours": linear_scan,
            "reference": doubling,  # the recurrence is a loop over tokens, which torch.compile would unroll
            "peers": {},
            "differentiate": (0, 1),
            "bytes": lambda size, itemsize: 3 * numbers(size) * itemsize,
            "flops": None,
            "backward_bytes": lambda size, itemsize: 5 * numbers(size) * itemsize,
            "backward_flops": None,
        }
    ]
