"""Chapter 04: what must hold for counting without positions, FIRE, threshold attention and stretched rotary."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts
from tfkit.zoo.attention import MultiHeadAttention, attention, causal_attention
from tfkit.zoo.length_extrapolation import (
    Fire,
    QueryKeyNorm,
    RandomizedRotary,
    Sharpened,
    ThresholdRelative,
    as_fire,
    count_from_start,
    distance_by_products,
    fire_input,
    interpolated_speeds,
    llama3_speeds,
    longrope_attention_factor,
    longrope_speeds,
    nope_model,
    ntk_speeds,
    threshold_relative_attention,
    through_points,
    yarn_attention_factor,
    yarn_speeds,
)
from tfkit.zoo.positions import Alibi, Rotary, T5Bias, alibi_slopes, rotary_speeds, t5_causal_buckets
from tfkit.zoo.transformer import remember

seeds = pytest.mark.parametrize("seed", range(3))


def draw(seed: int, *shape: int, count: int = 3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=g, dtype=torch.float64).unbind(0)


# --- nope


@pytest.mark.parametrize("n", [1, 2, 17, 300])
def test_nope_counts(n):
    flag = F.one_hot(torch.tensor([0, 0]), n).double()
    clock = count_from_start(flag)
    assert torch.allclose(clock, 1 / torch.arange(1, n + 1).double().expand(2, n), atol=1e-12)


def test_nope_does_not_count_without_the_mask():
    flag = F.one_hot(torch.tensor([0]), 6).double()
    equal = torch.zeros(1, 6, 1).double()
    seen = attention(equal, equal, flag[..., None])[..., 0]
    assert torch.allclose(seen, torch.full_like(seen, 1 / 6))


@seeds
def test_nope_places_give_alibi(seed):
    n = 5 + 7 * seed
    q, k, v = draw(seed, 2, 4, n, 6)
    place = torch.arange(n, 0, -1).double()
    clock = count_from_start(F.one_hot(torch.tensor([0, 0]), n).double())
    counted = through_points(1 / place, place[:, None])(clock[..., None])[..., 0]
    assert torch.allclose(counted, torch.arange(1.0, n + 1).double().expand(2, n), atol=1e-6)
    far = distance_by_products(q, k, counted, alibi_slopes(4).double())
    ours = causal_attention(*far, v, scale=6**-0.5)
    assert torch.allclose(ours, Alibi(4).double()(q, k, v), atol=1e-6)
    wrong = distance_by_products(q, k, counted, -alibi_slopes(4).double())
    assert not torch.allclose(causal_attention(*wrong, v, scale=6**-0.5), Alibi(4).double()(q, k, v), atol=1e-2)


@seeds
def test_nope_sees_order_through_the_mask_alone(seed):
    x = draw(seed, 1, 8, 16, count=1)[0]
    assert contracts.permutation_equivariant(MultiHeadAttention(16, 4).double(), x)
    assert not contracts.permutation_equivariant(MultiHeadAttention(16, 4, attend=causal_attention).double(), x)


def test_nope_model_is_causal_and_has_no_positions():
    model = nope_model(11, 16, 2, 2)
    ids = torch.randint(11, (2, 9))
    assert contracts.causal(model, ids)
    assert torch.allclose(model(ids), model(ids, start=5))


@pytest.mark.parametrize("k", [2, 5, 40])
def test_through_points(k):
    g = torch.Generator().manual_seed(k)
    x = torch.rand(k, generator=g, dtype=torch.float64).sort().values
    y = torch.randn(k, 3, generator=g, dtype=torch.float64)
    f = through_points(x, y)
    assert torch.allclose(f(x[:, None]), y, atol=1e-6)
    middle = (x[:-1] + x[1:]) / 2
    assert torch.allclose(f(middle[:, None]), (y[:-1] + y[1:]) / 2, atol=1e-6)
    assert torch.allclose(f(x[:1, None] - 1), y[:1], atol=1e-6)


@pytest.mark.parametrize("x", [[1.0], [1.0, 1.0], [2.0, 1.0]])
def test_through_points_needs_increasing_points(x):
    with pytest.raises(ValueError, match="increasing"):
        through_points(torch.tensor(x), torch.zeros(len(x), 1))


# --- fire


@pytest.mark.parametrize("n", [1, 2, 9, 64, 700])
@pytest.mark.parametrize(("threshold", "c"), [(0.5, 0.1), (8.0, 1.0), (512.0, 3.0)])
def test_fire_input_is_between_zero_and_one(n, threshold, c):
    layer = Fire(2, threshold=threshold, c=c)
    x = fire_input(n, n, layer.squash, layer.log_threshold.exp())
    assert 0 <= x.min() and x.max() <= 1 + 1e-6
    assert (x.diff(dim=-1) <= 1e-7).all()  # nearer keys have smaller distances


def test_fire_without_its_divisor_leaves_the_range():
    layer = Fire(2, threshold=8.0, c=1.0)
    assert layer.squash(torch.tensor(500.0)) > 1


@seeds
def test_fire_is_its_formula(seed):
    torch.manual_seed(seed)
    layer = Fire(3, threshold=2.0 + 3 * seed, c=0.5 + seed)
    table, c, limit = layer.bias(11, 11), layer.log_c.exp().item(), layer.log_threshold.exp().item()
    for i, j in ((0, 0), (1, 0), (5, 2), (10, 0), (10, 10), (7, 6)):
        x = math.log(c * (i - j) + 1) / math.log(c * max(limit, i) + 1)
        assert torch.allclose(table[:, i, j], layer.f(torch.tensor([x])), atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4, 6])
@pytest.mark.parametrize("n", [2, 7, 50])
def test_fire_reproduces_alibi_t5_and_kerple(heads, n):
    torch.manual_seed(n)
    offset = -torch.arange(n)
    alibi = Alibi(heads).double()
    t5 = T5Bias(heads, causal_attention, t5_causal_buckets, furthest=64).double()
    kerple = -0.7 * torch.log1p(0.3 * torch.arange(n).double())
    for scheme, squash in ((alibi, lambda x: x), (t5, torch.log1p)):
        ours = as_fire(scheme.of_offset(offset).T.double(), squash)(n, n)
        assert torch.allclose(ours.tril(), scheme.bias(n, n).double().tril(), atol=1e-6)
    ours = as_fire(kerple[:, None], lambda x: torch.log1p(0.3 * x))(n, n)[0]
    d = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
    assert torch.allclose(ours.tril(), kerple[d].tril(), atol=1e-6)


@seeds
def test_fire_with_a_cache_and_causality(seed):
    torch.manual_seed(seed)
    layer = Fire(2, threshold=3.0, c=1.0)
    assert torch.allclose(layer.bias(3, 9), layer.bias(9, 9)[:, 6:], atol=1e-6)
    mixer = MultiHeadAttention(8, 2, attend=layer)
    assert contracts.causal(mixer, torch.randn(2, 7, 8))
    assert not contracts.causal(MultiHeadAttention(8, 2, attend=Fire(2, attention)), torch.randn(2, 7, 8))


def test_fire_is_not_shift_invariant():
    torch.manual_seed(0)
    table = Fire(2, threshold=3.0, c=1.0).bias(20, 20)
    assert not torch.allclose(table[:, 6, 4], table[:, 19, 17], atol=1e-4)


def test_fire_rejects_nonsense():
    with pytest.raises(ValueError, match="positive"):
        Fire(2, threshold=0.0)
    with pytest.raises(ValueError, match="positive"):
        Fire(2, c=-1.0)
    with pytest.raises(ValueError, match="5 > 3"):
        fire_input(5, 3, torch.log1p, torch.tensor(1.0))


# --- tra


def slow_tra(q, k, v, decay, threshold):
    """One query at a time, from the right."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    n, m = q.shape[-2], k.shape[-2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(n):
                total, survivors = 0.0, 0
                for j in reversed(range(m - n + i + 1)):
                    score = q[b, h, i] @ k[b, h, j] / q.shape[-1] ** 0.5
                    if score > threshold:
                        weight = (score + survivors * decay[b, h, i]).exp()
                        out[b, h, i] += weight * v[b, h, j]
                        total, survivors = total + weight, survivors + 1
                if survivors:
                    out[b, h, i] /= total
    return out


