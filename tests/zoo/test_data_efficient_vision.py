"""Identities of chapter 21 on random shapes and seeds, parity, published totals, and broken variants.

Covers deit, deit_lt, transface, mixpro and contracon.
"""

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import measure
from tfkit.zoo.attention import MultiHeadAttention
from tfkit.zoo.data_efficient_vision import (
    ContinualModel,
    DistilledModel,
    PatchExcitation,
    ReweightedLinear,
    TwoHeads,
    attention_share,
    blend,
    both_tokens,
    box_masks,
    class_attention,
    cutmix,
    deferred_weights,
    deit_base_distilled,
    deit_small_distilled,
    deit_tiny_distilled,
    distilled,
    effective_number_weights,
    even_masks,
    examples,
    grid_masks,
    hard_distillation,
    hard_sample_weights,
    long_tailed_counts,
    margin_scores,
    maskmix,
    mean_probabilities,
    mean_scores,
    mix_amplitude,
    mix_shares,
    mixup,
    perturb_dominant_patches,
    progressive_share,
    random_erasing,
    repeated_batches,
    reweight,
    sharpness_aware_loss,
    soft_distillation,
    soft_labels,
    surest_task,
    task_model,
    transface,
)
from tfkit.zoo.long_range_arena import distillation_loss
from tfkit.zoo.vision_transformer import (
    ConvolutionalStem,
    PatchStem,
    attention_maps,
    compact,
    compact_blocks,
    isotropic,
    patchify,
    vit,
    vit_base,
    vit_small,
    vit_tiny,
)

