"""Causal linear attention and retention: attention without softmax, as a state that is updated token by token.

    S_t = gamma S_{t-1} + k_t^T v_t        (e, c) for each head, gamma = 1 without decay
    o_t = scale q_t S_t

Computed in chunks. Inside a chunk the quadratic form on tensor cores; across chunks the state:
    o_i = scale (sum_{j <= i} gamma^(i-j) (q_i . k_j) v_j + gamma^(i+1) q_i S)     i, j counted within the chunk
    S  <- gamma^L S + sum_j gamma^(L-1-j) k_j^T v_j                                L tokens in the chunk
Every exponent is at least zero, so a small gamma fades to zero and nothing is ever divided by gamma^n.

Three kernels. A sequence is cut into segments, as many as fill the GPU: `_sums` adds up each segment's own state,
`_carry` runs over the segments and leaves the state before each, `_outputs` takes that state and walks through the
chunks of its segment. The backward pass needs no kernel of its own: with S' = S^T, dq is the linear attention of
(dout, v, k), and dv of (k, q, dout) and dk of (v, dout, q) are the same thing read from the end (REVERSE).
Sources: "Transformers are RNNs", 2020; "Retentive Network: A Successor to Transformer", 2023.
"""

import torch
from torch.autograd.function import once_differentiable

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
    operand,
    operator,
    precision,
    readable,
    tl,
    triton,
    wide,
)

UNIT = 64 if INTERPRET else 256  # a segment's tokens are a multiple of this, which every CHUNK below divides
PROGRAMS = 8 if INTERPRET else 4 * 132  # sequences are cut until about so many programs run
WIDEST = 256  # a wider contraction is done in pieces, because a state (WIDEST, COLUMNS) must fit into registers


def reference(q, k, v, decay=None, scale=None, state=None, return_state=False):
    """The recurrence, one token at a time, in the dtype of q. Arguments as for `linear_attention`."""
    fade = 1.0 if decay is None else decay.to(q.dtype)[:, None, None]
    scale = 1.0 if scale is None else scale
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state.to(q.dtype)
    out = []
    for t in range(q.shape[2]):
        state = fade * state + k[:, :, t, :, None] * v[:, :, t, None, :]  # (b, h, e, c)
        out.append(scale * (q[:, :, t, None] @ state))  # (b, h, 1, c)
    out = torch.cat(out, 2) if out else v * scale  # no tokens
    return (out, state) if return_state else out


def quadratic(q, k, v, decay=None, scale=None):
    """The same as attention with a mask instead of a softmax: (q k^T * D) v, D_ij = gamma^(i-j) for j <= i, else 0."""
    steps = torch.arange(q.shape[2], device=q.device)
    back = steps[:, None] - steps  # (n, n)
    mask = (back >= 0).to(q.dtype)
    if decay is not None:
        mask = mask * decay.to(q.dtype)[:, None, None] ** back.clamp(min=0)  # (h, n, n)
    return (q @ k.transpose(-2, -1) * mask) @ v * (1.0 if scale is None else scale)