@seeds
@pytest.mark.parametrize("threshold", [0.0, 0.4, -0.5])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_tra_is_the_loop(seed, threshold, n):
    q, k, v = draw(seed, 2, 2, 7, 4)
    decay = F.logsigmoid(q[:, :, -n:, 0])
    ours = threshold_relative_attention(q[:, :, -n:], k, v, decay, threshold=threshold)
    assert torch.allclose(ours, slow_tra(q[:, :, -n:], k, v, decay, threshold), atol=1e-10)


@seeds
@pytest.mark.parametrize("noise", [1, 10, 200])
def test_tra_ignores_irrelevant_keys(seed, noise):
    torch.manual_seed(seed)
    q, k, v = (x.abs() for x in draw(seed, 1, 2, 6, 8))
    filler = -draw(seed + 9, 1, 2, noise, 8, count=1)[0].abs()
    keys, values = torch.cat([k[:, :, :3], filler, k[:, :, 3:]], 2), torch.cat([v[:, :, :3], filler, v[:, :, 3:]], 2)
    last = q[:, :, -1:]
    layer = ThresholdRelative(2, 8).double()
    assert torch.allclose(layer(last, keys, values), layer(last, k, v), atol=1e-10)
    no_threshold = ThresholdRelative(2, 8, threshold=-math.inf).double()
    for other in (causal_attention, Alibi(2).double(), Rotary(8, causal_attention), no_threshold):
        assert not torch.allclose(other(last, keys, values), other(last, k, v), atol=1e-3)


