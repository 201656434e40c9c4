"""Chapter 16: patches, blocks, copies and merges against their obvious forms, exact limits, and broken twins."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.past import remember
from tfkit.zoo import sequence_compression as z
from tfkit.zoo.attention import MultiHeadAttention, attention, causal_attention, causal_mask
from tfkit.zoo.transformer import Block, FeedForward, Stack, language_model


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def some_ends(b, n, share=0.3):
    return torch.rand(b, n) < share


def worst(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------ counted tokens


def test_a_token_of_size_c_votes_as_c_tokens(seed):
    layer, x = z.SizedAttention(24, 3), torch.randn(2, 5, 24)
    times = torch.randint(1, 5, (5,))
    repeated = layer(x.repeat_interleave(times, 1))
    counted = layer(x, size=times.float().expand(2, -1))
    assert worst(counted.repeat_interleave(times, 1), repeated) < 1e-5
    times[0] += 1
    assert worst(layer(x), layer(x, size=times.float()[None])) > 1e-4
    assert contracts.agree(layer, partial(MultiHeadAttention.forward, layer), x)


# ----------------------------------------------------------------------------------------------------------- blt


def test_blt_entropy_of_known_distributions():
    assert torch.allclose(z.next_byte_entropy(torch.zeros(2, 256)), torch.tensor(256.0).log())
    sure = F.one_hot(torch.tensor([3]), 256).float() * 100
    assert z.next_byte_entropy(sure).item() < 1e-6
    h = torch.tensor([[0.2, 2.0, 2.5, 0.1, 1.0]])
    assert z.entropy_ends(h, 1.5).tolist() == [[False, True, True, False, False]]
    assert z.rising_ends(h, 0.6).tolist() == [[False, True, False, False, True]]


def test_blt_even_and_space_ends():
    ids = torch.tensor([list(b"ab, cd e")])
    assert z.even_ends(ids, 3).int().tolist() == [[0, 0, 1, 0, 0, 1, 0, 0]]
    assert z.space_ends(ids).int().tolist() == [[0, 0, 1, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("b, n", [(1, 1), (2, 9), (3, 40)])
def test_blt_patches_partition_the_bytes(seed, b, n):
    ends, x = some_ends(b, n), torch.randn(b, n, 4)
    patch, pooled = z.patch_of(ends), z.pool_patches(x, ends)
    back = z.give_back(pooled, ends)
    for row in range(b):
        assert torch.bincount(patch[row]).sum() == n
        finished = -1
        for t in range(n):
            assert patch[row, t] == ends[row, :t].sum()
            own = x[row, patch[row] == patch[row, t]]
            assert torch.equal(pooled[row, patch[row, t]], own.amax(0))
            finished = finished + int(ends[row, t])
            assert torch.equal(back[row, t], pooled[row, finished] if finished >= 0 else torch.zeros(4))


def test_blt_own_patch_attention_is_masked_attention(seed):
    ends = some_ends(2, 17)
    patch = z.patch_of(ends)
    count = int(patch.max()) + 1
    q, (k, v) = torch.randn(2, 3, count, 8), torch.randn(2, 2, 3, 17, 8)
    own = patch[:, None, None] == torch.arange(count)[:, None]
    exact = attention(q, k, v, own).nan_to_num()  # rows without bytes
    assert worst(z.own_patch_attention(q, 5 * k, v, patch), attention(q, 5 * k, v, own).nan_to_num()) < 1e-5
    shifted = z.own_patch_attention(q, k, v, (patch - 1).clamp_min(0))
    assert worst(shifted, exact) > 1e-3


RULES = {
    "even": partial(z.even_ends, size=3),
    "space": z.space_ends,
    "every": lambda ids: torch.ones_like(ids, dtype=torch.bool),
    "never": lambda ids: torch.zeros_like(ids, dtype=torch.bool),
    "content": lambda ids: (ids + F.pad(ids, (1, 0))[:, :-1]) % 3 == 0,
}


@pytest.mark.parametrize("rule", RULES)
def test_blt_is_causal_from_byte_to_logit(rule):
    torch.manual_seed(0)
    model, ids = z.small_blt(16, 2, 1), torch.randint(32, 127, (1, 14))
    assert contracts.causal(lambda i: model(i, RULES[rule](i)), ids)


def test_blt_broken_twins_are_caught():
    torch.manual_seed(0)
    model, ids = z.small_blt(16, 2, 1), torch.randint(32, 127, (1, 14))
    early = lambda i: F.pad(RULES["content"](i), (0, 1))[:, 1:]  # knows the next byte's verdict
    assert not contracts.causal(lambda i: model(i, early(i)), ids)
    x, ends = torch.randn(1, 12, 3), lambda x: z.even_ends(x[..., 0].long(), 4)
    own = lambda x: z.pool_patches(x, ends(x)).gather(1, z.patch_of(ends(x)).unsqueeze(-1).expand(x.shape))
    assert not contracts.causal(own, x)


def test_blt_patches_of_one_byte_are_full_attention(seed):
    latent, x = z.latent_stack(16, 2, 2), torch.randn(2, 11, 16)
    every = torch.ones(2, 11, dtype=torch.bool)
    assert contracts.reduces_to(lambda x: z.give_back(latent(z.pool_patches(x, every)), every), latent, x)
    mix = partial(MultiHeadAttention, 16, 2, attend=causal_attention)
    mixer = z.PatchMixer(nn.Identity(), mix(), 1)
    assert contracts.reduces_to(mixer, lambda x: x + mixer.latent(x), x)
    mixer.size = 2
    assert not contracts.agree(mixer, lambda x: x + mixer.latent(x), x)


def test_blt_parity_with_transformers():
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    ids = torch.randint(256, (2, 30))
    for size in range(1, 9):
        ours = z.ngram_hash(ids, size, 500, prime=5915587277)
        assert torch.equal(ours, blt.byte_group_hash_function(ids, size, 5915587277, 500))
    ends, x = some_ends(2, 30), torch.randn(2, 30, 8)
    pooled = z.pool_patches(x, ends)
    theirs = blt.BltLocalEncoder.patch_reduce(None, x, pooled.shape[1], z.patch_of(ends))
    assert torch.equal(pooled, theirs)


def test_blt_parity_of_patch_lengths_with_transformers():
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    torch.manual_seed(0)
    h = torch.rand(1, 20) * 3
    theirs = blt.BltPatcher.patch_lengths_from_entropies(h, 20, threshold=1.5)
    # the library always ends a patch after the first byte (its start symbol), and decides the byte after the last
    ends = z.entropy_ends(h, 1.5)
    ends[:, 0] = True
    ours = torch.bincount(z.patch_of(ends)[0])
    assert theirs[0][theirs[0] > 0].tolist() == ours.tolist()


def test_blt_work_follows_patches():
    model, ids = z.small_blt(32, 4, 6), torch.randint(256, (1, 64))
    one, four = (measure.flops(model, ids, z.even_ends(ids, size)) for size in (1, 4))
    assert four < 0.4 * one


# ----------------------------------------------------------------------------------------------------------- vcc


def ordinary(encoder, vip, tokens):
    x = torch.cat([vip, tokens], 1)
    for layer in encoder.blocks:
        x = layer.block(x)
    return x


@pytest.mark.parametrize("block, count", [(1, 5), (3, 4), (8, 2)])
def test_vcc_round_trip(seed, block, count):
    x = torch.randn(2, block * count, 6)
    assert worst(z.refine(*z.coarsen(x, block)), x) < 1e-6


@pytest.mark.parametrize("m, n, size", [(1, 12, 4), (3, 20, 2), (2, 9, 9)])
def test_vcc_all_blocks_kept_is_the_ordinary_encoder(seed, m, n, size):
    encoder = z.vip_encoder(16, 2, 2, keep=n // size, size=size)
    vip, tokens = torch.randn(2, m, 16), torch.randn(2, n, 16)
    found = torch.cat(encoder(vip, tokens), 1)
    assert worst(found, ordinary(encoder, vip, tokens)) < 1e-5


@pytest.mark.parametrize("keep", [0, 1, 2, 4])
def test_vcc_equal_tokens_are_exact_and_need_the_votes(seed, keep):
    encoder = z.vip_encoder(16, 2, 2, keep=keep, size=3)
    vip, tokens = torch.randn(2, 2, 16), torch.randn(2, 4, 16).repeat_interleave(3, 1)
    exact = ordinary(encoder, vip, tokens)
    assert worst(torch.cat(encoder(vip, tokens), 1), exact) < 1e-5
    for layer in encoder.blocks:
        mixer = layer.block.mix.part
        mixer.forward = lambda x, size=None, mixer=mixer: z.SizedAttention.forward(mixer, x)
    if keep < 4:
        assert worst(encoder(vip, tokens)[0], exact[:, :2]) > 1e-4


def test_vcc_differences_of_unseen_blocks_stay(seed):
    encoder = z.vip_encoder(16, 2, 1, keep=2, size=4)
    vip, tokens = torch.randn(2, 2, 16), torch.randn(2, 20, 16)
    before = z.coarsen(tokens, 4)
    _, coarse, difference = encoder.blocks[0](vip, *before)
    changed = (difference - before[1]).abs().amax((2, 3)) > 0
    best = encoder.blocks[0].scores(vip, before[0]).topk(2).indices
    assert changed.sum() == 4
    assert changed.gather(1, best).all()
    assert ((coarse - before[0]).abs().amax(-1) > 0).all()


# ----------------------------------------------------------------------------------------------- phd_transformer


@pytest.mark.parametrize("n, copies, window, chunk", [(5, 1, 0, None), (4, 3, 0, None), (6, 2, 2, None), (7, 3, 3, 3)])
def test_phd_transformer_mask_by_its_rule(n, copies, window, chunk):
    mask = z.phd_mask(n, copies, window, chunk)
    for a in range(n * copies):
        for b in range(n * copies):
            (t, j), (m, i) = divmod(a, copies), divmod(b, copies)
            allowed = (m < t and i == 0) or (m == t and i <= j)
            near = 0 < t - m <= window and 0 < i <= j and (chunk is None or t // chunk == m // chunk)
            assert mask[a, b] == (allowed or near)


def with_gradients(attend, *inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    answer = attend(*inputs)
    weight = torch.arange(answer.numel()).reshape(answer.shape).sin()
    return [answer, *torch.autograd.grad((answer * weight).sum(), inputs)]


def phd_gap(*sizes, n=11, scale=1.0):
    copies = sizes[0]
    q, k, v = torch.randn(3, 2, 3, n * copies, 8).unbind(0)
    lean = with_gradients(lambda *t: z.hidden_attention(*t, *sizes), scale * q, scale * k, v)
    masked = with_gradients(partial(attention, mask=z.phd_mask(n, *sizes)), scale * q, scale * k, v)
    return max(map(worst, lean, masked))


@pytest.mark.parametrize("n", [1, 2, 11, 16])
@pytest.mark.parametrize(
    "sizes", [(1,), (2,), (3,), (2, 1), (3, 4), (2, 20), (2, 2, 3), (3, 5, 2), (2, 3, 16), (2, 0, 4)]
)
def test_phd_transformer_without_a_mask_equals_the_masked_form(n, sizes):
    torch.manual_seed(n)
    assert phd_gap(*sizes, n=n) < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_phd_transformer_without_a_mask_holds_for_flat_and_sharp_scores(seed, scale):
    assert phd_gap(2, 3, n=20, scale=scale) < 1e-3


def test_phd_transformer_broken_votes_and_blocks_are_caught(seed, monkeypatch):
    near = z.near_copies
    deaf = lambda *a: (near(*a)[0], 0 * near(*a)[1])  # near keys vote as one key of score zero
    monkeypatch.setattr(z, "near_copies", deaf)
    assert phd_gap(2) > 1e-2
    short = lambda q, k, v, copies, window, chunk: near(q, k, v, copies, max(window - 1, 0), chunk)
    monkeypatch.setattr(z, "near_copies", short)
    assert phd_gap(2) < 1e-4
    assert phd_gap(2, 3) > 1e-2


def test_phd_transformer_memory_stays_linear():
    lengths = [256, 512, 1024]
    copies = {n: torch.randn(3, 1, 2, 2 * n, 8).unbind(0) for n in lengths}
    for sizes in [(2,), (2, 8), (2, 8, 16)]:
        lean = [measure.peak_bytes(lambda *t, s=sizes: z.hidden_attention(*t, *s), *copies[n]) for n in lengths]
        assert measure.growth(lengths, lean).exponent < 1.2
    masked = lambda *t: attention(*t, z.phd_mask(t[0].shape[2] // 2, 2))
    assert measure.growth(lengths, [measure.peak_bytes(masked, *copies[n]) for n in lengths]).exponent > 1.7


def test_phd_transformer_mixer_with_one_copy_is_causal_attention(seed):
    mixer, x = z.RepeatMixer(16, 2, 1), torch.randn(2, 9, 16)
    plain = partial(MultiHeadAttention.forward, mixer.mix)
    mixer.mix.attend, lean = nn.Module(), mixer.mix.attend
    mixer.mix.attend.forward = lambda q, k, v, mask=None: causal_attention(q, k, v)
    exact = plain(x)
    mixer.mix.attend = lean
    assert worst(mixer(x), exact) < 1e-5
    two = z.RepeatMixer(16, 2, 2)
    before = two(x)
    two.hidden.data.add_(1.0)  # the vectors matter: copies are not the same token twice
    assert worst(two(x), before) > 1e-3


def test_phd_transformer_one_copy_is_the_plain_decoder(seed):
    ours, ids = z.PHDLanguageModel(20, 16, 2, 2, copies=1), torch.randint(20, (2, 9))
    theirs = language_model(20, 16, 2, mixer=lambda: MultiHeadAttention(16, 2, attend=causal_attention))
    theirs.load_state_dict({name: t for name, t in ours.state_dict().items() if name != "hidden"})
    assert contracts.agree(ours, theirs, ids)


@pytest.mark.parametrize("make", [z.HiddenDecoding, partial(z.HiddenDecoding, window=2)])
def test_phd_transformer_is_causal(seed, make):
    model = z.PHDLanguageModel(20, 16, 2, 2, copies=3, make=make)
    assert contracts.causal(model, torch.randint(20, (1, 8)))


class Blind(z.HiddenDecoding):
    def forward(self, q, k, v, mask=None):
        return attention(q, k, v)


def test_phd_transformer_without_the_mask_is_caught():
    torch.manual_seed(0)
    model = z.PHDLanguageModel(20, 16, 2, 2, copies=2, make=Blind)
    assert not contracts.causal(model, torch.randint(20, (1, 8)))


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [2, 7]])
def test_phd_transformer_memory_of_originals(seed, pieces):
    model, ids = z.PHDLanguageModel(20, 16, 2, 2, copies=3), torch.randint(20, (2, 9))
    with torch.no_grad():
        whole, found, start = model(ids), [], 0
        with remember(model) as past:
            for piece in ids.split(pieces, 1):
                found.append(model(piece, start=start))
                start += piece.shape[1]
            assert past.numbers() == 2 * 2 * 2 * 9 * 16, (
                "originals alone: keys and values, layers, texts, tokens, width"
            )
    assert worst(torch.cat(found, 1), whole) < 1e-5
    with pytest.raises(ValueError, match="its window of 2 needs hidden copies"):
        with remember(z.PHDLanguageModel(20, 16, 2, 1, copies=3, make=partial(z.HiddenDecoding, window=2))):
            pass


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [2, 7]])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_blt_mixer_goes_on_from_an_open_patch(pieces, size):
    mixer, x = z.patch_mixer(16, 2, size, window=3), torch.randn(2, 9, 16)
    with torch.no_grad(), remember(mixer) as past:
        found = torch.cat([mixer(piece) for piece in x.split(pieces, 1)], 1)
        kept = past.numbers()
    assert worst(found, mixer(x)) < 1e-5
    patches, left = divmod(9, size)
    assert kept == 2 * 16 * (2 * 2 + 2 * patches + left + 1) + 1, "window, patches, the open patch, the last answer"


# ---------------------------------------------------------------------------------------------------------- male


def test_male_factored_attention_is_its_hidden_map(seed):
    q, k, v = torch.randn(3, 2, 3, 15, 6).unbind(0)
    hidden = q.softmax(-1) @ k.softmax(-2).transpose(-2, -1)
    assert torch.allclose(hidden.sum(-1), torch.ones(2, 3, 15), atol=1e-5)
    assert worst(z.factored_attention(q, k, v), hidden @ v) < 1e-5


def test_male_factored_attention_counts(seed):
    q, k, v = torch.randn(3, 2, 3, 6, 4).unbind(0)
    times = torch.tensor([1, 3, 1, 2, 5, 1])
    more = lambda t: t.repeat_interleave(times, 2)
    counted = z.factored_attention(q, k, v, bias=times.float().log()[None])
    assert worst(counted, z.factored_attention(q, more(k), more(v))) < 1e-5


@pytest.mark.parametrize("n, keep", [(8, 8), (8, 5), (8, 4), (9, 5), (2, 1)])
def test_male_merging_by_its_rule(seed, n, keep):
    x, size = torch.randn(3, n, 5), torch.randint(1, 6, (3, n)).float()
    found, sizes = z.merge_neighbors(x, size, keep)
    for row in range(3):
        alike = [F.cosine_similarity(x[row, 2 * i], x[row, 2 * i + 1], dim=0).item() for i in range(n // 2)]
        best = sorted(range(n // 2), key=lambda i: -alike[i])[: n - keep]
        tokens, votes = [], []
        for i in range(n):
            if i // 2 in best and i % 2 == 0:
                votes.append(size[row, i] + size[row, i + 1])
                tokens.append((size[row, i] * x[row, i] + size[row, i + 1] * x[row, i + 1]) / votes[-1])
            elif i // 2 not in best:
                tokens.append(x[row, i])
                votes.append(size[row, i])
        assert worst(found[row], torch.stack(tokens)) < 1e-5
        assert torch.equal(sizes[row], torch.stack(votes))


def test_male_without_merging_is_the_ordinary_encoder(seed):
    model = z.LongClassifier(3, 16, 2, 2, 4, share=1.0)
    norm = partial(nn.LayerNorm, 16)
    stack = Stack([Block(MultiHeadAttention(16, 2), FeedForward(16), norm) for _ in range(2)])
    stack.blocks.load_state_dict(model.encoder.blocks.state_dict())

    def plain(x):
        x = model.encoder.embed(x)
        x = stack(x + z.sinusoidal_positions(x.shape[1], x.shape[2]))
        return model.classify(model.norm(x).mean(1))

    assert contracts.agree(model, plain, torch.randn(2, 16, 3))
    assert not contracts.agree(model, plain, torch.randn(2, 17, 3))  # above the limit it is the light form


def test_male_equal_neighbors_merge_exactly(seed):
    x, mixer = torch.randn(2, 6, 16).repeat_interleave(2, 1), z.SizedAttention(16, 2)
    merged, size = z.merge_neighbors(x, torch.ones(2, 12), 6)
    assert worst(mixer(merged, size=size), mixer(x)[:, ::2]) < 1e-5
    assert worst(mixer(merged), mixer(merged, size=size)) < 1e-5  # all of one size: nothing to correct
    size = torch.tensor([[1.0, 4, 1, 1, 2, 1]])
    assert worst(mixer(merged), mixer(merged, size=size)) > 1e-4


def test_male_work_is_linear():
    model, lengths = z.LongClassifier(1, 32, 4, 4, 2), [256, 512, 1024]
    work = [measure.flops(model, torch.randn(1, n, 1)) for n in lengths]
    assert measure.growth(lengths, work).exponent < 1.1


# -------------------------------------------------------------------------------------------------------- errors

plain_block = lambda: Block(z.SizedAttention(8, 2), FeedForward(8), partial(nn.LayerNorm, 8))
BAD = {
    "patch size": lambda: z.even_ends(torch.zeros(1, 4).long(), 0),
    "n-gram": lambda: z.ngram_hash(torch.zeros(1, 4).long(), 0, 10),
    "reader heads": lambda: z.PatchReader(10, 3),
    "writer heads": lambda: z.PatchWriter(10, 3),
    "mixer size": lambda: z.PatchMixer(nn.Identity(), nn.Identity(), 0),
    "block": lambda: z.coarsen(torch.randn(1, 7, 2), 2),
    "keep": lambda: z.VIPBlock(plain_block(), -1),
    "copies": lambda: z.phd_mask(4, 0),
    "no copies": lambda: z.hidden_attention(*torch.randn(3, 1, 1, 4, 2), 0),
    "chunk": lambda: z.hidden_attention(*torch.randn(3, 1, 1, 4, 2), 2, 1, 0),
    "negative window": lambda: z.hidden_attention(*torch.randn(3, 1, 1, 4, 2), 2, -1),
    "uneven copies": lambda: z.HiddenDecoding(2)(*torch.randn(3, 1, 1, 5, 2)),
    "bias per query": lambda: z.factored_attention(*torch.randn(3, 4, 2), bias=torch.zeros(4, 4)),
    "limit": lambda: z.LightWhenLong(0),
    "merge": lambda: z.merge_neighbors(torch.randn(1, 6, 2), torch.ones(1, 6), 2),
    "share": lambda: z.LongClassifier(1, 8, 2, 1, 2, share=0.2),
    "patch mask": lambda: z.PatchMixer(nn.Identity(), nn.Identity(), 2)(torch.randn(1, 4, 2), causal_mask(4)),
    "vip mask": lambda: z.VIPMixer(z.vip_encoder(8, 2, 1, 1, 2), 2)(torch.randn(1, 4, 8), causal_mask(4)),
    "copy mask": lambda: z.RepeatMixer(8, 2, 2)(torch.randn(1, 4, 8), causal_mask(4)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    with pytest.raises(ValueError, match=r"\d"):
        BAD[name]()


@pytest.mark.parametrize("name", list(z.mechanisms))
def test_mechanisms_map_tokens_to_tokens(name):
    module, inputs = z.mechanisms[name]()
    assert module(*inputs).shape == inputs[0].shape
    if "VIP" not in name and "MAELRE" not in name:
        assert contracts.causal(module, torch.randn(1, 18, 64))
