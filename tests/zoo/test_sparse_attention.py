"""Chapter 10: every pattern against masked dense attention on random shapes, published models, and broken twins."""

import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.past import remember
from tfkit.zoo import sparse_attention as z
from tfkit.zoo.attention import (
    MultiHeadAttention,
    attention,
    attention_weights,
    causal_attention,
    causal_mask,
    padding_mask,
)
from tfkit.zoo.transformer import FeedForward, generate, language_model

SIZES = [(2, 4, 23, 8), (1, 2, 12, 4), (3, 2, 37, 3)]  # batch, heads, tokens, head width
sizes = pytest.mark.parametrize("b, h, n, e", SIZES)


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def qkv(b, h, n, e):
    return torch.randn(3, b, h, n, e).unbind(0)


def dense(rule, n):
    return partial(attention, mask=z.pattern(rule, n))


def block_rule(blocks, size):
    """BigBird's rule from its table, one block at a time."""
    count = len(blocks)
    table = torch.zeros(count, count, dtype=torch.bool)
    for g in range(count):
        for r in blocks[g].tolist():
            if r >= 0:
                table[g, r] = True
    table[0] = table[-1] = table[:, 0] = table[:, -1] = True
    return lambda i, j: table[i // size, j // size]


# ------------------------------------------------------------------------------------------------ patterns and blocks


def test_rules_one_pair_at_a_time():
    rules = {
        "window": (z.window_rule(2), lambda i, j: abs(i - j) <= 2),
        "causal": (z.causal_window_rule(3), lambda i, j: 0 <= i - j < 3),
        "dilated": (z.dilated_rule(2, 3), lambda i, j: abs(i - j) in (0, 3, 6)),
        "global": (z.global_rule(2), lambda i, j: i < 2 or j < 2),
        "either": (z.either(z.window_rule(1), z.global_rule(1)), lambda i, j: abs(i - j) <= 1 or i < 1 or j < 1),
        "fixed": (z.FixedPattern(4, 2).rule, lambda i, j: j <= i and (i // 4 == j // 4 or j % 4 >= 2)),
    }
    for name, (rule, one) in rules.items():
        expected = torch.tensor([[one(i, j) for j in range(13)] for i in range(13)])
        assert torch.equal(z.pattern(rule, 13), expected), name


def test_tables_of_blocks():
    assert z.neighbor_blocks(3, 1, 1).tolist() == [[-1, 0, 1], [0, 1, 2], [1, 2, -1]]
    for count in range(1, 12):
        for random in range(4):
            blocks = z.big_bird_blocks(count, random, seed=count)
            for g, row in enumerate(blocks.tolist()):
                real = [r for r in row if r >= 0]
                assert len(set(real)) == len(real), "no block twice"
                assert all(r < count for r in real) and g in real
                assert not {0, count - 1} & set(row[3:]), "global blocks are not drawn"


@sizes
def test_causal_window(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    for window in (1, 4, n, n + 5):
        assert contracts.reduces_to(z.CausalWindow(window), dense(z.causal_window_rule(window), n), q, k, v)
    assert contracts.agree(z.CausalWindow(n), causal_attention, q, k, v)
    assert not contracts.agree(z.CausalWindow(4), dense(z.causal_window_rule(5), n), q, k, v, atol=1e-3)
    last = z.CausalWindow(4)(q[:, :, -3:], k, v)
    assert torch.allclose(last, z.CausalWindow(4)(q, k, v)[:, :, -3:], atol=1e-5)


@sizes
def test_window_with_first_tokens_and_padding(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    real = padding_mask(torch.arange(n) < torch.randint(4, n + 1, (b, 1)))
    for radius, first in ((1, 0), (3, 2), (n, 1)):
        attend = z.Window(radius, first)
        allowed = z.pattern(attend.rule, n)
        assert contracts.reduces_to(attend, partial(attention, mask=allowed), q, k, v)
        assert contracts.agree(partial(attend, mask=real), partial(attention, mask=real & allowed), q, k, v)
    assert contracts.agree(z.Window(n), attention, q, k, v)


@sizes
@pytest.mark.parametrize("step", [1, 2, 5])
def test_dilation(seed, b, h, n, e, step):
    q, k, v = qkv(b, h, n, e)
    same = lambda i, j: (i - j) % step == 0
    for attend, rule in (
        (z.CausalWindow(3), lambda i, j: (j <= i) & (i - j < 3 * step) & same(i, j)),
        (causal_attention, lambda i, j: (j <= i) & same(i, j)),
        (z.Window(2), z.dilated_rule(2, step)),
        (attention, same),
    ):
        dilated = z.Dilated(attend, step)
        assert contracts.reduces_to(dilated, dense(rule, n), q, k, v)
        real = torch.arange(n) < n - 2
        masked = partial(attention, mask=z.pattern(rule, n) & real)
        if attend is not causal_attention:
            found = partial(dilated, mask=padding_mask(real[None]).expand(b, 1, 1, n))
            assert contracts.agree(found, masked, q, k, v)


@sizes
def test_big_bird(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    for size, random in ((3, 1), (4, 2), (2, 3), (n, 1)):
        attend, count = z.BigBird(size, random, seed), -(-n // size)
        rule = block_rule(attend.blocks(count), size)
        assert contracts.reduces_to(attend, dense(rule, n), q, k, v)
        real = padding_mask((torch.arange(n) < n - 3).expand(b, n))
        both = partial(attention, mask=z.pattern(rule, n) & real)
        assert contracts.agree(partial(attend, mask=real), both, q, k, v)
    assert contracts.agree(z.BigBird(3, 99), attention, q, k, v)
    assert not contracts.agree(z.BigBird(2, 1), z.BigBird(2, 0), q, k, v, atol=1e-4) or n < 13


def test_an_extra_key_counts_once():
    torch.manual_seed(0)
    q, k, v = qkv(2, 2, 12, 4)
    rule, blocks = z.causal_window_rule(12), z.neighbor_blocks(3, 2, 0)
    once = partial(z.gathered_attention, rule=rule, blocks=blocks, size=4, extra=torch.tensor([1, 6]))
    assert contracts.agree(once, causal_attention, q, k, v)
    doubled = torch.cat([blocks, blocks[:, :1]], 1)  # a block listed twice is the caller's mistake, and it shows
    twice = partial(z.gathered_attention, rule=rule, blocks=doubled, size=4)
    assert not contracts.agree(twice, causal_attention, q, k, v, atol=1e-3)


def test_no_n_by_n_tensor():
    for make in (
        lambda n: z.CausalWindow(32),
        lambda n: z.Window(16, 2),
        lambda n: z.BigBird(16, 2),
        lambda n: z.logsparse_attention,
        lambda n: z.NeighborAttention(8),
    ):
        lengths = [256, 512, 1024]
        used = [measure.peak_bytes(make(n), *qkv(1, 1, n, 8)) for n in lengths]
        assert measure.growth(lengths, used).exponent < 1.25
    used = [measure.peak_bytes(z.FixedPattern(math.isqrt(n)), *qkv(1, 1, n, 8)) for n in (256, 576, 1024)]
    assert measure.growth((256, 576, 1024), used).exponent < 1.6


# --------------------------------------------------------------------------------------------------- sparse transformer


@sizes
def test_sparse_transformer_patterns(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    for stride in (2, 5, n):
        near = z.pattern(z.causal_window_rule(stride + 1), n)
        far = z.pattern(lambda i, j, step=stride: (j <= i) & ((i - j) % step == 0), n)
        masks = torch.stack([near] * (h // 2) + [far] * (h // 2))
        assert contracts.reduces_to(z.strided_heads(stride), partial(attention, mask=masks[None]), q, k, v)
        assert torch.equal(far.float() @ near.float() > 0, causal_mask(n)), "two steps reach everything"
        assert torch.equal(near.float() @ far.float() > 0, causal_mask(n))
    for block, columns in ((4, 1), (5, 2), (3, 3), (n, 1)):
        fixed = z.FixedPattern(block, columns)
        assert contracts.reduces_to(fixed, dense(fixed.rule, n), q, k, v)
    assert contracts.agree(z.FixedPattern(n), causal_attention, q, k, v)
    assert not contracts.agree(z.FixedPattern(4, 1), causal_attention, q, k, v, atol=1e-3)


def test_sparse_transformer_recomputation(seed):
    model = z.sparse_transformer(20, 16, 3, 2, 4, 4)
    ids = torch.randint(20, (2, 16))
    assert contracts.causal(model, ids)

    def gradients():
        model.zero_grad()
        model(ids).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    kept, found = measure.saved_bytes(model, ids), gradients()
    model.stack.blocks = nn.ModuleList([block.part for block in model.stack.blocks])
    assert all(map(torch.equal, found, gradients()))
    assert kept < 0.3 * measure.saved_bytes(model, ids)


def test_sparse_transformer_scaled_start():
    torch.manual_seed(0)
    plain = language_model(20, 16, 3)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    z.scale_residual_(plain)
    for name, p in plain.named_parameters():
        factor = 6**-0.5 if name.endswith(("to_out.weight", "down.weight")) else 1.0
        assert torch.allclose(p, before[name] * factor), name


def test_sparse_transformer_grid_positions(seed):
    grid, x = z.GridPositions(3, 4, 5), torch.randn(2, 12, 5)
    for t in range(12):
        assert torch.allclose(grid(x)[:, t], x[:, t] + grid.row[t // 4] + grid.column[t % 4])
    assert torch.allclose(grid(x[:, 7:], start=7), grid(x)[:, 7:])


# ------------------------------------------------------------------------------------------------------------ masformer


def test_masformer_limits_and_reach(seed):
    ids, n = torch.randint(20, (2, 17)), 17
    plain = language_model(20, 16, 3, mixer=lambda: MultiHeadAttention(16, 2, attend=causal_attention))
    for window, full in ((n, ()), (1, (0, 1, 2)), (n + 3, (1,))):
        model = z.masformer(20, 16, 3, 2, window, full)
        model.load_state_dict(plain.state_dict())
        assert contracts.agree(model, plain, ids)
    narrow = z.masformer(20, 16, 3, 2, 4, (1,))
    narrow.load_state_dict(plain.state_dict())
    assert not contracts.agree(narrow, plain, ids, atol=1e-3)
    for window in (2, 4):
        reach = z.pattern(z.causal_window_rule(3 * (window - 1) + 1), n)
        assert contracts.structured(z.masformer(20, 16, 3, 2, window, ()), ids, reach)
    for layer in range(3):
        assert contracts.structured(z.masformer(20, 16, 3, 2, 3, (layer,)), ids, causal_mask(n))


def test_masformer_writes_with_its_cache(seed):
    model = z.masformer(20, 16, 2, 2, window=4, full=(1,))
    longer = generate(model, torch.randint(20, (2, 3)), 9)
    for t in range(3, 12):
        assert torch.equal(longer[:, t], model(longer[:, :t])[:, -1].argmax(-1))


# ------------------------------------------------------------------------------------------------------------- combiner


def combiner_by_hand(q, k, v, regions):
    """One softmax over direct words and regions, one query at a time; regions(i) lists ranges, single words direct."""
    scale, out = q.shape[-1] ** -0.5, torch.zeros(*q.shape[:3], v.shape[-1])
    for i in range(q.shape[2]):
        scores, values = [], []
        for start, stop in regions(i):
            part = slice(start, stop)
            key, question = k[:, :, part].amax(2), q[:, :, part].amax(2)
            weights = ((question.unsqueeze(2) * k[:, :, part]).sum(-1) * scale).softmax(-1)
            scores.append((q[:, :, i] * key).sum(-1) * scale)
            values.append((weights.unsqueeze(-1) * v[:, :, part]).sum(2))
        weights = torch.stack(scores, -1).softmax(-1)
        out[:, :, i] = (weights.unsqueeze(-1) * torch.stack(values, 2)).sum(2)
    return out


def fixed_regions(span):
    def regions(i):
        g = i // span
        return [(r * span, (r + 1) * span) for r in range(g)] + [(j, j + 1) for j in range(g * span, i + 1)]

    return regions


def binary_regions(i):
    found, end = [(i, i + 1)], i
    for level in range(i.bit_length()):
        if i >> level & 1:
            found.append((end - 2**level, end))
            end -= 2**level
    assert end == 0
    return found


@sizes
def test_combiner_equals_its_definition(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    for span in (2, 5, 8):
        slow = partial(combiner_by_hand, regions=fixed_regions(span))
        assert contracts.agree(partial(z.combiner_attention, span=span), slow, q, k, v)
    assert contracts.reduces_to(z.logsparse_attention, partial(combiner_by_hand, regions=binary_regions), q, k, v)
    shifted = partial(combiner_by_hand, regions=fixed_regions(4))
    assert not contracts.agree(partial(z.combiner_attention, span=5), shifted, q, k, v, atol=1e-3)


@sizes
def test_combiner_limits_and_support(seed, b, h, n, e):
    q, k, v = qkv(b, h, n, e)
    for span in (1, n, n + 4):
        assert contracts.reduces_to(partial(z.combiner_attention, span=span), causal_attention, q, k, v)
    one_hot, lower = torch.eye(n).expand(b, h, n, n), causal_mask(n)
    for attend in (partial(z.combiner_attention, span=4), z.logsparse_attention):
        found = attend(q, k, one_hot)
        assert (found[..., lower] > 0).all() and (found[..., ~lower] == 0).all()
        assert torch.allclose(found.sum(-1), torch.ones(b, h, n), atol=1e-5)
        assert contracts.causal(MultiHeadAttention(16, 2, attend=attend), torch.randn(2, 11, 16))
    sparse = z.FixedPattern(4)(q, k, one_hot)
    assert (sparse[..., lower] == 0).any()


# ------------------------------------------------------------------------------------------------------------- reformer


def pairs_that_meet(buckets, chunk):
    """By sorting one row at a time."""
    b, h, r, n = buckets.shape
    met = torch.zeros(b, h, n, n, dtype=torch.bool)
    count = -(-n // chunk)
    for x in range(b):
        for y in range(h):
            for t in range(r):
                row = buckets[x, y, t].tolist()
                order = sorted(range(n), key=lambda i: (row[i], i))
                home = {i: place // chunk for place, i in enumerate(order)}
                for i in range(n):
                    for j in range(n):
                        back = (home[i] - home[j]) % count
                        met[x, y, i, j] |= row[i] == row[j] and back <= 1
    return met


@pytest.mark.parametrize("b, h, n, e", [(1, 2, 13, 4), (2, 1, 20, 8)])
@pytest.mark.parametrize("rounds, chunk", [(1, 4), (2, 5), (4, 3), (3, 30)])
def test_reformer_attends_to_exactly_the_pairs_that_meet(seed, b, h, n, e, rounds, chunk):
    qk, v, _ = qkv(b, h, n, e)
    buckets = z.lsh_buckets(qk, torch.randn(h, rounds, e, 2))
    met = pairs_that_meet(buckets, chunk)
    for sees, order in ((torch.ge, causal_mask(n)), (lambda i, j: i == i, torch.ones(n, n, dtype=torch.bool))):
        if sees is not torch.ge:
            sees = lambda i, j: (i >= 0) & (j >= 0)
        fast = partial(z.lsh_attention, buckets=buckets, chunk=chunk, sees=sees)
        slow = partial(z.shared_qk_attention, mask=met & order)
        assert contracts.reduces_to(fast, slow, qk, v)
    if rounds > 1:  # without the count of double pairs it is another function
        separate = [z.lsh_attention(qk, v, buckets[:, :, t : t + 1], chunk) for t in range(rounds)]
        mean = torch.stack(separate).mean(0)
        assert not torch.allclose(mean, z.lsh_attention(qk, v, buckets, chunk), atol=1e-4)


@pytest.mark.parametrize("b, h, n, e", [(1, 2, 13, 4), (2, 1, 20, 8)])
@pytest.mark.parametrize("rounds, chunk", [(1, 4), (2, 5), (4, 3), (3, 30)])
def test_reformer_meetings_and_the_papers_weights(seed, b, h, n, e, rounds, chunk):
    qk, v, _ = qkv(b, h, n, e)
    buckets = z.lsh_buckets(qk, torch.randn(h, rounds, e, 2))
    chunks = z.Chunks(buckets, chunk)
    here, times = z.meetings(chunks, buckets)
    first = z.first_meetings(chunks, buckets)
    separate = torch.stack([pairs_that_meet(buckets[:, :, t : t + 1], chunk) for t in range(rounds)], 2)
    i = chunks.order.unflatten(3, (chunks.count, -1)).unsqueeze(-1)
    j = chunks.with_previous(i).transpose(-2, -1)
    real = ((i < n) & (j < n)).nonzero().tolist()
    for x, y, t, g, s, u in real:
        met = separate[x, y, :, i[x, y, t, g, s, 0], j[x, y, t, g, 0, u]]
        assert here[x, y, t, g, s, u] == met[t] and times[x, y, t, g, s, u] == met.sum()
        assert first[x, y, t, g, s, u] == (met[t] and not met[:t].any())

    def with_counts(qk, v):
        q, values = chunks.sort(qk), chunks.with_previous(chunks.sort(v))
        scores = q @ chunks.with_previous(F.normalize(q, dim=-1)).transpose(-2, -1)
        scores = scores.masked_fill(~(here & (j <= i)), -torch.inf).masked_fill(i == j, -1e5)
        scores = scores - times.clamp(min=1).log()
        share = chunks.undo(scores.logsumexp(-1, keepdim=True)).softmax(2)
        return (chunks.undo(scores.softmax(-1) @ values) * share).sum(2)

    assert contracts.reduces_to(partial(z.lsh_attention, buckets=buckets, chunk=chunk), with_counts, qk, v)


def test_reformer_limits(seed):
    qk, v, _ = qkv(2, 2, 17, 6)
    one = torch.zeros(2, 2, 3, 17, dtype=torch.long)
    full = partial(z.shared_qk_attention, mask=causal_mask(17))
    assert contracts.reduces_to(partial(z.lsh_attention, buckets=one, chunk=17), full, qk, v)
    alone = torch.arange(17).expand(2, 2, 1, 17)
    assert torch.allclose(z.lsh_attention(qk, v, alone, 4), v), "alone in its bucket, a token sees itself"
    narrow = partial(z.lsh_attention, buckets=one, chunk=4)
    assert not contracts.agree(narrow, full, qk, v, atol=1e-3)


def test_reformer_shared_attention_by_hand(seed):
    qk, v, _ = qkv(1, 1, 5, 4)
    out = z.shared_qk_attention(qk, v, causal_mask(5))[0, 0]
    q, w = qk[0, 0], v[0, 0]
    assert torch.allclose(out[0], w[0])
    for i in range(1, 5):
        weights = torch.stack([q[i] @ q[j] / q[j].norm() for j in range(i)]).softmax(0)
        assert torch.allclose(out[i], weights @ w[:i], atol=1e-5)


def test_reformer_more_rounds_come_nearer():
    torch.manual_seed(0)
    qk, v = torch.randn(2, 4, 2, 64, 8).unbind(0)
    qk = 3 * qk
    full = z.shared_qk_attention(qk, v, causal_mask(64))
    gaps = []
    for rounds in (1, 4, 16):
        buckets = z.lsh_buckets(qk, torch.randn(2, rounds, 8, 2))
        gaps.append((z.lsh_attention(qk, v, buckets, 16) - full).norm().item())
    assert gaps[0] > 1.3 * gaps[1] > 1.5 * gaps[2]


def test_reformer_hash(seed):
    x, turn = torch.randn(1, 1, 6, 5), torch.randn(1, 2, 5, 3)
    found = z.lsh_buckets(x, turn)
    for r in range(2):
        for i in range(6):
            y = x[0, 0, i] @ turn[0, r]
            assert found[0, 0, r, i] == torch.cat([y, -y]).argmax()
    assert torch.equal(z.lsh_buckets(3.7 * x, turn), found), "only the direction counts"
    assert torch.equal((z.lsh_buckets(-x, turn) - found).abs(), torch.full_like(found, 3))


def test_reformer_layer_ignores_padding(seed):
    layer = z.LSHAttention(16, 2, chunk=4, buckets=4, sees=lambda i, j: (i >= 0) & (j >= 0))
    x, real = torch.randn(2, 14, 16), torch.arange(14) < torch.tensor([[14], [9]])
    changed = torch.where(real.unsqueeze(-1), x, torch.randn_like(x))
    a, b = (layer(t, padding_mask(real)) for t in (x, changed))
    assert torch.allclose(a[real], b[real], atol=1e-5)


def blocks_of(depth, width=16):
    norm = partial(nn.LayerNorm, width)
    return [
        z.ReversibleBlock(z.LSHAttention(width, 2, 4, buckets=4), FeedForward(width), norm) for _ in range(depth)
    ]


def run_plainly(stack, x):
    y1 = y2 = x
    for block in stack.blocks:
        y1, y2 = block(y1, y2)
    return stack.norm((y1 + y2) / 2)


def test_reformer_reversible_gradients(seed):
    stack = z.ReversibleStack(blocks_of(3), nn.LayerNorm(16)).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        for block in stack.blocks:
            ends = block(x, 2 * x)
            assert all(torch.allclose(a, b) for a, b in zip(block.inverse(*ends), (x, 2 * x), strict=True))

    def gradients(run):
        stack.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).pow(3).sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in stack.parameters())]

    ours, theirs = gradients(stack), gradients(lambda x: run_plainly(stack, x))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(ours, theirs, strict=True))


def test_reformer_wrong_inverse_is_caught():
    class Forgetful(z.ReversibleBlock):
        def inverse(self, y1, y2):
            return y1 - self.f(y2), y2 - self.g(y1)

    torch.manual_seed(0)
    block = Forgetful(*(FeedForward(8) for _ in range(2)), partial(nn.LayerNorm, 8))
    x1, x2 = torch.randn(2, 2, 5, 8).unbind(0)
    with torch.no_grad():
        assert not torch.allclose(block.inverse(*block(x1, x2))[0], x1, atol=1e-3)


def test_reformer_memory_does_not_grow_with_depth():
    x = torch.randn(2, 32, 16)
    kept = [measure.saved_bytes(z.ReversibleStack(blocks_of(depth)), x) for depth in (1, 4, 8)]
    assert kept[0] == kept[1] == kept[2]
    stack = z.ReversibleStack(blocks_of(8))
    assert measure.saved_bytes(lambda x: run_plainly(stack, x), x) > 20 * kept[0]


def test_reformer_model_trains(seed):
    model, ids = z.reformer(12, 16, 2, 2, chunk=4, buckets=4), torch.randint(12, (2, 13))
    assert contracts.gradients_reach(model, ids)
    feed, x = FeedForward(8), torch.randn(2, 7, 8)
    assert all(contracts.reduces_to(z.ChunkedFeedForward(feed, parts), feed, x) for parts in (1, 3, 7))


# ------------------------------------------------------------------------------------------------------------ iceformer


@pytest.mark.parametrize("b, h, n, m, e", [(2, 2, 9, 14, 5), (1, 3, 20, 20, 8), (2, 1, 1, 6, 3)])
def test_iceformer_lifts_rank_by_product(seed, b, h, n, m, e):
    q = torch.randn(b, h, n, e, dtype=torch.float64)
    k = torch.randn(b, h, m, e, dtype=torch.float64) * torch.rand(b, h, m, 1) * 4
    keys, queries = z.lift_keys(k), z.lift_queries(q)
    ones = torch.ones((), dtype=torch.float64)
    assert torch.allclose(keys.norm(dim=-1), ones) and torch.allclose(queries.norm(dim=-1), ones)
    distance, product = torch.cdist(queries, keys), q @ k.transpose(-2, -1)
    assert torch.equal(distance.argsort(-1), product.argsort(-1, descending=True))
    length = k.norm(dim=-1).amax(-1)[..., None, None] * q.norm(dim=-1, keepdim=True)
    assert torch.allclose(distance**2, 2 - 2 * product / length)
    wrong = torch.cat([F.normalize(k, dim=-1), torch.zeros_like(k[..., :1])], -1)  # keys cut to length one
    if m > 10:
        assert not torch.equal(torch.cdist(queries, wrong).argsort(-1), distance.argsort(-1))


@pytest.mark.parametrize("b, h, n, m, e", [(2, 2, 9, 14, 5), (1, 3, 20, 20, 8), (2, 1, 1, 6, 3)])
def test_iceformer_attention_to_lists(seed, b, h, n, m, e):
    q, k, v = torch.randn(b, h, n, e), torch.randn(b, h, m, e), torch.randn(b, h, m, 4)
    everything = lambda search: lambda q, k, v: z.NeighborAttention(m + 3, search)(q, k, v)
    for search in (z.exact_neighbors, z.projected_neighbors):
        assert contracts.reduces_to(everything(search), attention, q, k, v)
    best = z.exact_neighbors(q, k, 3)
    allowed = torch.zeros(b, h, n, m, dtype=torch.bool).scatter(-1, best, True)
    few = z.NeighborAttention(3, z.exact_neighbors)
    assert contracts.reduces_to(few, partial(attention, mask=allowed), q, k, v)
    top = attention_weights(q, k).topk(3, -1).indices
    assert torch.equal(best.sort(-1).values, top.sort(-1).values)


@pytest.mark.parametrize("h, n, m, e", [(2, 40, 60, 5), (1, 7, 300, 12), (3, 1, 9, 4)])
def test_iceformer_tree_equals_the_definition(seed, h, n, m, e):
    q, k = torch.randn(2, h, n, e), torch.randn(2, h, m, e)
    for directions, count in ((3, 1), (7, 5), (4, m)):
        u = torch.randn(e + 1, directions, generator=torch.Generator().manual_seed(11))
        a, p = z.lift_queries(q) @ u, z.lift_keys(k) @ u
        apart = (a.unsqueeze(-2) - p.unsqueeze(-3)).abs().amax(-1)
        nearest, places = apart.topk(count, largest=False)
        search = partial(z.projected_neighbors, q, k, count, directions, seed=11)
        assert torch.equal(search(slack=0.0).sort(-1).values, places.sort(-1).values)
        for slack in (0.5, 3.0):
            loose = apart.gather(-1, search(slack=slack)).sort(-1).values
            assert (loose <= (1 + slack) * nearest + 1e-5).all()
        assert torch.equal(search(slack=0.0), z.projected_neighbors(q, k, count, directions, 11, 0.0))


def test_iceformer_tree_does_not_depend_on_threads():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 500, 8).unbind(0)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(z.projected_neighbors(q, k, 6))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_iceformer_search_and_error(seed):
    q, k, v = 2 * torch.randn(1, 2, 30, 6), torch.randn(1, 2, 30, 6), torch.randn(1, 2, 30, 6)
    full = attention(q, k, v)
    for search in (z.exact_neighbors, z.projected_neighbors):
        errors, recalls = [], []
        for count in (2, 8, 30):
            found = search(q, k, count)
            assert all(len(set(row)) == count for row in found.flatten(0, 2).tolist())
            best = z.exact_neighbors(q, k, 2)
            recalls.append((best.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).float().mean().item())
            errors.append((z.neighbor_attention(q, k, v, found) - full).norm().item())
        assert recalls == sorted(recalls) and recalls[-1] == 1
        assert errors[-1] < 1e-4 < errors[0]
        assert search is z.projected_neighbors or errors == sorted(errors)[::-1]
    assert torch.equal(z.projected_neighbors(q, k, 4), z.projected_neighbors(q, k, 4))


# ------------------------------------------------------------------------------------------- parity with published code


def copy_linear(pairs):
    with torch.no_grad():
        for target, sources in pairs:
            target.weight.copy_(torch.cat([s.weight for s in sources]))
            if target.bias is not None:
                target.bias.copy_(torch.cat([s.bias for s in sources]))


@pytest.mark.parametrize("first, padding", [(0, 0), (1, 0), (3, 5)])
def test_longformer_equals_transformers(seed, first, padding):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=24, num_attention_heads=3, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs, n = LongformerSelfAttention(config, 0).eval(), 32
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = z.LongformerAttention(24, 3, radius=4, first=first)
    copy_linear([
        (ours.to_qkv, (theirs.query, theirs.key, theirs.value)),
        (ours.to_global, (theirs.query_global, theirs.key_global, theirs.value_global)),
    ])
    nn.init.eye_(ours.to_out.weight), nn.init.zeros_(ours.to_out.bias)
    x, place = torch.randn(2, n, 24), torch.arange(n).expand(2, n)
    real, is_global = place < n - padding, place < first
    codes = torch.where(real, 10000.0 * is_global, -10000.0)
    with torch.no_grad():
        expected = theirs(x, codes, ~real, is_global, bool(first))[0]
        found = ours(x, padding_mask(real))
    assert torch.allclose(found[real], expected[real], atol=1e-5)


def test_big_bird_equals_transformers(seed):
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=16, num_attention_heads=1, block_size=4, num_random_blocks=2, attention_probs_dropout_prob=0.0
    )
    theirs, n, count = BigBirdBlockSparseAttention(config, seed=seed), 48, 12
    drawn = []
    draw = theirs._bigbird_block_rand_mask_with_head

    def spy(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    theirs._bigbird_block_rand_mask_with_head = spy
    real = torch.ones(2, n)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(real, 4)
    x = torch.randn(2, n, 16)
    with torch.no_grad():
        expected = theirs(x, band, rows, columns, blocked, blocked)[0]

    class Given(z.BigBird):
        def blocks(self, count):
            random = F.pad(torch.from_numpy(drawn[0][0]).long(), (0, 0, 1, 1), value=-1)
            return torch.cat([z.neighbor_blocks(count, 1, 1), random], 1)

    assert drawn and len(drawn[0][0]) == count - 2
    ours = MultiHeadAttention(16, 1, attend=Given(4, 2))
    copy_linear([(ours.to_qkv, (theirs.query, theirs.key, theirs.value))])
    nn.init.eye_(ours.to_out.weight), nn.init.zeros_(ours.to_out.bias)
    with torch.no_grad():
        assert torch.allclose(ours(x), expected, atol=1e-5)


@pytest.mark.parametrize("decoder", [True, False])
def test_reformer_equals_transformers(seed, decoder):
    """One round. Their code lets all buckets of a chunk meet, so the labels are all equal here."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=24, num_attention_heads=3, attention_head_size=8, lsh_attn_chunk_length=4, num_buckets=6,
        num_hashes=1, is_decoder=decoder, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0, hash_seed=seed,
    )  # fmt: skip
    theirs, x = LSHSelfAttention(config).eval(), torch.randn(2, 28, 24)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        expected = theirs(x)
        split = lambda t: t.unflatten(-1, (3, 8)).transpose(1, 2)
        qk, v = split(theirs.query_key(x)), split(theirs.value(x))
        torch.manual_seed(seed)
        turn = torch.randn(3, 8, 1, 3).permute(0, 2, 1, 3)
        buckets = z.lsh_buckets(qk, turn)
        assert torch.equal(buckets, expected.buckets)
        sees = torch.ge if decoder else (lambda i, j: (i >= 0) & (j >= 0))
        found = z.lsh_attention(qk, v, buckets, 4, sees, labels=torch.zeros_like(buckets))
    assert torch.allclose(found.transpose(1, 2).flatten(2), expected.hidden_states, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments_name_their_values():
    q, k = torch.randn(1, 3, 6, 4), torch.randn(1, 3, 8, 4)
    rows = torch.ones(6, 6, dtype=torch.bool)
    for call, words in [
        (lambda: z.CausalWindow(0), "got 0"),
        (lambda: z.Window(0), "got 0, 0"),
        (lambda: z.Window(2)(q, k, k), "6 and 8"),
        (lambda: z.BigBird(2, 1)(q, k, k), "6 and 8"),
        (lambda: z.CausalWindow(2)(q, q, q, mask=rows), r"\(6, 6\)"),
        (lambda: z.gathered_attention(q, q, q, z.window_rule(1), z.neighbor_blocks(2, 1, 1), 2), "2 blocks of 2"),
        (lambda: z.strided_heads(2)(q, q, q), "3"),
        (lambda: z.FixedPattern(4, 5), "5 and 4"),
        (lambda: z.GridPositions(2, 3, 4)(torch.randn(1, 7, 4)), "row 3 is asked for, of 2"),
        (lambda: z.masformer(9, 16, 2, 2, 4, full=(2,)), r"names \[2\]"),
        (lambda: z.combiner_attention(q, q, q, span=0), "got 0"),
        (lambda: z.combiner_attention(q, q, q, span=2, mask=rows), r"\(6, 6\)"),
        (lambda: z.logsparse_attention(q, q, q, mask=rows), r"\(6, 6\)"),
        (lambda: z.lsh_attention(q, q, torch.zeros(1, 3, 1, 6, dtype=torch.long), 0), "got 0"),
        (lambda: z.LSHAttention(16, 3), "3, 16"),
        (lambda: z.LSHAttention(16, 2, buckets=5), "5"),
        (lambda: z.NeighborAttention(2)(q, q, q, mask=rows), r"\(6, 6\)"),
        (lambda: z.NeighborAttention(2)(q[:0], q[:0], q[:0]), r"\(0, 3, 6, 4\)"),
        (lambda: z.projected_neighbors(q, q, 0), "got 0 and 3"),
        (lambda: z.projected_neighbors(q, q, 2, slack=-1.0), "got 2 and -1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "attend",
    [partial(z.combiner_attention, span=3), z.Combiner(4), z.logsparse_attention, z.NeighborAttention(4)],
    ids=["combiner", "module", "logsparse", "neighbors"],
)
def test_a_padded_text_gives_what_it_gives_alone(attend, left):
    q, k, v = torch.randn(3, 2, 2, 11, 4).unbind(0)
    real = torch.ones(2, 11, dtype=torch.bool)
    part = slice(5, None) if left else slice(6)
    real[1] = False
    real[1, part] = True
    out = attend(q, k, v, mask=padding_mask(real))
    for row, tokens in ((0, slice(None)), (1, part)):
        alone = attend(*(t[row : row + 1, :, tokens] for t in (q, k, v)))
        torch.testing.assert_close(out[row : row + 1, :, tokens], alone)


def test_a_padded_text_cannot_be_fed_to_regions_in_pieces():
    x, mask = torch.randn(1, 4, 16), padding_mask(torch.tensor([[False, True, True, True]]))
    for attend in (z.Combiner(2), z.Replayed(z.logsparse_attention)):
        layer = MultiHeadAttention(16, 2, attend=attend)
        with remember(layer), pytest.raises(ValueError, match="cannot have padding"):
            layer(x, mask=mask)


def test_mechanisms_have_one_size():
    for name, make in z.mechanisms.items():
        module, (x,) = make()
        assert x.shape == (4, 128, 64) and module(x).shape == x.shape, name
    assert next(iter(z.mechanisms)) == "plain attention"


# ----------------------------------------------------------------------------------------------------- a text in pieces


@pytest.mark.parametrize("sizes", [[1, 3, 18], [5, 1, 1, 1, 14], [1] * 9, [8, 8, 14]])
@pytest.mark.parametrize(
    "attend, numbers",  # what is kept of n tokens, in vectors of the width: keys and values, or what the docstring says
    [
        (z.CausalWindow(4), lambda n: 2 * min(n, 3)),
        (z.Dilated(z.CausalWindow(3), 2), lambda n: 2 * min(n, 4)),
        (z.strided_heads(3), lambda n: 2 * n),
        (z.FixedPattern(4), lambda n: 2 * n),
        (z.Combiner(4), lambda n: 2 * (n // 4) + 3 * (n % 4)),
        (z.Replayed(z.logsparse_attention), lambda n: 3 * n),
    ],
    ids=["window", "dilated window", "strided", "fixed", "combiner", "logsparse"],
)
def test_a_text_in_pieces_is_the_whole_text(attend, numbers, sizes):
    layer, x = MultiHeadAttention(16, 2, attend=attend), torch.randn(2, sum(sizes), 16)
    with torch.no_grad(), remember(layer) as past:
        pieces = torch.cat([layer(piece) for piece in x.split(sizes, 1)], 1)
        kept = past.numbers()
    torch.testing.assert_close(pieces, layer(x), atol=1e-5, rtol=1e-5)
    assert kept // 32 == numbers(sum(sizes)) and kept % 32 <= 1


def test_what_sees_the_future_or_sorts_the_whole_text_is_refused():
    for layer, reason in (
        (z.LSHAttention(16, 2, chunk=4), "borders of the chunks"),
        (z.reformer(20, 16, 1, 2), "borders of the chunks"),
        (z.LongformerAttention(16, 2, 3), "later tokens"),
        (MultiHeadAttention(16, 2, attend=z.Dilated(z.Window(2), 2)), "later tokens"),
        (MultiHeadAttention(16, 2, attend=z.HeadHalves(causal_attention, z.BigBird(2, 1))), "later tokens"),
    ):
        with pytest.raises(ValueError, match=reason), remember(layer):
            pass


def test_a_written_image_equals_the_image_read_at_once():
    model = z.sparse_transformer(9, 16, 2, 2, rows=4, columns=3)
    ids = torch.randint(9, (2, 12))
    with torch.no_grad(), remember(model):
        pieces = [model(ids[:, start:stop], start=start) for start, stop in ((0, 1), (1, 5), (5, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="row 5 is asked for, of 4"):
        model(ids[:, :1], start=12)


def test_rules_survive_a_pickle():
    place = torch.arange(9)
    for rule in (
        z.window_rule(2), z.causal_window_rule(3), z.dilated_rule(2, 3), z.global_rule(1),
        z.either(z.window_rule(1), z.global_rule(2)),
    ):  # fmt: skip
        copy = pickle.loads(pickle.dumps(rule))
        assert torch.equal(copy(place[:, None], place), z.pattern(rule, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hashed_attention_in_16_bits(dtype):
    qk, v, _ = qkv(1, 2, 24, 8)
    qk, v = (t.to(dtype) for t in (qk, v))
    buckets = z.lsh_buckets(qk.float(), torch.randn(2, 2, 8, 2))
    exact = z.lsh_attention(qk.float(), v.float(), buckets, 4)
    found = z.lsh_attention(qk, v, buckets, 4)
    assert found.dtype == dtype and ((found.float() - exact).norm() / exact.norm()) < 0.02