@seeds
def test_tra_special_cases(seed):
    q, k, v = draw(seed, 2, 4, 9, 6)
    open_gate = torch.zeros(2, 4, 9).double()
    plain = threshold_relative_attention(q, k, v, open_gate, threshold=-math.inf)
    assert torch.allclose(plain, causal_attention(q, k, v), atol=1e-10)
    slopes = -alibi_slopes(4).double()[None, :, None].expand(2, 4, 9)
    alibi = threshold_relative_attention(q, k, v, slopes, threshold=-math.inf)
    assert torch.allclose(alibi, Alibi(4).double()(q, k, v), atol=1e-10)
    mask = torch.rand(9, 9) < 0.5
    mask |= torch.eye(9).bool()
    masked = threshold_relative_attention(q, k, v, open_gate, mask, -math.inf)
    assert torch.allclose(masked, causal_attention(q, k, v, mask), atol=1e-10)


def test_tra_queries_without_survivors():
    q, k, v = (x.requires_grad_() for x in draw(0, 1, 2, 5, 4))
    out = threshold_relative_attention(q, k, v, torch.zeros(1, 2, 5).double(), threshold=1e9)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@seeds
def test_tra_is_causal_and_its_gate_learns(seed):
    torch.manual_seed(seed)
    mixer = MultiHeadAttention(16, 2, attend=ThresholdRelative(2, 8))
    x = torch.randn(2, 9, 16)
    assert contracts.causal(mixer, x)
    assert contracts.gradients_reach(mixer, x)


# --- extrapolation_survey

HEAD = pytest.mark.parametrize("head_width", [8, 64, 128])
FACTOR = pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])


def published(kind, head_width, factor, seq_len=None):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "factor": factor, "rope_theta": 10000.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 256
    config = transformers.LlamaConfig(
        hidden_size=2 * head_width, num_attention_heads=2, rope_parameters=rope, max_position_embeddings=256
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)[0]


@HEAD
@FACTOR
def test_extrapolation_survey_speeds_are_those_of_transformers(head_width, factor):
    speeds = rotary_speeds(head_width)
    assert torch.allclose(interpolated_speeds(speeds, factor), published("linear", head_width, factor), rtol=1e-5)
    dynamic = published("dynamic", head_width, 1.0, int(256 * factor))
    assert torch.allclose(ntk_speeds(head_width, factor), dynamic, rtol=1e-5)
    assert torch.allclose(yarn_speeds(head_width, factor, 256), published("yarn", head_width, factor), rtol=1e-5)