seeds = pytest.mark.parametrize("seed", range(2))
sizes = pytest.mark.parametrize("b, c, h, w", [(5, 1, 8, 12), (7, 3, 16, 8)])


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disturb(module, seed=0, size=0.3):
    """Move every parameter off its initial value, so that no identity holds by a special start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * size)
    return module


def small(**options):
    return disturb(vit(12, 4, 16, 2, 2, **{"classes": 5, "hidden": 24} | options))


# --- labels and mixtures


def test_soft_labels():
    y = soft_labels(torch.tensor([1, 0, 2]), 4, 0.2)
    assert torch.allclose(y, 0.8 * torch.eye(4)[[1, 0, 2]] + 0.05) and y.dtype == torch.float32
    assert torch.equal(soft_labels(torch.tensor([3]), 4), torch.eye(4)[[3]])
    assert soft_labels(torch.zeros(0, dtype=torch.long), 4).shape == (0, 4)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1.5"):
        soft_labels(torch.tensor([1]), 4, 1.5)
    with pytest.raises(ValueError, match="between 0 and 1, got -0.1"):
        soft_labels(torch.tensor([1]), 4, -0.1)
    with pytest.raises(ValueError, match="classes 0 to 3, got 0 to 4"):
        soft_labels(torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match="classes 0 to 3, got -1 to 0"):
        soft_labels(torch.tensor([0, -1]), 4)


@sizes
@seeds
def test_blend_takes_pixels_and_labels_by_the_mask(seed, b, c, h, w):
    x, y = draw(seed, b, c, h, w), draw(seed + 1, b, 6).softmax(-1)
    mask, partner = torch.rand(b, 1, h, w), torch.randperm(b)
    mixed, labels = blend(x, y, mask, partner)
    for i in range(b):
        j = partner[i]
        assert torch.allclose(mixed[i], mask[i] * x[i] + (1 - mask[i]) * x[j], atol=1e-6)
        share = mask[i].mean()
        assert torch.allclose(labels[i], share * y[i] + (1 - share) * y[j], atol=1e-6)
    assert torch.equal(blend(x, y, torch.ones(b, 1, h, w), partner)[0], x)
    assert torch.equal(blend(x, y, torch.zeros(b, 1, h, w), partner)[1], y[partner])


@pytest.mark.parametrize("mix", [mixup, cutmix, partial(maskmix, cell=4)])
def test_mixtures_of_constant_pictures_are_worth_their_labels(mix):
    torch.manual_seed(0)
    numbers = torch.arange(30.0)
    x, y = mix(numbers.view(-1, 1, 1, 1).expand(-1, 2, 16, 24), torch.eye(30))
    assert torch.allclose(x.mean((1, 2, 3)), y @ numbers, atol=1e-4)
    assert torch.allclose(y.sum(1), torch.ones(30)) and (y > 0).sum(1).max() == 2
    assert torch.allclose(y.sum(0).sum(), torch.tensor(30.0))
    assert not torch.equal(y, torch.eye(30))


def test_shares_follow_the_beta_distribution():
    torch.manual_seed(0)
    x = torch.zeros(20000, 1, 2, 2)
    for alpha in (0.3, 0.8, 1.0, 5.0):
        share = mix_shares(x, alpha)
        assert abs(share.mean() - 0.5) < 0.01 and abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.004
    assert mix_shares(x.double(), 1.0).dtype == torch.float64
    for alpha in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"positive alpha, got {alpha}"):
            mix_shares(x, alpha)


def test_even_masks_are_one_number_for_each_picture():
    torch.manual_seed(0)
    mask = even_masks(torch.zeros(6, 3, 4, 5))
    assert mask.shape == (6, 1, 4, 5) and torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
    assert len(mask[:, 0, 0, 0].unique()) == 6
    torch.manual_seed(1)
    wide = even_masks(torch.zeros(5000, 3, 1, 1))[:, 0, 0, 0]
    assert abs(wide.var() - 1 / (4 * 2.6)) < 0.006  # alpha is 0.8 by default


def test_box_masks_are_one_box_of_zeros_with_even_sides():
    torch.manual_seed(0)
    x = torch.zeros(3000, 3, 20, 32)
    torch.manual_seed(5)
    share = mix_shares(x, 1.0)
    torch.manual_seed(5)
    mask = box_masks(x)
    assert mask.shape == (3000, 1, 20, 32) and set(mask.unique().tolist()) == {0.0, 1.0}
    zero = mask[:, 0] == 0
    rows, columns = zero.any(2), zero.any(1)
    assert torch.equal(zero, rows[:, :, None] & columns[:, None])
    for line, size in ((rows, 20), (columns, 32)):
        assert (line.int().diff(dim=1).abs().sum(1) <= 2).all()  # one run
        full = 2 * ((1 - share).sqrt() * size).long().div(2, rounding_mode="floor")
        assert (line.sum(1) <= full).all()
        whole = ~line[:, 0] & ~line[:, -1] & line.any(1)
        assert whole.any() and torch.equal(line.sum(1)[whole], full[whole])  # nothing was cut
    assert rows[:, 0].any() and rows[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()
    middle = (rows.float() @ torch.arange(20.0) / rows.sum(1).clamp(min=1))[rows.any(1)]
    assert 8.5 < middle.mean() < 10.5


@pytest.mark.parametrize("seed", range(2))
def test_erasing_fills_one_box_inside_with_noise(seed):
    torch.manual_seed(seed)
    x = torch.zeros(800, 2, 24, 36)
    y = random_erasing(x, 0.5)
    zero = (y != 0).any(1)
    rows, columns = zero.any(2), zero.any(1)
    assert torch.equal(zero, rows[:, :, None] & columns[:, None])
    hit = rows.any(1)
    assert 0.42 < hit.float().mean() < 0.58
    high, wide = rows.sum(1)[hit], columns.sum(1)[hit]
    area = high * wide / (24 * 36)
    assert area.min() > 0.01 and area.max() < 0.4 and area.max() > 0.28
    assert (high / wide).min() > 0.2 and (high / wide).max() < 4.5
    assert (high / wide).log().mean().abs() < 0.2
    assert torch.equal((y != 0)[:, 0], (y != 0)[:, 1]) and not torch.equal(y[:, 0], y[:, 1])
    assert abs(y[zero[:, None].expand_as(y)].std() - 1) < 0.05
    assert rows[:, 0].any() and rows[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()
    assert torch.equal(random_erasing(x, 0.0), x)
    tiny = random_erasing(torch.zeros(50, 1, 2, 2), 1.0)
    assert (tiny != 0).flatten(1).any(1).all()
    part = (random_erasing(x, 1.0, (0.25, 0.25), (1.0, 1.0)) != 0)[:, 0].float().mean((1, 2))
    assert (part - 0.25).abs().max() < 0.03
    quarter = (random_erasing(torch.zeros(4000, 1, 4, 4)) != 0).flatten(1).any(1).float().mean()
    assert abs(quarter - 0.25) < 0.03


def test_repeated_batches():
    source = repeated_batches(10, 12, 3, seed=1)
    seen = [next(source) for _ in range(4)]
    for batch in seen:
        assert batch.unique(return_counts=True)[1].tolist() == [3] * 4
    first, second = (set(b.tolist()) for b in seen[:2])
    assert not first & second  # one order goes on
    assert set(torch.cat(list(itertools.islice(repeated_batches(8, 12), 2))).tolist()) == set(range(8))
    assert torch.equal(next(repeated_batches(10, 12, seed=1)), seen[0])
    assert not torch.equal(next(repeated_batches(10, 12, seed=2)), seen[0])
    assert next(repeated_batches(4, 12)).shape == (12,)
    for count, size, times in ((3, 12, 3), (10, 10, 3), (10, 12, 0), (10, 0, 3)):
        with pytest.raises(ValueError, match=f"{size} places for {times} views of each of {count}"):
            next(repeated_batches(count, size, times))


# --- distillation


@seeds
def test_hard_distillation_by_hand(seed):
    scores, teacher = draw(seed, 5, 2, 7), draw(seed + 9, 5, 7)
    labels, weights = draw(seed + 3, 5, 7).softmax(-1), draw(seed + 4, 7).exp()
    told = -(labels * scores[:, 0].log_softmax(-1)).sum(-1).mean()
    chosen = teacher.argmax(-1)
    heard = -scores[:, 1].log_softmax(-1)[torch.arange(5), chosen]
    assert torch.allclose(hard_distillation(scores, teacher, labels), (told + heard.mean()) / 2)
    weighed = (heard * weights[chosen]).sum() / weights[chosen].sum()
    assert torch.allclose(hard_distillation(scores, teacher, labels, weights), (told + weighed) / 2)
    assert torch.allclose(
        hard_distillation(scores, teacher, labels, torch.ones(7)), hard_distillation(scores, teacher, labels)
    )


@seeds
def test_soft_distillation_by_hand(seed):
    scores, teacher, y = draw(seed, 4, 2, 6), draw(seed + 1, 4, 6), torch.arange(4)
    labels = soft_labels(y, 6)
    t = (teacher / 3).softmax(-1)
    kl = (t * (t.log() - (scores[:, 1] / 3).log_softmax(-1))).sum(-1).mean()
    by_hand = 0.9 * F.cross_entropy(scores[:, 0], labels) + 0.1 * 9 * kl
    assert torch.allclose(soft_distillation(scores, teacher, labels), by_hand, atol=1e-5)
    same = scores[:, :1].expand(-1, 2, -1)
    for temperature, share in ((1.0, 0.5), (2.0, 0.0), (4.0, 1.0)):
        hinton = distillation_loss(scores[:, 0], teacher, y, temperature, share)
        assert torch.allclose(soft_distillation(same, teacher, labels, temperature, share), hinton, atol=1e-5)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"share in 0 .. 1, got {share}"):
            soft_distillation(scores, teacher, labels, 3.0, share)
    with pytest.raises(ValueError, match="T > 0"):
        soft_distillation(scores, teacher, labels, 0.0)


def test_fusing():
    z = draw(0, 3, 2, 5)
    assert torch.allclose(mean_scores(z), (z[:, 0] + z[:, 1]) / 2)
    assert torch.allclose(mean_probabilities(z), z.softmax(-1).mean(1).log(), atol=1e-6)


def test_two_heads_give_rows_in_training_and_one_otherwise():
    head, x = disturb(TwoHeads(4, 3)), draw(0, 5, 8)
    rows = torch.stack([head.by_class(x[:, :4]), head.by_teacher(x[:, 4:])], 1)
    assert torch.equal(head(x), rows)
    assert torch.allclose(head.eval()(x), rows.mean(1))
    other = TwoHeads(4, 3, mean_probabilities).eval()
    other.load_state_dict(head.state_dict())
    assert torch.allclose(other(x), mean_probabilities(rows))


def test_both_tokens():
    tokens = draw(0, 2, 3, 4)
    assert torch.equal(both_tokens(draw(1, 2, 2, 2, 4), tokens), torch.cat([tokens[:, 0], tokens[:, 1]], -1))
    with pytest.raises(ValueError, match="found 1"):
        both_tokens(draw(1, 2, 2, 2, 4), tokens[:, :1])
    with pytest.raises(ValueError, match="found 0"):
        both_tokens(draw(1, 2, 2, 2, 4))


def test_distilled_keeps_the_model_and_adds_a_token():
    model, x = small(), draw(0, 2, 3, 12, 12)
    two = distilled(model)
    assert isinstance(two, DistilledModel) and two.stem is model.stem and two.norm is model.norm
    assert torch.equal(two.tokens[0].value[0], model.tokens[0].value[0])
    assert torch.equal(two.tokens[1].table[0], model.tokens[1].table[0])
    assert two.tokens[0].value[1].abs().max() > 0 and two.tokens[1].table[1].abs().max() > 0
    assert not any(p.any() for p in two.head.parameters())
    assert measure.parameters(two) - measure.parameters(model) == 2 * 16 + 17 * 5
    assert two(x).shape == (2, 2, 5) and two.eval()(x).shape == (2, 5)
    disturb(two.head)
    row = torch.cat([(two.tokens[0].value + two.tokens[1].table).expand(2, -1, -1),
                     (two.stem(x) + two.stages[0].positions.table).flatten(1, 2)], 1)  # fmt: skip
    for block in two.stages[0].blocks:
        row = block(row)
    h = two.norm(row)
    assert torch.allclose(two(x), (two.head.by_class(h[:, 0]) + two.head.by_teacher(h[:, 1])) / 2, atol=1e-5)
    other = distilled(model, mean_probabilities).eval()
    assert other.head.fuse is mean_probabilities
    for without in (isotropic(PatchStem(4, 3, 8), [], 8, 5), two):
        with pytest.raises(ValueError, match="one class token with its position"):
            distilled(without)


def test_published_totals():
    with torch.device("meta"):
        plain = [measure.parameters(make()) for make in (vit_tiny, vit_small, vit_base)]
        makes = deit_tiny_distilled, deit_small_distilled, deit_base_distilled
        two = [measure.parameters(make()) for make in makes]
        large = measure.parameters(deit_base_distilled(384))
    assert plain == [5_717_416, 22_050_664, 86_567_656]
    assert two == [5_910_800, 22_436_432, 87_338_192]
    assert large == 87_338_192 + (24**2 - 14**2) * 768
    assert deit_tiny_distilled(32, 16, 7).head.by_teacher.out_features == 7


PARTS = {
    "layernorm_before": "mix.norm",
    "layernorm_after": "feed.norm",
    "attention.o_proj": "mix.part.to_out",
    "attention.output.dense": "mix.part.to_out",
    "mlp.fc1": "feed.part.up",
    "mlp.fc2": "feed.part.down",
    "intermediate.dense": "feed.part.up",
    "output.dense": "feed.part.down",
}
QUERIES = {"attention.q_proj": ("k_proj", "v_proj"), "attention.attention.query": ("key", "value")}
OUTSIDE = {
    "deit.embeddings.patch_embeddings.projection": "stem.cut",
    "deit.layernorm": "norm",
    "cls_classifier": "head.by_class",
    "distillation_classifier": "head.by_teacher",
}


def from_transformers(theirs, grid):
    """Our state dict from that of transformers' distilled DeiT, of version 4 or 5."""
    table = theirs["deit.embeddings.position_embeddings"][0]
    tokens = [theirs[f"deit.embeddings.{name}_token"][0] for name in ("cls", "distillation")]
    state = {
        "tokens.0.value": torch.cat(tokens),
        "tokens.1.table": table[:2],
        "stages.0.positions.table": table[2:].view(grid, grid, -1),
    }
    for name, tensor in theirs.items():
        part, w = name.rsplit(".", 1)
        if part in OUTSIDE:
            state[f"{OUTSIDE[part]}.{w}"] = tensor
        elif part.startswith(("deit.layers.", "deit.encoder.layer.")):
            number, part = part.removeprefix("deit.").removeprefix("encoder.").split(".", 1)[1].split(".", 1)
            ours = f"stages.0.blocks.{number}."
            if part in PARTS:
                state[f"{ours}{PARTS[part]}.{w}"] = tensor
            elif part in QUERIES:
                last = part.rsplit(".", 1)[1]
                rest = [theirs[name.replace(f".{last}.", f".{other}.")] for other in QUERIES[part]]
                state[f"{ours}mix.part.to_qkv.{w}"] = torch.cat([tensor, *rest])
    return state