@jit
def _tile(x, i, columns, step, left, WIDTH: tl.constexpr, EVEN: tl.constexpr, TAIL: tl.constexpr):
    """Rows i of a chunk that starts at x. EVEN: the columns need no mask. TAIL: only `left` rows exist, others are 0.

    The start is one 64-bit number, the rest small offsets that stay the same from chunk to chunk.
    """
    places = x + (i[:, None] * step + columns[None, :])
    if EVEN and not TAIL:
        values = tl.load(places)
    elif not TAIL:
        values = tl.load(places, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        values = tl.load(places, mask=(i < left)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return values


@jit
def _sums(
    k, v, states, decay, n, heads, segments, span, write,
    k_b, k_h, k_n, v_b, v_h, v_n,
    E: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """states[s + 1] = what segment s adds to the state, for every segment but the last (which is not needed)."""
    tiles_e, tiles_c = tl.cdiv(E, ROWS), tl.cdiv(C, COLUMNS)
    place = tl.program_id(0)
    tile, place = place % (tiles_e * tiles_c), place // (tiles_e * tiles_c)
    segment, head = place % (segments - 1), (place // (segments - 1)).to(tl.int64)
    e = tile // tiles_c * ROWS + tl.arange(0, ROWS)
    c = tile % tiles_c * COLUMNS + tl.arange(0, COLUMNS)
    k += head // heads * k_b + head % heads * k_h
    v += head // heads * v_b + head % heads * v_h
    i = tl.arange(0, CHUNK)
    SIGN: tl.constexpr = 1 - 2 * REVERSE
    fade, weight = 1.0, tl.full((CHUNK,), 1.0, ACC) * write
    if DECAY:
        log_gamma = tl.load(decay + head % heads)
        fade = tl.exp2(CHUNK * log_gamma)
        weight = weight * tl.exp2((CHUNK - 1 - i + REVERSE) * log_gamma)
    state = tl.zeros((ROWS, COLUMNS), ACC)
    first = segment.to(tl.int64) * span
    for start in range(first, first + span, CHUNK):
        row = n - 1 - start if REVERSE else start
        keys = _tile(k + row * k_n, i, e, k_n * SIGN, 0, E, E % ROWS == 0, False).to(DOT)
        values = _tile(v + row * v_n, i, c, v_n * SIGN, 0, C, C % COLUMNS == 0, False).to(ACC) * weight[:, None]
        state = tl.dot(tl.trans(keys), values.to(DOT), state * fade, input_precision=PRECISION, out_dtype=ACC)
    states += (head * segments + segment + 1) * E * C
    tl.store(states + e[:, None] * C + c[None, :], state, mask=(e < E)[:, None] & (c < C)[None, :])


@jit
def _carry(
    states, initial, decay, heads, segments, span, size,
    GIVEN: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place: from what each segment adds (slots 1, 2, ...) to the state before each segment (slots 0, 1, ...)."""
    blocks = tl.cdiv(size, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    fade = 1.0
    if DECAY:
        fade = tl.exp2(span * tl.load(decay + head % heads))
    state = tl.zeros((BLOCK,), ACC)
    if GIVEN:
        state = tl.load(initial + head * size + i, mask=inside, other=0.0)
    states += head * segments * size
    tl.store(states + i, state, mask=inside)
    for slot in range(1, segments):
        state = state * fade + tl.load(states + slot * size + i, mask=inside, other=0.0)
        tl.store(states + slot * size + i, state, mask=inside)


@jit
def _chunk(
    q, k, v, state, decays, read, weight, fade,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: its outputs (from its own tokens and from the state before it) and the state after it."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * decays
    past = tl.dot(q, state.to(DOT), input_precision=PRECISION, out_dtype=ACC) * read[:, None]
    result = tl.dot(scores.to(DOT), v, past, input_precision=PRECISION, out_dtype=ACC)
    faded = (v.to(ACC) * weight[:, None]).to(DOT)  # fewer columns than k has
    return result, tl.dot(tl.trans(k), faded, state * fade, input_precision=PRECISION, out_dtype=ACC)


def _configs(*sizes):
    return [config(CHUNK=chunk, COLUMNS=c, num_warps=warps, num_stages=stages) for chunk, c, warps, stages in sizes]


CONFIGS = _configs((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3),
                   (32, 32, 4, 1))  # fmt: skip
EXACT = _configs((16, 32, 4, 1), (16, 32, 8, 1))  # float32 without tensor cores: larger tiles spill all registers


def _usable(configs, arguments, **constants):
    """Small tiles for exact float32, else those that fit into shared memory: three tiles a stage, state and scores."""
    small = constants["DOT"] == tl.float32 and constants["PRECISION"] == "ieee"
    q, rows = arguments["q"], constants["ROWS"]

    def need(c):
        chunk, columns = c.kwargs["CHUNK"], c.kwargs["COLUMNS"]
        tiles = c.num_stages * chunk * (2 * rows + columns)
        return (tiles + rows * columns + chunk * chunk) * q.element_size()

    return in_shared([c for c in configs if (c.kwargs["CHUNK"] == 16) == small], q, need)


@autotune(
    CONFIGS + EXACT,
    key=["E", "C", "PRECISION"],
    interpret={"CHUNK": 32, "COLUMNS": 64},
    prune_configs_by={"early_config_prune": _usable},
)
@jit
def _outputs(
    q, k, v, out, states, final, decay, n, heads, segments, span, read, write,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, s_h, s_s, s_e, s_c,
    E: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, GIVEN: tl.constexpr,
    FINAL: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment, chunk by chunk, for COLUMNS columns of v. REVERSE counts tokens from the end.

    A state read by a token has faded once on the way forward (i + 1 steps) and not on the way back (i steps), because
    the gradient of S_t meets no decay before token t; what a chunk hands on then fades once more instead.
    """
    tiles = tl.cdiv(C, COLUMNS)
    place = tl.program_id(0)
    tile, place = place % tiles, place // tiles
    segment, head = place % segments, (place // segments).to(tl.int64)
    e, c = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    q += head // heads * q_b + head % heads * q_h
    k += head // heads * k_b + head % heads * k_h
    v += head // heads * v_b + head % heads * v_h
    out += head * n * C

    i = tl.arange(0, CHUNK)
    SIGN: tl.constexpr = 1 - 2 * REVERSE
    back = i[:, None] - i[None, :]
    decays = tl.where(back >= 0, 1.0, 0.0).to(ACC) * (read * write)
    reads, weight, fade = tl.full((CHUNK,), 1.0, ACC) * read, tl.full((CHUNK,), 1.0, ACC) * write, 1.0
    log_gamma = 0.0
    if DECAY:
        log_gamma = tl.load(decay + head % heads)
        decays = decays * tl.exp2(tl.maximum(back, 0) * log_gamma)
        reads = reads * tl.exp2((i + 1 - REVERSE) * log_gamma)
        weight = weight * tl.exp2((CHUNK - 1 - i + REVERSE) * log_gamma)
        fade = tl.exp2(CHUNK * log_gamma)

    known = (e < E)[:, None] & (c < C)[None, :]
    state = tl.zeros((ROWS, COLUMNS), ACC)
    if GIVEN:
        states += head * s_h + segment * s_s
        state = tl.load(states + e[:, None] * s_e + c[None, :] * s_c, mask=known, other=0.0)
    first = segment.to(tl.int64) * span
    last = tl.minimum(first + span, n)
    whole = first + (last - first) // CHUNK * CHUNK
    for start in range(first, whole, CHUNK):
        row = n - 1 - start if REVERSE else start
        queries = _tile(q + row * q_n, i, e, q_n * SIGN, 0, E, E == ROWS, False).to(DOT)
        keys = _tile(k + row * k_n, i, e, k_n * SIGN, 0, E, E == ROWS, False).to(DOT)
        values = _tile(v + row * v_n, i, c, v_n * SIGN, 0, C, C % COLUMNS == 0, False).to(DOT)
        result, state = _chunk(queries, keys, values, state, decays, reads, weight, fade, DOT, ACC, PRECISION)
        places = out + row * C + (i[:, None] * (C * SIGN) + c[None, :])
        tl.store(places, result, mask=(c < C)[None, :])
    for start in range(whole, last, CHUNK):  # the chunk that is not full, if there is one
        row, left = n - 1 - start if REVERSE else start, last - start
        if DECAY:
            fade = tl.exp2(left * log_gamma)
            weight = write * tl.exp2(tl.maximum(left - 1 - i + REVERSE, 0) * log_gamma)
        queries = _tile(q + row * q_n, i, e, q_n * SIGN, left, E, E == ROWS, True).to(DOT)
        keys = _tile(k + row * k_n, i, e, k_n * SIGN, left, E, E == ROWS, True).to(DOT)
        values = _tile(v + row * v_n, i, c, v_n * SIGN, left, C, C % COLUMNS == 0, True).to(DOT)
        result, state = _chunk(queries, keys, values, state, decays, reads, weight, fade, DOT, ACC, PRECISION)
        places = out + row * C + (i[:, None] * (C * SIGN) + c[None, :])
        tl.store(places, result, mask=(i < left)[:, None] & (c < C)[None, :])
    if FINAL:
        final += head * E * C
        mine = e < tl.where(segment == segments - 1, E, 0)
        tl.store(final + e[:, None] * C + c[None, :], state, mask=mine[:, None] & (c < C)[None, :])


def _plan(b, h, n, columns):
    """Tokens in a segment, and how many segments."""
    wanted = max(1, PROGRAMS // (b * h * triton.cdiv(columns, 64)))
    span = triton.cdiv(triton.cdiv(n, wanted), UNIT) * UNIT
    return span, triton.cdiv(n, span)


def _kinds(dtype):
    return {"DOT": operand(dtype), "ACC": accumulator(dtype), "PRECISION": precision(dtype)}


def _exact(dtype):
    """float32 without tensor cores, see EXACT."""
    return dtype == torch.float32 and precision(dtype) == "ieee" and not INTERPRET


def _boundaries(k, v, decay, initial, plan, write=1.0, reverse=False):
    """The state before each segment (b h, segments, e, c), or None when it is zero and there is one segment."""
    (b, h, n, e), c, (span, segments) = k.shape, v.shape[-1], plan
    if segments == 1:
        return None if initial is None else initial.reshape(b * h, 1, e, c)
    states = empty((b * h, segments, e, c), like=k, dtype=wide(k.dtype))
    exact = _exact(k.dtype)
    rows, columns = (min(32 if exact else 64, max(16, triton.next_power_of_2(size))) for size in (e, c))
    _sums[(triton.cdiv(e, rows) * triton.cdiv(c, columns) * (segments - 1) * b * h,)](
        k, v, states, k if decay is None else decay, n, h, segments, span, write, *k.stride()[:3], *v.stride()[:3],
        E=e, C=c, REVERSE=int(reverse), DECAY=decay is not None, **_kinds(k.dtype), ROWS=rows, COLUMNS=columns,
        CHUNK=16 if exact else 64, num_warps=4, num_stages=1 if exact else 3,
    )  # fmt: skip
    _carry[(triton.cdiv(e * c, 1024) * b * h,)](
        states, states if initial is None else initial, states if decay is None else decay, h, segments, span, e * c,
        GIVEN=initial is not None, DECAY=decay is not None, ACC=accumulator(k.dtype), BLOCK=1024,
    )  # fmt: skip
    return states


def _attend(q, k, v, decay, states, plan, read=1.0, write=1.0, reverse=False, final=False, dtype=None):
    """Outputs (b, h, n, c) and, if `final`, the state at the end (b, h, e, c), from the states before each segment."""
    (b, h, n, e), c, (span, segments) = q.shape, v.shape[-1], plan
    widest = WIDEST // 2 if _exact(q.dtype) else WIDEST
    if e > widest:
        cuts = [slice(start, start + widest) for start in range(0, e, widest)]
        parts = [
            _attend(q[..., cut], k[..., cut], v, decay, None if states is None else states[..., cut, :], plan, read,
                    write, reverse, final, wide(q.dtype))
            for cut in cuts
        ]  # fmt: skip
        out = torch.stack([part[0] for part in parts]).sum(0).to(dtype or v.dtype)
        return out, torch.cat([part[1] for part in parts], 2) if final else None
    out = empty((b, h, n, c), like=v, dtype=dtype)
    last = empty((b, h, e, c), like=v, dtype=wide(v.dtype)) if final else None
    _outputs[lambda meta: (triton.cdiv(c, meta["COLUMNS"]) * segments * b * h,)](
        q, k, v, out, out if states is None else states, out if last is None else last, q if decay is None else decay,
        n, h, segments, span, read, write, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0,) * 4 if states is None else states.stride()),
        E=e, C=c, REVERSE=int(reverse), DECAY=decay is not None, GIVEN=states is not None, FINAL=final,
        **_kinds(q.dtype), ROWS=max(16, triton.next_power_of_2(e)),
    )  # fmt: skip
    return out, last


def _states_shape(q, k, v, log_decay, state, scale, final):
    """What `compute` returns, for compilers. Sizes that are symbols become numbers."""
    (b, h, n, e), c = q.shape, v.shape[-1]
    segments, acc = _plan(int(b), int(h), int(n), int(c))[1], wide(q.dtype)
    found = [v.new_empty(b, h, n, c)]
    found += [v.new_empty(b, h, e, c, dtype=acc)] if final else []
    return found + ([v.new_empty(b * h, segments, e, c, dtype=acc)] if segments > 1 else [])


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, float scale, bool final) -> Tensor[]",
    _states_shape,
)
def compute(q, k, v, log_decay, state, scale, final):
    """The outputs; if `final`, the state behind the last token; the states before each of several segments."""
    plan = _plan(*q.shape[:3], v.shape[-1])
    states = _boundaries(k, v, log_decay, state, plan)
    out, last = _attend(q, k, v, log_decay, states, plan, read=scale, final=final)
    return [out, *([last] if final else []), *([states] if plan[1] > 1 else [])]


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, Tensor? states, Tensor? grad, Tensor? grad_last,"
    " float scale) -> Tensor[]",
    lambda q, k, v, log_decay, state, *_: [t.new_empty(t.shape) for t in (q, k, v, state) if t is not None],
)
def differentiate(q, k, v, log_decay, state, states, grad, grad_last, scale):
    """The gradients of q, k and v, and of the first state if one was given."""
    (b, h, n, e), c = q.shape, v.shape[-1]
    plan = _plan(b, h, n, c)
    if states is None and state is not None:
        states = state.reshape(b * h, 1, e, c)
    grad = torch.zeros_like(v) if grad is None else _rows(grad)
    grad_last = None if grad_last is None else grad_last.contiguous()
    turned = lambda states: None if states is None else states.transpose(-2, -1)
    dq, _ = _attend(grad, v, k, log_decay, turned(states), plan, read=scale)
    ahead = _boundaries(q, grad, log_decay, grad_last, plan, write=scale, reverse=True)
    back = {"write": scale, "reverse": True}
    dv, dstate = _attend(k, q, grad, log_decay, ahead, plan, final=state is not None, **back)
    dk, _ = _attend(v, grad, q, log_decay, turned(ahead), plan, **back)
    return [dq, dk, dv] if state is None else [dq, dk, dv, dstate]


class LinearAttention(torch.autograd.Function):
    """Stores q, k, v and the states before each segment."""

    @staticmethod
    def forward(q, k, v, log_decay, state, scale, final):
        return tuple(compute(q, k, v, log_decay, state, scale, final))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.final = inputs
        states = output[1 + ctx.final :]
        ctx.mark_non_differentiable(*states)
        ctx.save_for_backward(*tensors, *(states or (None,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *rest):
        grad_last = rest[0] if ctx.final else None
        dq, dk, dv, *dstate = differentiate(*ctx.saved_tensors, grad, grad_last, ctx.scale)
        return dq, dk, dv, None, dstate[0] if dstate else None, None, None


def _rows(x):
    """Rows must be contiguous; heads, batch and tokens may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def linear_attention(q, k, v, decay=None, scale=None, state=None, return_state=False, mask=None):
    """Causal attention without softmax: S_t = gamma S_{t-1} + k_t^T v_t, o_t = scale q_t S_t.

    q, k (b, h, n, e), v (b, h, n, c); feature maps are the caller's. decay (h,) holds a gamma in (0, 1] for each head
    and makes it retention (`retention_decay` gives RetNet's); scale defaults to 1. state (b, h, e, c) is S before the
    first token; with return_state=True the result is (out, S after the last token), so that segments of a sequence can
    be computed one after another. mask (b, 1, 1, n), True at real tokens, takes padding out of the keys. The weights
    are not normalised: see `normalized_linear_attention`.

    float16, bfloat16, float32, float64, one for q, k and v; states are float32 (float64 for float64). In float16 a
    state beyond 65504 overflows when it is multiplied; bfloat16 does not. Rows are read in place when they are
    contiguous (a transposed (b, n, h, e) is), else copied. Gradients by q, k, v and state, deterministic (no atomics);
    decay is a constant, and one that requires a gradient is refused. Stored for backward: q, k, v and a state for each
    segment. Forward reads q, k, v and writes out: (2 e + 2 c) numbers a token, plus 4 e c a segment (a segment has
    hundreds of tokens); 4 e c + about CHUNK (e + c) FLOPs a token. Memory does not grow with n * n.
    Raises ValueError for shapes, dtypes or devices that do not fit, and on a CPU for a decay outside (0, 1] (looking
    would stop a GPU's queue: there a decay below or at 0 gives nan).
    Sources: "Transformers are RNNs", 2020; "Retentive Network: A Successor to Transformer", 2023.
    """
    q, k, v = autocast(q, k, v)
    check("linear_attention", q=q, k=k, v=v)
    if q.ndim != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            "linear_attention needs q, k (b, h, n, e) and v (b, h, n, c); "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    (b, h, n, e), c = q.shape, v.shape[-1]
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) not in {(b, 1, 1, n), (1, 1, 1, n)}:
            raise ValueError(
                f"linear_attention is causal by itself; mask is boolean, ({b}, 1, 1, {n}), for padding; "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        k = k.masked_fill(~mask.transpose(-2, -1), 0)
    if decay is not None:
        _check_decay(decay, h)
    if state is not None:
        check("linear_attention", state=state)
        if state.shape != (b, h, e, c):
            raise ValueError(f"linear_attention: state must be {(b, h, e, c)}, it is {tuple(state.shape)}")
        state = state.to(wide(q.dtype)).contiguous()
    if not q.numel() or not v.numel():
        return reference(q, k, v, decay, scale, state, return_state)
    log_decay = None if decay is None else decay.double().log2().to(wide(q.dtype))
    scale = 1.0 if scale is None else float(scale)
    found = LinearAttention.apply(_rows(q), _rows(k), _rows(v), log_decay, state, scale, return_state)
    return found[:2] if return_state else found[0]


def _check_decay(decay, heads):
    check("linear_attention", decay=decay)
    if decay.shape != (heads,):
        raise ValueError(f"linear_attention: decay has one number per head, ({heads},); got {tuple(decay.shape)}")
    if decay.requires_grad:
        raise ValueError("linear_attention: decay is a constant and requires a gradient here; pass decay.detach()")
    if readable(decay) and not ((decay > 0) & (decay <= 1)).all():
        raise ValueError(f"linear_attention: decay must be in (0, 1], got {decay.tolist()}")


def normalized_linear_attention(q, k, v, decay=None, mask=None):
    """Linear attention whose weights sum to one: o_t = q_t S_t / (q_t . z_t), z_t = gamma z_{t-1} + k_t.

    The normaliser is what attention makes of a column of ones, so v gets such a column (one copy of v). q and k are
    positive features, elu(x) + 1 for example: the sum is then never zero. Arguments otherwise as `linear_attention`.
    Source: "Transformers are RNNs", 2020.
    """
    q, k, v = autocast(q, k, v)
    check("normalized_linear_attention", q=q, k=k, v=v)
    out = linear_attention(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), decay, mask=mask)
    return out[..., :-1] / out[..., -1:]


def retention_decay(heads, device=None):
    """RetNet's gamma for each head (heads,): 1 - 2^(-5 - h), from 0.969 up. Source: "Retentive Network", 2023."""
    return 1 - 2.0 ** (-5 - torch.arange(heads, device=device, dtype=torch.float32))


def benchmarks():
    def inputs(size, dtype, device):
        b, h, n, e = size["batch"], size["heads"], size["tokens"], size["width"]
        q, k, v = torch.randn(3, b, h, n, e, device=device, dtype=dtype).unbind(0)
        return q * e**-0.5, k, v, retention_decay(h, device)

    numbers = lambda size: size["batch"] * size["heads"] * size["tokens"] * size["width"]
    return [
        {
            "name": "linear_attention",
            "sizes": [
                {"batch": 4, "heads": 16, "tokens": n, "width": width} for n in (1024, 4096) for width in (64, 128)
            ],
            "tiny": {"batch": 1, "heads": 2, "tokens": 70, "width": 16},
            "inputs": inputs,
            "ours": linear_attention,
            "reference": quadratic,  # the recurrence is a loop over tokens, which torch.compile would unroll
            "peers": {},
            "differentiate": (0, 1, 2),
            "bytes": lambda size, itemsize: 4 * numbers(size) * itemsize,
            "flops": lambda size: 4 * numbers(size) * size["width"],
            "backward_bytes": lambda size, itemsize: 7 * numbers(size) * itemsize,
            "backward_flops": lambda size: 10 * numbers(size) * size["width"],
        }
    ]