@HEAD
def test_extrapolation_survey_ends_of_the_ramp(head_width):
    slower = rotary_speeds(head_width) / ntk_speeds(head_width, 8.0)
    assert torch.allclose(slower[[0, -1]], torch.tensor([1.0, 8.0]), rtol=1e-4)
    assert (slower.diff() > 0).all()
    yarn = rotary_speeds(head_width) / yarn_speeds(head_width, 8.0, 4096)
    assert torch.allclose(yarn[[0, -1]], torch.tensor([1.0, 8.0]), rtol=1e-4)


@seeds
def test_extrapolation_survey_interpolated_places(seed):
    """Interpolation by 2 gives token 2 i the angle that token i had."""
    q, k, v = (x.float() for x in draw(seed, 1, 2, 8, 6))
    narrow = Rotary(6, causal_attention)
    wide = Rotary(6, causal_attention, interpolated_speeds(rotary_speeds(6), 2.0))
    assert torch.allclose(wide.angles(15)[::2], narrow.angles(8), atol=1e-6)
    assert torch.allclose(wide.angles(1), narrow.angles(1))


def test_extrapolation_survey_random_places():
    layer = RandomizedRotary(8, 40)
    for _ in range(5):
        place = layer.angles(12)[:, 0]
        assert (place.diff() >= 1).all() and 0 <= place.min() and place.max() < 40
    assert not torch.equal(layer.angles(12), layer.angles(12))
    assert torch.equal(layer.angles(40)[:, 0], torch.arange(40.0))
    assert torch.equal(layer.eval().angles(50), Rotary(8).angles(50))
    with pytest.raises(ValueError, match="41 places"):
        layer.train().angles(41)
    assert contracts.causal(MultiHeadAttention(16, 2, attend=layer.eval()), torch.randn(1, 6, 16))


@seeds
def test_extrapolation_survey_shift_invariance(seed):
    """A shift of the text leaves relative biases alone and changes FIRE's."""
    torch.manual_seed(seed)
    n, shift = 6, 9
    for scheme, same in (
        (Alibi(2), True),
        (T5Bias(2, causal_attention, t5_causal_buckets), True),
        (Fire(2, threshold=2.0, c=1.0), False),
    ):
        near, far = scheme.bias(n, n), scheme.bias(n + shift, n + shift)[:, shift:, shift:]
        assert torch.allclose(near.tril(), far.tril(), atol=1e-5) == same


def test_extrapolation_survey_rejects_nonsense():
    with pytest.raises(ValueError, match=r"0\.5"):
        interpolated_speeds(rotary_speeds(8), 0.5)
    with pytest.raises(ValueError, match=r"0\.5"):
        ntk_speeds(8, 0.5)
    with pytest.raises(ValueError, match="2"):
        ntk_speeds(2, 2.0)
    with pytest.raises(ValueError, match=r"0\.5"):
        yarn_speeds(8, 0.5, 64)


@seeds
def test_writing_with_a_cache(seed):
    """Queries are the last of the keys in every scheme: one token at a time gives the same logits."""
    from tfkit.zoo.positions import positioned_model

    torch.manual_seed(seed)
    ids = torch.randint(9, (1, 10))
    for make in (lambda: Fire(2, threshold=3.0), lambda: ThresholdRelative(2, 8), lambda: RandomizedRotary(8, 64)):
        model: nn.Module = positioned_model(9, 16, 2, 2, make).eval()
        with torch.no_grad(), remember(model):
            steps = torch.cat([model(ids[:, t : t + 1], start=t) for t in range(10)], 1)
        assert contracts.agree(lambda _, steps=steps: steps, model, ids, atol=1e-4)


RULES = {
    "llama3": ({"low_freq_factor": 1.0, "high_freq_factor": 4.0}, lambda e, s, n, b: llama3_speeds(e, s, n, b)),
    "yarn": ({}, lambda e, s, n, b: yarn_speeds(e, s, n, b)),
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "e, factor, length, base", [(64, 8.0, 8192, 500000.0), (32, 4.0, 256, 10000.0), (16, 2.0, 64, 1e3)]
)
def test_published_rules_are_those_of_transformers(kind, e, factor, length, base):
    more, ours = RULES[kind]
    speeds, sharpness = of_transformers(kind, e, factor, length, base, **more)
    torch.testing.assert_close(ours(e, factor, length, base), speeds, rtol=1e-5, atol=0)
    if kind == "yarn":
        assert yarn_attention_factor(factor) == pytest.approx(sharpness, abs=1e-6)