@seeds
def test_equal_outputs_with_the_distilled_deit_of_transformers(seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=12,
        patch_size=4,
        num_labels=5,
        layer_norm_eps=1e-6,
    )
    peer = disturb(transformers.DeiTForImageClassificationWithTeacher(config), seed).eval()
    ours = distilled(vit(12, 4, 16, 2, 2, hidden=32, classes=5)).eval()
    ours.load_state_dict(from_transformers(peer.state_dict(), 3), strict=True)
    x, large = draw(seed, 2, 3, 12, 12), draw(seed, 1, 3, 20, 20)
    with torch.no_grad():
        found = peer(x)
        assert torch.allclose(ours(x), found.logits, atol=1e-5)
        assert torch.allclose(ours(large), peer(large, interpolate_pos_encoding=True).logits, atol=1e-5)
        rows = ours.train()(x)
    assert torch.allclose(rows[:, 0], found.cls_logits, atol=1e-5)
    assert torch.allclose(rows[:, 1], found.distillation_logits, atol=1e-5)


# --- long tails


def test_long_tailed_counts():
    assert long_tailed_counts(10, 100, 50.0)[0] == 100 and long_tailed_counts(10, 100, 50.0)[-1] == 2
    assert long_tailed_counts(10, 5000, 100.0)[:3] == [5000, 2997, 1796]  # CIFAR-10-LT
    assert long_tailed_counts(10, 5000, 100.0)[-1] == 50
    assert long_tailed_counts(4, 9, 1.0) == [9] * 4 and long_tailed_counts(2, 9, 9.0) == [9, 1]
    assert long_tailed_counts(3, 100, 100.0) == [100, 10, 1]
    for classes, largest, imbalance in ((1, 10, 2.0), (3, 10, 0.5), (3, 10, 11.0)):
        with pytest.raises(ValueError, match=f"{classes} classes from {largest} images down, imbalance {imbalance}"):
            long_tailed_counts(classes, largest, imbalance)


