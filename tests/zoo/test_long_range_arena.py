"""The rows of chapter 17: oracles, the slot, the table, lighter models, probes."""

import math
import random

import joblib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import data, measure
from tfkit.papers import Record, papers
from tfkit.zoo import linear_attention as linear
from tfkit.zoo import long_range_arena as arena
from tfkit.zoo import sparse_attention as sparse
from tfkit.zoo.attention import MultiHeadAttention, attention, attention_weights
from tfkit.zoo.transformer import Block, FeedForward, Stack

# ------------------------------------------------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("length, shortest", [(24, 4), (64, 16), (2000, 500)])
def test_long_range_arena_listops_labels_come_from_the_oracle(length, shortest, seed):
    x, y = arena.long_listops(20, length, shortest, seed=seed)
    assert x.shape == (20, length) and 0 <= y.min() and y.max() <= 9
    for row, value in zip(x, y.tolist(), strict=True):
        tokens = [arena.LISTOPS[i] for i in row]
        assert shortest <= sum(t != "_" for t in tokens) <= length
        assert data.listops_value(tokens) == value


def test_long_range_arena_listops_notices_a_wrong_rule(monkeypatch):
    monkeypatch.setitem(arena._LIST_RULES, "[MED", lambda v: sorted(v)[len(v) // 2])
    x, y = arena.long_listops(200, 64, 16, seed=0)
    found = [data.listops_value([arena.LISTOPS[i] for i in row]) for row in x]
    assert found != y.tolist()


@pytest.mark.parametrize("side, length, count", [(12, 9, 300), (16, None, 300), (32, None, 200), (128, None, 8)])
def test_long_range_arena_pathfinder_is_connectivity(side, length, count):
    images, labels = arena.pathfinder(count, side, length, seed=side)
    assert images.shape == (count, side, side)
    assert torch.equal(arena.connected(images), labels)
    assert 0.2 < labels.float().mean() < 0.8


def test_long_range_arena_pathfinder_the_oracle_can_be_wrong():
    images, labels = arena.pathfinder(200, 16, seed=3)
    assert not torch.equal(arena.connected(images, reach=1), labels)  # cannot cross the gaps
    assert not torch.equal(arena.connected(images, reach=5), labels)  # jumps to the other curve
    swapped = images.where(images != 120, torch.zeros_like(images))  # dots without curves
    assert arena.connected(swapped).float().mean() < 0.2


def test_long_range_arena_pathfinder_by_an_independent_search():
    images, labels = arena.pathfinder(40, 16, seed=7)
    for image, label in zip(images, labels.tolist(), strict=True):
        lit = {tuple(p) for p in (image > 0).nonzero().tolist()}
        one, other = (tuple(p) for p in (image == 255).nonzero().tolist())
        front, seen = [one], {one}
        while front:
            a, b = front.pop()
            new = {(a + i, b + j) for i in range(-2, 3) for j in range(-2, 3)} & lit - seen
            seen |= new
            front += new
        assert (other in seen) == bool(label)


def test_long_range_arena_dot_distance_does_not_give_the_answer():
    images, labels = arena.pathfinder(3000, 16, seed=5)
    dots = (images == 255).nonzero()[:, 1:].view(-1, 2, 2).float()
    order = (dots[:, 0] - dots[:, 1]).norm(dim=-1).argsort()
    right = labels[order].cumsum(0) + (1 - labels[order]).flip(0).cumsum(0).flip(0)
    assert max(right.max(), len(labels) - right.min()) / len(labels) < 0.56


@pytest.mark.parametrize("length", [16, 128, 1000])
def test_long_range_arena_texts_are_real_and_apart(length):
    for make in (arena.authorship, arena.retrieval):
        x, y = make(40, length, "train", seed=1)
        assert x.shape[-1] == length and x.shape[0] == len(y) == 40
        again, _ = make(40, length, "train", seed=1)
        assert torch.equal(x, again) and 0 <= x.min() and x.max() < 256
    pairs, labels = arena.retrieval(200, length, "test", seed=2)
    texts = [bytes(t.tolist()) for t in arena._sources("test")]
    homes = [[{i for i, t in enumerate(texts) if bytes(w.tolist()) in t} for w in pair] for pair in pairs]
    for (a, b), label in zip(homes, labels.tolist(), strict=True):
        assert a and b and (bool(a & b) if label else a != b or len(a) > 1)


def test_long_range_arena_digits_keep_their_pixels():
    raw, tokens = data.digits(), arena.pixel_digits(8)
    assert torch.equal(tokens.x, (raw.x * 255).round().long().flatten(1)) and torch.equal(tokens.y, raw.y)
    assert arena.pixel_digits(32).x.shape[1] == 1024


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: arena.long_listops(0, 64, 16), "count"),
        (lambda: arena.long_listops(3, 16, 64), "64"),
        (lambda: arena.long_listops(1, 64, 20, depth=2, arguments=3), "17"),
        (lambda: arena.pathfinder(3, 6), "6"),
        (lambda: arena.pathfinder(3, 16, 40), "40"),
        (lambda: arena.connected(torch.zeros(1, 8, 8, dtype=torch.long)), "two dots"),
        (lambda: arena.authorship(2, 10**7), str(10**7)),
        (lambda: arena.ArenaEncoder("abacus", arena.Plan(), 10), "abacus"),
        (lambda: arena.rounded(torch.randn(2, 3), 1), "1"),
        (lambda: arena.distillation_loss(*torch.randn(2, 2, 3), torch.tensor([0, 1]), 0.0), "0.0"),
        (lambda: arena.accumulate(nn.Linear(2, 2), lambda m, x: m(x).mean(), torch.randn(3, 2), 4), "4"),
        (lambda: arena.crossover([1, 2], [1], [1, 2]), "2"),
        (lambda: arena.attention_reach(torch.rand(3, 4)), "3"),
        (lambda: arena.run_arena("nowhere.csv", ["abacus"]), "abacus"),
    ],
)
def test_bad_arguments_are_named(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# ------------------------------------------------------------------------------------------------------------- the slot


@pytest.mark.parametrize("name", arena.mixers)
def test_long_range_arena_every_mixer_fits_the_slot(name):
    torch.manual_seed(0)
    for length, size in ((128, 16), (144, 12)):
        encoder = arena.ArenaEncoder(name, arena.Plan(32, 4, length, size), 20, depth=1).eval()
        ids = torch.randint(20, (2, length))
        with torch.no_grad():
            out, other = encoder(ids), encoder(ids.roll(length // 2, 1))
        assert out.shape == (2, 32) and torch.isfinite(out).all()
        assert not torch.allclose(out, other)
        changed = ids.clone()
        changed[:, 5] = (changed[:, 5] + 7) % 20  # every mixer must read a changed token
        with torch.no_grad():
            assert not torch.allclose(encoder(changed), out, atol=1e-6)


def test_the_encoder_mixes_only_through_the_slot():
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    encoder = arena.ArenaEncoder("plain attention", arena.Plan(16, 2, 12, 4), 20)
    for block in encoder.blocks:
        block[0].part = Nothing()
    ids = torch.randint(20, (2, 12))
    one_by_one = encoder.norm(encoder.blocks(encoder.embed(ids)))
    assert torch.allclose(encoder(ids), one_by_one.mean(1), atol=1e-6)
    places = encoder.embed.positions.table
    with torch.no_grad():
        places.zero_()
    assert torch.allclose(encoder(ids), encoder(ids.flip(1)), atol=1e-6)  # nothing mixes any more


def test_pairs_are_read_by_one_encoder():
    task = arena.ArenaTask(torch.randint(9, (4, 2, 16)), torch.zeros(4), None, None, 9, 2)
    model = arena.arena_model("plain attention", task, arena.Plan(16, 2, 16, 4))
    same = task.x[:, :1].expand(-1, 2, -1)
    a, b = model.encoder(same.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    assert torch.allclose(a, b) and model(task.x).shape == (4, 2)


def test_a_match_learns_and_repeats_itself():
    x = torch.randint(4, (256, 16))
    y = (x == 3).any(1).long()
    task = arena.ArenaTask(x, y, x[:100], y[:100], 4, 2)
    settings = arena.Settings(width=16, heads=2, size=4, depth=1, steps=60, batch=32)
    first = arena.match("plain attention", task, 0, settings)
    assert first == arena.match("plain attention", task, 0, settings)
    assert first >= task.base - 0.02


# ------------------------------------------------------------------------------------------------------------ the table


def test_long_range_arena_the_table_is_taken_up_where_it_stopped(tmp_path, monkeypatch):
    played = []
    monkeypatch.setattr(arena, "_price", lambda name: [arena.Row(name, w, "256", 0, 1.0) for w in arena.Cost._fields])
    monkeypatch.setattr(arena, "_write", lambda path, rows, keep=arena._write: (played.append(rows), keep(path, rows)))
    path = tmp_path / "deep" / "table.csv"
    arena.run_arena(path, ["linear", "S4D"], ["cost"])
    assert len(played) == 2
    arena.run_arena(path, ["linear", "S4D", "LSH"], ["cost"])
    assert len(played) == 3
    notes, rows = arena.read_table(path)
    assert notes["torch"] == torch.__version__.split("+")[0] and len(rows) == 9
    path.write_text(path.read_text().replace("steps=250", "steps=7", 1))
    with pytest.raises(ValueError, match="steps=7"):
        arena.run_arena(path, ["linear"], ["cost"])


def test_matches_give_the_same_wherever_they_are_played(tmp_path):
    settings = arena.Settings(width=16, heads=2, size=8, depth=1, steps=6, batch=8)
    names = ["linear", "plain attention"]
    here = [row for name in names for row in arena._play(name, "image", 1, settings)]
    threads = torch.get_num_threads()
    for backend in ("loky", "multiprocessing"):  # the last hands its rows over at the end, as Ray does
        path = tmp_path / f"{backend}.csv"
        with joblib.parallel_config(backend=backend):
            arena.run_arena(path, names, ["image"], [1], workers=2, settings=settings)
        notes, rows = arena.read_table(path)
        assert sorted(rows) == sorted(here) and notes["matches"] == str(settings)
        assert torch.get_num_threads() == threads
    played = path.read_text()
    arena.run_arena(path, names, ["image"], [1], workers=2, settings=settings)  # nothing is left
    assert path.read_text() == played


def test_the_table_answers_questions():
    row = lambda what, where, value, seed=0: arena.Row("x", what, where, seed, value)
    dense = [arena.Row("plain attention", "training", str(n), 0, n**2 * 1e-6) for n in (256, 512, 1024)]
    rows = [row("accuracy", "image", 0.5), row("accuracy", "image", 0.7, 1), *dense]
    rows += [row("training", str(n), n * 5e-4) for n in (256, 512, 1024)]
    assert arena.accuracies(rows, "x") == {"image": [0.5, 0.7]}
    assert arena.costs(rows, "x", "training")[512] == pytest.approx(0.256)
    assert arena.crosses(rows, "x", "training") == pytest.approx(500)
    assert arena.crosses(rows[:-1], "x", "training") == math.inf


@pytest.mark.parametrize("factor, p", [(3.0, 1.0), (40.0, 0.5), (2.0, 1.5)])
def test_long_range_arena_crossover_of_power_laws(factor, p):
    lengths = [2**i for i in range(4, 12)]
    theirs = [n**2.0 for n in lengths]
    ours = [factor * n**p for n in lengths]
    meet = factor ** (1 / (2 - p))
    expected = lengths[0] if meet <= lengths[0] else meet
    assert arena.crossover(lengths, ours, theirs) == pytest.approx(expected)


def test_long_range_arena_crossover_means_for_good():
    assert arena.crossover([1, 2, 4, 8], [1, 1, 9, 1], [2, 2, 2, 2]) > 4  # faster, slower, faster
    assert arena.crossover([1, 2], [3, 3], [1, 1]) == math.inf


def test_cost_sees_what_grows():
    small, large = (arena.cost("written-out attention", arena.Plan(length=n), 1) for n in (256, 512))
    assert 3 < large.memory / small.memory < 4.2
    small, large = (arena.cost("linear", arena.Plan(length=n), 1) for n in (256, 512))
    assert 1.8 < large.memory / small.memory < 2.2


# ------------------------------------------------------------------------------------------------------- lighter models


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_faster_lighter_survey_tied_blocks(depth):
    torch.manual_seed(depth)
    block = Block(MultiHeadAttention(16, 2), FeedForward(16), lambda: nn.LayerNorm(16))
    stack, x = arena.tied(block, depth), torch.randn(2, 7, 16)
    assert measure.parameters(stack) == measure.parameters(block)
    expected = x
    for _ in range(depth):
        expected = block(expected)
    assert torch.equal(stack(x), expected)


@pytest.mark.parametrize("seed, rows, parts", [(0, 8, 3), (1, 5, 5), (2, 7, 1)])
def test_faster_lighter_survey_micro_batches_give_the_whole_gradient(seed, rows, parts):
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 1)).double(), torch.randn(rows, 6).double()
    loss = lambda model, x: model(x).square().mean()
    value = arena.accumulate(model, loss, x, parts)
    whole = torch.autograd.grad(loss(model, x), list(model.parameters()))
    assert torch.allclose(value, loss(model, x))
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), whole, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_faster_lighter_survey_rounding_stays_within_half_a_step(bits):
    weight = torch.randn(17, 23, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-3, 3, 17)[:, None]
    weight[3] = 0
    integers, step = arena.rounded(weight, bits)
    assert integers.dtype == torch.int8 and integers.int().abs().max() == 2 ** (bits - 1) - 1
    assert ((integers * step - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    model = arena.round_weights_(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), bits)
    assert all(len(row.unique()) <= 2**bits - 1 for m in model if isinstance(m, nn.Linear) for row in m.weight)


@pytest.mark.parametrize("temperature, share", [(1.0, 0.3), (2.0, 0.5), (5.0, 1.0)])
def test_faster_lighter_survey_distillation_from_its_definition(temperature, share):
    g = torch.Generator().manual_seed(int(temperature))
    s, t = torch.randn(2, 6, 5, generator=g).double().unbind(0)
    y = torch.randint(5, (6,), generator=g)
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
    soft = (p * (p / q).log()).sum(-1).mean()
    expected = (1 - share) * F.cross_entropy(s, y) + share * temperature**2 * soft
    assert torch.allclose(arena.distillation_loss(s, t, y, temperature, share), expected)


def test_faster_lighter_survey_recomputed_gradients():
    torch.manual_seed(0)
    stack = Stack([Block(MultiHeadAttention(16, 2), FeedForward(16), lambda: nn.LayerNorm(16)) for _ in range(3)])
    again, x = Stack([sparse.Recomputed(block) for block in stack.blocks]), torch.randn(2, 9, 16)
    weights = list(stack.parameters())
    a, b = (torch.autograd.grad(m(x).square().mean(), weights) for m in (stack, again))
    assert all(torch.allclose(i, j, atol=1e-6) for i, j in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------- taxonomy, probes


def test_long_context_survey_leaves_are_papers_and_need_a_claim():
    known = papers()
    ids = [id for leaves in arena.taxonomy.values() for found in leaves.values() for id in found]
    assert len(arena.taxonomy) == 5 and set(ids) <= set(known)
    records = {id: Record(known[id], holds=["x"] * (id != "linformer")) for id in ids}
    runs = arena.leaves_that_run(records)
    assert "linformer" not in runs["efficient attention", "approximated"] and all(runs.values())
    assert not any(arena.leaves_that_run({}).values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_range_nlp_reach_from_its_definition(seed):
    weights = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    expected = [
        sum(weights[..., i, j].mean() for i in range(9) for j in range(9) if abs(i - j) == d) / 9 for d in range(9)
    ]
    assert torch.allclose(arena.attention_reach(weights), torch.stack(expected), atol=1e-6)
    assert arena.attention_reach(weights).sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("radius", [1, 3, 6])
def test_long_range_nlp_a_window_has_no_mass_outside(radius):
    q, k = torch.randn(2, 2, 3, 20, 8, generator=torch.Generator().manual_seed(radius)).unbind(0)
    reach = arena.attention_reach(arena.map_of(sparse.Window(radius), q, k))
    assert (reach[radius + 1 :] == 0).all() and (reach[: radius + 1] > 0).all()
    assert torch.allclose(arena.map_of(attention, q, k), attention_weights(q, k), atol=1e-6)


def test_long_range_nlp_error_grows_with_replaced_layers():
    torch.manual_seed(0)
    layers = [MultiHeadAttention(16, 2) for _ in range(4)]
    blocks = [Block(layer, FeedForward(16), lambda: nn.LayerNorm(16)) for layer in layers]
    stack, x = Stack(blocks), torch.randn(4, 24, 16)
    with torch.no_grad():
        exact, errors = stack(x), []
        for count in range(5):
            found = []
            for seed in range(4):
                attends = [linear.Featured(linear.RandomFeatures(8, 16, 10 * seed + i)) for i in range(count)]
                with arena.replaced(layers, attends):
                    found.append((stack(x) - exact).norm())
            errors.append(torch.stack(found).mean().item())
        assert errors[0] == 0 and all(a < b for a, b in zip(errors, errors[1:], strict=False))
        assert torch.equal(stack(x), exact)  # the old functions are back
    with pytest.raises(ValueError, match="5 functions for 4"), arena.replaced(layers, [attention] * 5):
        pass


def test_long_range_nlp_functions_come_back_after_an_error():
    layer = MultiHeadAttention(16, 2, attend=sparse.Window(3))
    before = layer.attend
    with pytest.raises(RuntimeError), arena.replaced([layer], [attention]):
        raise RuntimeError(random.random())
    assert layer.attend is before and "attend" in dict(layer.named_children())