def test_longrope_is_that_of_transformers():
    slower = 1 + 3 * torch.rand(16)
    speeds, sharpness = of_transformers(
        "longrope", 32, 4.0, 128, 1e4, long_factor=slower.tolist(), short_factor=[1.0] * 16
    )
    torch.testing.assert_close(longrope_speeds(32, slower), speeds, rtol=1e-5, atol=0)
    assert longrope_attention_factor(4.0, 128) == pytest.approx(sharpness, abs=1e-6)
    assert longrope_attention_factor(1.0, 128) == yarn_attention_factor(0.5) == 1.0
    for bad in (slower[1:], -slower):
        with pytest.raises(ValueError, match="16 planes"):
            longrope_speeds(32, bad)
    with pytest.raises(ValueError, match="got 4.0 and 1.0"):
        llama3_speeds(32, low=4.0, high=1.0)


def of_transformers(kind, e, factor, length, base, **more):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    given = {"rope_type": kind, "rope_theta": base, "factor": factor, "original_max_position_embeddings": length}
    config = LlamaConfig(hidden_size=2 * e, num_attention_heads=2, rope_parameters=given | more,
                         max_position_embeddings=int(factor * length))  # fmt: skip
    return rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=int(factor * length))


@seeds
def test_sharpened_and_normed_scores(seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 2, 7, 8).unbind(0)
    expected = causal_attention(1.3 * q, 1.3 * k, v)
    torch.testing.assert_close(Sharpened(1.3)(q, k, v), expected)
    assert not torch.allclose(causal_attention(q, k, v), expected, atol=1e-3)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=str(bad)):
            Sharpened(bad)
    norm = QueryKeyNorm(8, partial(nn.RMSNorm, eps=1e-6), causal_attention)
    with torch.no_grad():
        norm.q.weight.copy_(torch.rand(8) + 0.5), norm.k.weight.copy_(torch.rand(8) + 0.5)
    rms = lambda t: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = causal_attention(rms(q) * norm.q.weight, rms(k) * norm.k.weight, v)
    torch.testing.assert_close(norm(q, k, v), expected)
    torch.testing.assert_close(norm(50 * q, 3 * k, v), expected, atol=1e-4, rtol=0)
    turned = Rotary(8, QueryKeyNorm(8, nn.RMSNorm, causal_attention))
    plain = QueryKeyNorm(8, nn.RMSNorm, Rotary(8, causal_attention))
    torch.testing.assert_close(turned(q, k, v), plain(q, k, v))


@seeds
@pytest.mark.parametrize("window", [None, 3])
def test_turned_keys_are_kept_and_only_as_many_as_needed(seed, window):
    from tfkit.zoo.positions import Rotary, positioned_model
    from tfkit.zoo.transformer import generate

    class Window(nn.Module):
        looks_back = 2

        def forward(self, q, k, v, mask=None):
            n, m = q.shape[-2], k.shape[-2]
            back = torch.arange(m - n, m)[:, None] - torch.arange(m)
            near = (back >= 0) & (back < 3)
            return attention(q, k, v, near[None, None] if mask is None else near & mask)

    torch.manual_seed(seed)
    attend = lambda: QueryKeyNorm(8, nn.RMSNorm, Rotary(8, Sharpened(1.2, Window() if window else causal_attention)))
    model, ids = positioned_model(9, 16, 2, 2, attend).eval(), torch.randint(9, (2, 11))
    with torch.no_grad():
        whole = model(ids)
        for sizes in ((1, 3, 7), (1,) * 11, (10, 1)):
            with remember(model) as past:
                at, found = 0, []
                for size in sizes:
                    found.append(model(ids[:, at : at + size], start=at))
                    at += size
                kept = 2 if window else 11
                assert past.numbers() == 2 * (2 * 2 * kept * 16 + 1), "keys and values of two layers, and two counters"
            torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=0)
        real = torch.arange(6) >= torch.tensor([[0], [3]])
        alone = generate(model, ids[1:, 3:6], 6)
        assert torch.equal(generate(model, ids[:, :6], 6, real=real)[1:, 3:], alone)