@seeds
def test_weights_are_one_over_the_effective_number(seed):
    counts = torch.randint(1, 2000, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    for beta in (0.0, 0.5, 0.99, 0.9999):
        raw = torch.tensor([1 / math.fsum(beta**i for i in range(n)) for n in counts])
        assert torch.allclose(effective_number_weights(counts, beta), raw / raw.mean(), rtol=1e-4)
    assert torch.equal(effective_number_weights(counts), effective_number_weights(counts, 0.9999))
    assert torch.equal(deferred_weights(counts, 4, 5), torch.ones(6))
    assert torch.equal(deferred_weights(counts, 5, 5), effective_number_weights(counts))
    assert torch.equal(deferred_weights(counts, 6, 5, 0.9), effective_number_weights(counts, 0.9))
    for beta in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"0 <= beta < 1 and images in all classes: {beta}"):
            effective_number_weights(counts, beta)
    with pytest.raises(ValueError, match="images in all classes"):
        effective_number_weights([3, 0])


@seeds
def test_sharpness_aware_gradient_is_that_at_the_end_of_the_climb(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = draw(seed, 6, 3).double(), draw(seed + 1, 6, 2).double()
    loss = lambda m, x, y: F.mse_loss(m(x), y)
    loss(model, x, y).backward()
    g = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    far = copy.deepcopy(model)
    size = sum((v**2).sum() for v in g).sqrt()
    with torch.no_grad():
        for p, v in zip(far.parameters(), g, strict=True):
            p.add_(0.3 * v / size)
    value = sharpness_aware_loss(model, x, y, loss=loss, radius=0.3)
    value.backward()
    end = loss(far, x, y)
    end.backward()
    assert torch.allclose(value, end)
    for p, q in zip(model.parameters(), far.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)
    model[0].requires_grad_(False)
    sharpness_aware_loss(model, x, y, loss=loss).backward()
    standing = nn.Linear(3, 1)
    nn.init.zeros_(standing.weight), nn.init.zeros_(standing.bias)
    flat = sharpness_aware_loss(standing, x.float(), torch.zeros(6, 1), loss=loss)
    assert flat == 0  # no slope, no climb


# --- amplitudes


@seeds
def test_amplitudes_mix_and_phases_stay(seed):
    x, other = draw(seed, 2, 3, 5, 6).double(), draw(seed + 1, 2, 3, 5, 6).double()
    for share in (0.0, 0.4, 1.0):
        y = torch.fft.fft2(mix_amplitude(x, other, share))
        expected = (1 - share) * torch.fft.fft2(x).abs() + share * torch.fft.fft2(other).abs()
        assert torch.allclose(y.abs(), expected)
        assert torch.allclose(torch.exp(1j * y.angle()), torch.exp(1j * torch.fft.fft2(x).angle()), atol=1e-6)
    assert torch.allclose(mix_amplitude(x, other, 0.0), x)
    assert mix_amplitude(x[:0], other[:0], 0.5).shape == (0, 3, 5, 6)
    each = torch.tensor([0.2, 0.9]).double().view(2, 1, 1, 1)
    assert torch.allclose(mix_amplitude(x, other, each)[1], mix_amplitude(x[1], other[1], 0.9))
    narrow = mix_amplitude(x.bfloat16(), other.bfloat16(), 0.5)
    assert narrow.dtype == torch.bfloat16 and torch.allclose(narrow.double(), mix_amplitude(x, other, 0.5), atol=0.1)


@seeds
def test_gates_weigh_places(seed):
    pool, x = disturb(PatchExcitation(6, 4), seed), draw(seed, 3, 2, 3, 4)
    flat = x.reshape(3, 24)
    g = ((flat @ pool.squeeze.weight.T).relu() @ pool.excite.weight.T).sigmoid()
    assert torch.allclose(pool.gates(x), g, atol=1e-6)
    assert torch.allclose(pool(x), (g[:, :, None] * x.reshape(3, 6, 4)).reshape(3, 24), atol=1e-6)
    assert pool.squeeze.bias is None and pool.excite.bias is None
    with pytest.raises(ValueError, match="gates for 6 places, but the map is 3 by 3"):
        pool(draw(seed, 3, 3, 3, 4))


def test_transface_layout():
    model = transface(16, 4, 8, 2, 2, 5, channels=1).eval()
    x = draw(0, 3, 1, 16, 16)
    assert model(x).shape == (3, 5) and model.tokens is None and model.pool.places == 16
    first, norm, last, end = model.head
    assert (first.in_features, first.out_features, last.out_features) == (16 * 8, 8, 5)
    assert first.bias is None and last.bias is None and norm.eps == end.eps == 2e-5
    assert model(x[:0]).shape == (0, 5) and len(model.stages[0].blocks) == 2


@seeds
def test_dominant_patches_alone_change(seed):
    torch.manual_seed(seed)
    x, gates = torch.rand(40, 2, 12, 20), torch.rand(40, 15)
    y = perturb_dominant_patches(x, gates, 4, 3, 0.5)
    moved = (patchify(x, 4) != patchify(y, 4)).any(-1).flatten(1)
    hit = moved.any(1)
    assert 0 < hit.sum() < 40 and y.min() >= 0 and y.max() <= 1
    assert moved[hit].sum(1).eq(3).all()
    for i in hit.nonzero()[:, 0].tolist():
        assert set(moved[i].nonzero()[:, 0].tolist()) == set(gates[i].topk(3).indices.tolist())
    assert torch.equal(perturb_dominant_patches(x, gates, 4, 3, 0.0), x)
    assert (perturb_dominant_patches(x, gates, 4, 3, 1.0) != x).flatten(1).any(1).all()
    many = torch.rand(600, 1, 12, 12)
    parts = (perturb_dominant_patches(many, torch.rand(600, 9), 4) != many).flatten(1)
    assert abs(parts.any(1).float().mean() - 0.2) < 0.06
    quiet = 0.4 + 0.2 * x  # far from the ends, so that nothing is clipped much
    z = perturb_dominant_patches(quiet, gates, 4, 15, 1.0)
    before, after = (patchify(t, 4).unflatten(-1, (2, 4, 4)).double() for t in (quiet, z))
    turn = torch.fft.fft2(after).angle() - torch.fft.fft2(before).angle()
    assert (torch.exp(1j * turn) - 1).abs().median() < 1e-3
    with pytest.raises(ValueError, match="3 by 5 patches, 14 gates, 3 to change"):
        perturb_dominant_patches(x, gates[:, :14], 4, 3)
    with pytest.raises(ValueError, match="3 by 5 patches, 15 gates, 16 to change"):
        perturb_dominant_patches(x, gates, 4, 16)


def test_hard_samples():
    tokens = draw(0, 4, 9, 6)
    spread = tokens.std(-1).sort(1, descending=True).values
    assert torch.allclose(hard_sample_weights(tokens, 2, 0.5), 1 + (-0.5 * spread[:, :2].mean(1)).exp())
    assert torch.allclose(hard_sample_weights(tokens), 1 + (-spread[:, :7].mean(1)).exp())
    assert torch.allclose(hard_sample_weights(torch.ones(2, 9, 6)), torch.full((2,), 2.0))


def test_margin_scores():
    z, prototypes, y = draw(0, 4, 6), draw(1, 3, 6), torch.tensor([0, 2, 1, 0])
    cosine = F.cosine_similarity(z[:, None], prototypes[None], dim=-1)
    expected = cosine.clone()
    expected[torch.arange(4), y] -= 0.4
    assert torch.allclose(margin_scores(z, prototypes, y), 64 * expected, atol=1e-4)
    assert torch.allclose(margin_scores(z, prototypes, y, 0.0, 2.0), 2 * cosine, atol=1e-5)


# --- MixPro


@pytest.mark.parametrize("cell", [2, 4, 8])
@seeds
def test_cells_come_from_one_picture(seed, cell):
    torch.manual_seed(seed)
    x = torch.zeros(200, 3, 8, 16)
    torch.manual_seed(seed)
    share = mix_shares(x, 1.0)
    torch.manual_seed(seed)
    mask = grid_masks(x, cell)
    assert mask.shape == (200, 1, 8, 16) and set(mask.unique().tolist()) <= {0.0, 1.0}
    small = mask[:, 0, ::cell, ::cell]
    assert torch.equal(mask[:, 0], small.repeat_interleave(cell, 1).repeat_interleave(cell, 2))
    n = (8 // cell) * (16 // cell)
    assert torch.equal(small.flatten(1).sum(1), (share * n).ceil())
    assert (small.mean(0) > 0.3).all() and (small.mean(0) < 0.9).all()
    for wrong in (3, 0):
        with pytest.raises(ValueError, match=f"cells of {wrong} pixels do not tile 8 by 16"):
            grid_masks(x, wrong)


@seeds
def test_attention_share(seed):
    attention, mask = draw(seed, 3, 8).exp(), (draw(seed + 1, 3, 1, 2, 4) > 0).float()
    wide = mask.repeat_interleave(5, 2).repeat_interleave(5, 3)
    expected = (attention * mask.flatten(1)).sum(1) / attention.sum(1)
    assert torch.allclose(attention_share(attention, wide, 5), expected)
    with pytest.raises(ValueError, match="attention to 7 patches, but the mask has 8"):
        attention_share(attention[:, :7], wide, 5)


@seeds
def test_progressive_share(seed):
    scores, labels = draw(seed, 5, 6).requires_grad_(), draw(seed + 1, 5, 6).softmax(-1)
    seen, area = torch.rand(5), torch.rand(5)
    p = scores.softmax(-1)
    a = (p * labels).sum(-1) / p.norm(dim=-1) / labels.norm(dim=-1)
    found = progressive_share(scores, labels, seen, area)
    assert torch.allclose(found, a * seen + (1 - a) * area, atol=1e-6) and not found.requires_grad


def test_class_attention_reads_the_last_layer():
    model, x = small(), draw(0, 2, 3, 12, 12)
    for m, p in ((model, 1), (distilled(model), 2)):
        last = attention_maps(m, x)[-1]
        assert torch.allclose(class_attention(m, x), last.mean(1)[:, 0, p:])
    assert class_attention(model, x).shape == (2, 9)
    with pytest.raises(ValueError, match="no class token"):
        class_attention(isotropic(PatchStem(4, 3, 8), [], 8, 5), x)


# --- ConTraCon


@pytest.mark.parametrize("h, e, d, k", [(2, 3, 5, 3), (3, 4, 4, 5), (1, 2, 7, 1)])
@seeds
def test_reweight_is_a_convolution_and_a_gate(seed, h, e, d, k):
    W, K, b, s = draw(seed, h, e, d), draw(seed + 1, h, k, k), draw(seed + 2, h), draw(seed + 3, h)
    wide = F.pad(W, [k // 2] * 4)
    slow = torch.zeros(h, e, d)
    for i, j in itertools.product(range(k), range(k)):
        slow += K[:, i, j, None, None] * wide[:, i : i + e, j : j + d]
    slow += b[:, None, None] + s.sigmoid()[:, None, None] * W
    assert torch.allclose(reweight(W, K, b, s), slow, atol=1e-5)


def test_reweighted_linear():
    linear, x = nn.Linear(6, 8), draw(0, 3, 6)
    layer = ReweightedLinear(linear, 4, 3)
    assert layer.linear is linear and torch.equal(layer.gates, torch.ones(4))
    assert layer.kernels.shape == (4, 3, 3) and layer.offsets.shape == (4,)
    assert 0.2 < layer.kernels.abs().max() <= 1 / 3 and layer.offsets.abs().max() <= 1 / 3
    assert ReweightedLinear(linear, 4).kernels.shape == (4, 15, 15)
    W = reweight(linear.weight.view(4, 2, 6), layer.kernels, layer.offsets, layer.gates).reshape(8, 6)
    assert torch.allclose(layer(x), x @ W.T + linear.bias, atol=1e-6)
    with pytest.raises(ValueError, match="8 rows do not make 3 heads"):
        ReweightedLinear(linear, 3)
    with pytest.raises(ValueError, match="a kernel of 4 has no center"):
        ReweightedLinear(linear, 4, 4)


FIRST = {
    "cct": lambda: compact(ConvolutionalStem(3, [8]), compact_blocks(2, 8, 2, 16), 8, 6, 4),
    "vit": lambda: vit(12, 4, 16, 2, 2, classes=4),
}


@pytest.mark.parametrize("kind", FIRST)
def test_a_task_owns_kernels_norms_pool_and_head(kind):
    first = disturb(FIRST[kind]())
    d, x = first.head.in_features, draw(0, 2, 3, 12, 12)
    before, state = first(x), copy.deepcopy(first.state_dict())
    model = ContinualModel(first, kernel=3)
    second, third = model.add_task(), model.add_task()
    assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))
    own = {name: p for name, p in third.named_parameters() if p.requires_grad}
    pool = d + 1 if isinstance(first.pool, nn.Module) else 0
    assert sum(p.numel() for p in own.values()) == 3 * 2 * 2 * (9 + 2) + 5 * 2 * d + pool + (d + 1) * 4
    known = {id(p) for p in first.parameters()}
    assert all(id(p) in known for p in third.parameters() if not p.requires_grad)
    assert not known & {id(p) for p in own.values()}
    assert not third.head.weight.any() and all(
        torch.equal(m.weight, torch.ones(d)) for m in third.modules() if isinstance(m, nn.LayerNorm)
    )
    assert not isinstance(first.stages[0].blocks[0].mix.part.to_qkv, ReweightedLinear)
    disturb(second.head), disturb(third.head)
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    third(x).square().mean().backward()
    assert all(p.grad is not None for p in own.values())
    optimizer.step()
    assert torch.equal(first(x), before)
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())
    assert torch.equal(model(x), torch.stack([first(x), second(x), third(x)], 1))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        assert again.tasks[1].stem is not again.tasks[0].stem
        shared = {id(p) for p in again.tasks[0].parameters()}
        assert sum(id(p) in shared for p in again.tasks[2].parameters()) == len(known) - len(own) + 6


def test_open_gates_and_no_kernel_attend_as_the_first_task():
    first, x = disturb(vit(12, 4, 16, 2, 2, classes=4)), draw(0, 2, 3, 12, 12)
    model = task_model(first, 5)
    norms = [m for m in first.modules() if isinstance(m, nn.LayerNorm)]
    mine = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    with torch.no_grad():
        for a, b in zip(norms, mine, strict=True):
            b.load_state_dict(a.state_dict())
        for layer in model.modules():
            if isinstance(layer, MultiHeadAttention):
                assert layer.to_qkv.kernels.shape == (6, 5, 5)
                layer.to_qkv.kernels.zero_(), layer.to_qkv.offsets.zero_(), layer.to_qkv.gates.fill_(50.0)
    assert torch.allclose(model.encode(x), first.encode(x), atol=1e-5)


def test_the_surest_task_has_the_lowest_entropy_of_the_mean():
    scores = draw(0, 3, 7, 4, 5)
    p = scores.mean(0).softmax(-1)
    assert torch.equal(surest_task(scores), (-(p * p.log()).sum(-1)).argmin(-1))
    sure = torch.zeros(1, 2, 3, 4)
    sure[0, 0, 2, 1], sure[0, 1, 1, 3] = 9.0, 200.0
    assert surest_task(sure).tolist() == [2, 1]


# --- all


@pytest.mark.parametrize("paper", examples)
def test_examples_learn_in_bfloat16(paper):
    f, inputs = examples[paper]()
    narrow = [x.bfloat16() for x in inputs]
    out = f.bfloat16()(*narrow) if isinstance(f, nn.Module) else f(*narrow)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
