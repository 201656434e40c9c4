"""Chapter 02: blocks, language models, sampling, the cache, translators and the three papers, on random shapes."""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, data, measure
from tfkit.zoo.attention import (
    CrossAttention,
    MultiHeadAttention,
    attention,
    causal_attention,
    causal_mask,
    padding_mask,
    watch,
)
from tfkit.zoo.attention_variants import GroupedQueryAttention
from tfkit.zoo.positions import Alibi, Rotary
from tfkit.zoo.transformer import (
    Block,
    CharacterFrontEnd,
    DecoderBlock,
    DropPath,
    EncoderDecoder,
    FeedForward,
    FourierMixing,
    GatedConvolution,
    Highway,
    InceptionTokens,
    InceptiveHead,
    LanguageModel,
    LearnedPositions,
    NoPositions,
    PostNorm,
    PreNorm,
    Recurrence,
    SinusoidalPositions,
    SoftPrefix,
    Stack,
    StaticExpansion,
    SummedEncoders,
    TokenEmbedding,
    beam_search,
    encoder_decoder,
    expand,
    generate,
    gpt2,
    greedy,
    in_float32,
    language_model,
    likeliest,
    multi_encoder,
    next_token_probabilities,
    packed,
    parallel_convolutions,
    prefixed,
    remember,
    sampler,
    segment_max,
    shrink_padding,
    sinusoidal_positions,
    transformer_encoder,
    translate,
)

SEEDS = range(3)


def numbers(seed: int):
    """A function that draws whole numbers: pick(low, high), both included."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    return lambda low, high: int(torch.randint(low, high + 1, (1,), generator=generator))


def shaken(module: nn.Module) -> nn.Module:
    """The module with every parameter at random, also biases and norms, which start at zero and one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


# --------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("seed", SEEDS)
def test_sinusoidal_positions_are_the_formula_from_any_start(seed):
    pick = numbers(seed)
    n, width, start = pick(1, 9), 2 * pick(1, 8), pick(0, 50)
    table = sinusoidal_positions(n, width, start)
    for i in range(n):
        for j in range(width // 2):
            angle = (start + i) / 10000 ** (2 * j / width)
            assert table[i, 2 * j] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[i, 2 * j + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    shifted = sinusoidal_positions(n, width, start + 7)
    torch.testing.assert_close(shifted @ shifted.T, table @ table.T, atol=1e-4, rtol=0)  # distance alone counts
    with pytest.raises(ValueError, match=str(width + 1)):
        sinusoidal_positions(n, width + 1)


@pytest.mark.parametrize("make", [SinusoidalPositions, lambda: LearnedPositions(20, 8), NoPositions])
def test_positions_go_on_counting_from_start(make):
    positions, x = make(), torch.randn(2, 12, 8)
    whole = positions(x)
    for cut in (1, 5, 11):
        torch.testing.assert_close(torch.cat([positions(x[:, :cut]), positions(x[:, cut:], start=cut)], 1), whole)


def test_learned_positions_end_where_the_table_ends():
    positions = LearnedPositions(6, 4)
    positions(torch.randn(1, 4, 4), start=2)
    with pytest.raises(ValueError, match="6.*7"):
        positions(torch.randn(1, 4, 4), start=3)


# ------------------------------------------------------------------------------------------------------------ blocks


def our_block(width, heads, hidden, wiring, activation=nn.GELU):
    norm = partial(nn.LayerNorm, width)
    return Block(MultiHeadAttention(width, heads), FeedForward(width, hidden, activation), norm, wiring)


PARTS = {"self_attn.in_proj_": "mix.part.to_qkv.", "self_attn.out_proj": "mix.part.to_out", "linear1": "feed.part.up"}
PARTS |= {"linear2": "feed.part.down", "norm1": "mix.norm", "norm2": "feed.norm"}
CROSS = {"multihead_attn.out_proj": "look.part.to_out", "norm2": "look.norm", "norm3": "feed.norm"}


def renamed(name: str, table: dict[str, str]) -> str:
    old = next(old for old in table if name.startswith(old))
    return table[old] + name.removeprefix(old)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wiring", [PreNorm, PostNorm])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_block_equals_torch_in_both_wirings(seed, wiring, activation):
    pick = numbers(seed)
    heads, hidden, n = pick(1, 4), pick(3, 20), pick(2, 7)
    width = heads * pick(2, 5)
    first, options = wiring is PreNorm, {"dropout": 0.0, "activation": activation, "batch_first": True}
    theirs = shaken(nn.TransformerEncoderLayer(width, heads, hidden, norm_first=first, **options))
    make = nn.GELU if activation == "gelu" else nn.ReLU
    ours = our_block(width, heads, hidden, wiring, make)
    contracts.copy_weights(theirs, ours, lambda name: renamed(name, PARTS))
    x, real = torch.randn(2, n, width), torch.ones(2, n, dtype=torch.bool)
    assert contracts.reduces_to(ours, theirs, x)
    real[1, -1] = False
    masked = lambda x: theirs(x, src_key_padding_mask=~real)[real]
    assert contracts.agree(lambda x: ours(x, mask=padding_mask(real))[real], masked, x)
    other = our_block(width, heads, hidden, PostNorm if first else PreNorm, make)
    other.load_state_dict(ours.state_dict())
    assert not contracts.agree(other, theirs, x), "the norm in the wrong place goes unnoticed"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wiring", [PreNorm, PostNorm])
def test_decoder_block_equals_torch_in_both_wirings(seed, wiring):
    pick = numbers(seed)
    heads, hidden, n, m = pick(1, 4), pick(3, 20), pick(2, 7), pick(2, 7)
    width = heads * pick(2, 5)
    first, options = wiring is PreNorm, {"dropout": 0.0, "activation": "gelu", "batch_first": True}
    theirs = shaken(nn.TransformerDecoderLayer(width, heads, hidden, norm_first=first, **options))
    mixer, cross = MultiHeadAttention(width, heads, attend=causal_attention), CrossAttention(width, heads)
    ours = DecoderBlock(mixer, cross, FeedForward(width, hidden), partial(nn.LayerNorm, width), wiring)
    state = {}
    for name, value in theirs.state_dict().items():
        if name.startswith("multihead_attn.in_proj_"):
            kind = name.removeprefix("multihead_attn.in_proj_")
            state[f"look.part.to_q.{kind}"], state[f"look.part.to_kv.{kind}"] = value.split([width, 2 * width])
        else:
            state[renamed(name, CROSS | PARTS)] = value
    for i, wired in enumerate(("mix", "look", "feed"), 1):  # torch numbers its norms in this order
        for kind in ("weight", "bias"):
            state[f"{wired}.norm.{kind}"] = theirs.state_dict()[f"norm{i}.{kind}"]
    ours.load_state_dict(state)
    x, memory, real = torch.randn(2, n, width), torch.randn(2, m, width), torch.ones(2, m, dtype=torch.bool)
    real[1, -1] = False
    blocked = {"tgt_mask": ~causal_mask(n), "memory_key_padding_mask": ~real}
    reference = lambda x, memory: theirs(x, memory, **blocked)
    assert contracts.reduces_to(lambda x, memory: ours(x, memory, mask=padding_mask(real)), reference, x, memory)


def test_feedforward_works_within_tokens_and_the_residual_is_there():
    x = torch.randn(2, 6, 8)
    assert contracts.local(FeedForward(8), x, window=0)
    assert measure.parameters(FeedForward(8, 20)) == 2 * 8 * 20 + 20 + 8
    block = our_block(8, 2, 16, PreNorm)
    for part in (block.mix.part.to_out, block.feed.part.down):
        nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    assert torch.equal(block(x), x), "with parts that return zero a pre-norm block is the identity"


# --------------------------------------------------------------------------------------------------- language models

CAUSAL = {
    "default": {},
    "post-norm": {"wiring": PostNorm},
    "learned positions": {"positions": LearnedPositions(16, 16)},
    "no positions": {"positions": NoPositions()},
    "other norm": {"norm": lambda: nn.RMSNorm(16)},
    "other feed-forward": {"feedforward": lambda: FeedForward(16, 8, nn.ReLU)},
    "narrow heads": {"mixer": lambda: MultiHeadAttention(16, 8, attend=causal_attention)},
    "wide heads": {"mixer": lambda: MultiHeadAttention(16, 2, head_width=16, attend=causal_attention)},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CAUSAL)
def test_language_models_are_causal_in_every_variant(name, seed):
    pick = numbers(seed)
    model, ids = language_model(20, 16, 2, **CAUSAL[name]), torch.randint(20, (2, pick(2, 9)))
    assert model(ids).shape == (*ids.shape, 20)
    assert contracts.causal(model, ids)
    assert contracts.gradients_reach(model, ids)


@pytest.mark.parametrize(
    "mixer",
    [
        lambda: MultiHeadAttention(16, 2),
        lambda: GatedConvolution(16),
        lambda: Recurrence(16),
        FourierMixing,
        lambda: StaticExpansion(16),
        lambda: MultiHeadAttention(
            16, 2, attend=lambda q, k, v, mask=None: attention(q, k, v, ~causal_mask(q.shape[-2]))
        ),
    ],
    ids=["attention", "convolution", "LSTM", "Fourier", "expansion", "upside down"],
)
def test_a_mixer_that_sees_the_future_is_found(mixer):
    with pytest.raises(ValueError, match="the stack sees later tokens"):
        language_model(20, 16, 1, mixer=mixer)
    assert not contracts.causal(language_model(20, 16, 1, mixer=mixer, check=None), torch.randint(20, (2, 7)))


def test_the_head_is_tied_to_the_embedding_unless_given():
    tied = language_model(11, 8, 1)
    assert not any(name.startswith("head") for name, _ in tied.named_parameters())
    ids = torch.randint(11, (2, 5))
    own = LanguageModel(tied.embed, tied.stack, nn.Linear(8, 11, bias=False))
    own.head.weight.data.copy_(tied.embed.table.weight)
    assert contracts.agree(own, tied, ids)


@pytest.fixture(scope="module")
def gpt2_pair():
    """A tiny random GPT-2 of `transformers`, and ours with its weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=24, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    theirs = shaken(transformers.GPT2LMHeadModel(config)).eval()
    ours = gpt2(vocabulary=50, length=24, width=32, depth=3, heads=4).eval()
    ours.load_state_dict(from_gpt2(theirs))
    return theirs, ours


def from_gpt2(theirs) -> dict[str, torch.Tensor]:
    """The weights of a GPT-2 of `transformers` under our names; its matrices are stored the other way round."""
    names = {"attn.c_attn": "mix.part.to_qkv", "attn.c_proj": "mix.part.to_out", "mlp.c_fc": "feed.part.up"}
    names |= {"mlp.c_proj": "feed.part.down", "ln_1": "mix.norm", "ln_2": "feed.norm"}
    state = {}
    for name, value in theirs.transformer.state_dict().items():
        if name.startswith("h."):
            _, layer, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            state[f"stack.blocks.{layer}.{names[part]}.{kind}"] = value.T if value.ndim == 2 else value
        elif name.startswith("ln_f"):
            state[name.replace("ln_f", "stack.norm")] = value
        else:
            state[{"wte.weight": "embed.table.weight", "wpe.weight": "embed.positions.table"}[name]] = value
    return state


@pytest.mark.parametrize("seed", SEEDS)
def test_gpt2_equals_transformers(gpt2_pair, seed):
    theirs, ours = gpt2_pair
    pick = numbers(seed)
    ids = torch.randint(50, (pick(1, 3), pick(1, 24)))
    assert contracts.agree(ours, lambda ids: theirs(ids).logits, ids, atol=1e-5)


def test_gpt2_with_another_gelu_or_wiring_is_found(gpt2_pair):
    theirs, ours = gpt2_pair
    ids = torch.randint(50, (2, 20))
    parts = {"mixer": lambda: MultiHeadAttention(32, 4, attend=causal_attention), "positions": LearnedPositions(24, 32)}
    exact = language_model(50, 32, 3, **parts).eval()
    exact.load_state_dict(ours.state_dict())
    assert not contracts.agree(exact, lambda ids: theirs(ids).logits, ids, atol=1e-5)


def test_gpt2_writes_what_transformers_writes(gpt2_pair):
    theirs, ours = gpt2_pair
    prompt = torch.randint(50, (3, 4))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, **options)
    assert torch.equal(generate(ours, prompt, 15), expected)


def test_penalty_end_padding_and_beams_are_those_of_transformers(gpt2_pair):
    theirs, ours = gpt2_pair
    prompt = torch.randint(50, (4, 5))
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 14}
    plain = generate(ours, prompt, 14)
    for end in (None, int(plain[0, 8]), int(plain[2, 11])):
        given = options | {"eos_token_id": end, "pad_token_id": 0 if end is None else end}
        for penalty in (1.0, 1.4, 0.8):
            expected = theirs.generate(prompt, repetition_penalty=penalty, **given)
            found = generate(ours, prompt, 14, end=end, penalty=penalty)
            assert torch.equal(found, expected), (end, penalty)
            for beams in (2, 3, 5):
                expected = theirs.generate(prompt, repetition_penalty=penalty, num_beams=beams, **given)
                found = beam_search(ours, prompt, 14, beams, end=end, penalty=penalty)
                assert torch.equal(found[:, : expected.shape[1]], expected), (end, penalty, beams)
                assert end is None or (found[:, expected.shape[1] :] == end).all()
    assert torch.equal(beam_search(ours, prompt, 14, 1), plain)
    real = torch.arange(5) >= torch.tensor([[0], [2], [4], [1]])
    options |= {"attention_mask": real.long(), "eos_token_id": None, "pad_token_id": 0}
    junk = torch.where(real, prompt, torch.randint(50, (4, 5)))
    for beams in (1, 3):
        expected = theirs.generate(prompt, num_beams=beams, **options)[:, 5:]
        for text in (prompt, junk):
            found = beam_search(ours, text, 14, beams, real=real)[:, 5:]
            assert torch.equal(found, expected)
    assert torch.equal(generate(ours, junk, 14, real=real)[:, 5:], generate(ours, prompt, 14, real=real)[:, 5:])
    assert torch.equal(generate(ours, prompt[2:3, 4:], 14)[0], generate(ours, prompt, 14, real=real)[2, 4:])


def test_beams_find_the_likeliest_text():
    """With as many beams as texts the search is exhaustive."""
    torch.manual_seed(0)
    model, prompt = shaken(language_model(4, 8, 1)).eval(), torch.randint(4, (3, 2))
    tails = torch.cartesian_prod(*[torch.arange(4)] * 3)
    with torch.no_grad():
        for row, found in zip(prompt, beam_search(model, prompt, 3, 64), strict=True):
            texts = torch.cat([row.expand(64, -1), tails], 1)
            logits = model(texts[:, :-1]).log_softmax(-1).gather(2, texts[:, 1:, None])[:, 1:]
            assert torch.equal(texts[logits.sum((1, 2)).argmax()], found)


@contextlib.contextmanager
def unchecked():
    """Shapes in signatures are checked in tests alone; this is what readers meet."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


BAD_TEXTS = {
    "a list": (lambda m: generate(m, [1, 2], 3), r"torch.tensor\(\[\[1, 2\]\]\); got \[1, 2\]"),
    "one row": (lambda m: generate(m, torch.tensor([1, 2]), 3), r"got \(2,\)"),
    "no token": (lambda m: beam_search(m, torch.zeros(2, 0, dtype=torch.long), 3, 2), r"got \(2, 0\)"),
    "no beams": (lambda m: beam_search(m, torch.zeros(2, 1, dtype=torch.long), 3, 0), "got 0"),
    "padded right": (
        lambda m: generate(m, torch.ones(2, 3).long(), 3, real=torch.tensor([[True, True, False]] * 2)),
        "padded on the left",
    ),
    "penalty": (lambda m: generate(m, torch.ones(2, 3).long(), 3, penalty=0.0), "got 0.0"),
    "targets": (lambda m: m(torch.ones(2, 3).long(), torch.ones(2, 3).long()), "targets go into a loss"),
    "ids of one row": (lambda m: m(torch.ones(3).long()), r"\(3,\)"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_habits_that_do_not_fit_get_a_sentence(name):
    run, message = BAD_TEXTS[name]
    with unchecked(), pytest.raises(ValueError, match=message):
        run(language_model(20, 16, 1))


BAD_MODELS = {
    "odd width": (lambda: language_model(96, 33), "33"),
    "heads": (lambda: language_model(96, 100), "100 does not divide into 3 heads.*heads="),
    "no head": (lambda: language_model(96, 32, heads=0), "32, 0"),
    "one norm": (lambda: language_model(96, 32, norm=nn.LayerNorm(32)), "norm= takes a function"),
    "one mixer": (lambda: language_model(96, 32, mixer=MultiHeadAttention(32, 2)), "mixer= takes a function"),
    "both": (lambda: language_model(96, 32, mixer=FourierMixing, heads=2), "heads= and attend= are for the usual"),
    "unknown": (lambda: language_model(96, 32, dropout=0.1), "no slot dropout"),
    "rate": (lambda: DropPath(1.0), "1.0"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_models_that_do_not_fit_get_a_sentence(name):
    make, message = BAD_MODELS[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_heads_attend_head_and_drop_are_slots():
    attend = Shifted()
    model = language_model(20, 16, 2, heads=4, attend=attend, head=nn.Linear(16, 20), drop=partial(nn.Dropout, 0.5))
    mixers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert [m.heads for m in mixers] == [4, 4] and mixers[0].attend is not mixers[1].attend
    ids = torch.randint(20, (2, 6))
    assert not torch.equal(model(ids), model(ids)), "in training something is dropped"
    plain = language_model(20, 16, 2, heads=4, attend=attend, head=nn.Linear(16, 20)).eval()
    names = {name.replace("part.part.", "part."): value for name, value in model.state_dict().items()}
    plain.load_state_dict(names)
    assert torch.equal(model.eval()(ids), plain(ids)), "in eval mode nothing is"


def test_stochastic_depth_drops_whole_rows_and_keeps_the_mean():
    x, layer = torch.randn(4000, 3), DropPath(0.3)
    y = layer(x)
    dropped = (y == 0).all(1)
    assert torch.allclose(y[~dropped], x[~dropped] / 0.7)
    assert abs(dropped.float().mean() - 0.3) < 0.04
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("positions", [SinusoidalPositions, partial(LearnedPositions, 12, 16), NoPositions])
def test_packed_and_padded_texts_are_alone(positions):
    model = shaken(language_model(20, 16, 2, positions=positions())).eval()
    ids = torch.randint(20, (2, 9))
    text = torch.tensor([[0] * 3 + [1] * 6, [4] * 5 + [2] * 4])
    mask, places = packed(text)
    assert places.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
    with torch.no_grad():
        found = model(ids, mask=mask, places=places)
        for row, (a, b) in ((0, (0, 3)), (0, (3, 9)), (1, (0, 5)), (1, (5, 9))):
            torch.testing.assert_close(found[row : row + 1, a:b], model(ids[row : row + 1, a:b]), atol=1e-5, rtol=0)
        assert contracts.padding_invariant(
            lambda x, real: model(x, real=real), ids, torch.arange(9) < torch.tensor([[6], [9]])
        )


def test_the_mean_of_cross_attention_maps_is_what_it_reads():
    cross = CrossAttention(16, 4)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = padding_mask(torch.rand(2, 7) > 0.3)
    v = cross.keys(context)[1]
    expected = cross.to_out((cross.maps(x, context, mask) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(cross(x, context, mask), expected)
    assert not torch.allclose(cross(x, context), expected)


def test_translation_makes_the_keys_of_its_source_once():
    model = encoder_decoder(20, 20, 16).eval()
    source, calls = torch.randint(20, (3, 6)), []
    for block in model.decoder.blocks:
        block.look.part.to_kv.register_forward_hook(lambda *_: calls.append(1))
    found = translate(model, source, 1, 2, 8)
    assert len(calls) == len(model.decoder.blocks)
    ids = found[:, :1]
    with torch.no_grad():
        for _ in range(1, found.shape[1]):
            ids = torch.cat([ids, model(source, ids)[:, -1:].argmax(-1)], 1)
            stop = (ids[:, :-1] == 2).any(1)
            ids[stop, -1] = 2
        assert torch.equal(ids, found)
        with remember(model):  # another source inside: its keys are made anew, and encoders remember nothing
            first = model.decode(found[:, :1], model.encode(source))
            assert torch.equal(model.encode(source), model.encode(source))
        with remember(model):
            model.decode(found[:, :1], model.encode(source.flip(1)))
            again = model.decode(found[:, :1], model.encode(source), start=1)
        assert not torch.allclose(first, again)


@pytest.mark.parametrize("depth", [2, 8])
def test_gpt2_starts_as_gpt2(depth):
    torch.manual_seed(0)
    model, ids = gpt2(400, 64, 128, depth, 4), torch.randint(400, (4, 65))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name
        else:
            wanted = 0.02 / math.sqrt(2 * depth) if name.endswith(("to_out.weight", "down.weight")) else 0.02
            assert abs(p.std() / wanted - 1) < 0.03 and abs(p.mean()) < 4 * wanted / math.sqrt(p.numel()), name
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
    assert abs(loss - math.log(400)) < 0.05


def test_gpt2_small_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert measure.parameters(gpt2()) == 124_439_808


# ------------------------------------------------------------------------------------------------------------- cache

CACHED = {name: CAUSAL[name] for name in ("default", "post-norm", "no positions", "wide heads")}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CACHED)
def test_cache_in_pieces_equals_the_full_pass(name, seed):
    pick = numbers(seed)
    model = language_model(20, 16, 2, **CACHED[name]).eval()
    ids = torch.randint(20, (pick(1, 4), pick(4, 14)))
    whole = model(ids)
    cuts = sorted({0, ids.shape[1], *(pick(1, ids.shape[1]) for _ in range(3))})
    for edges in (cuts, range(ids.shape[1] + 1)):  # in uneven pieces, and token by token
        with remember(model):
            pieces = [model(ids[:, a:b], start=a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)
    assert torch.equal(model(ids), whole), "the cache outlives its context"


def test_a_cache_with_wrong_positions_or_without_memory_is_found():
    model, ids = language_model(20, 16, 2).eval(), torch.randint(20, (2, 8))
    whole = model(ids)
    with remember(model):
        wrong = torch.cat([model(ids[:, t : t + 1]) for t in range(8)], 1)
    assert not torch.allclose(wrong, whole, atol=1e-3)
    forgetful = torch.cat([model(ids[:, t : t + 1], start=t) for t in range(8)], 1)
    assert not torch.allclose(forgetful, whole, atol=1e-3)


def test_the_cache_is_taken_off_after_an_error():
    model = language_model(20, 16, 1)
    attends = [m.attend for m in model.modules() if isinstance(m, MultiHeadAttention)]
    with pytest.raises(KeyError), remember(model):
        model(torch.randint(20, (1, 3)))
        raise KeyError
    assert [m.attend for m in model.modules() if isinstance(m, MultiHeadAttention)] == attends


class Shifted(nn.Module):
    """An attend that is a module, as a positional scheme will be."""

    looks_back = float("inf")

    def forward(self, q, k, v, mask=None):
        return causal_attention(q, k, v, mask, scale=0.3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("attend", [causal_attention, Shifted()], ids=["function", "module"])
def test_generate_equals_writing_without_a_cache(seed, attend):
    pick = numbers(seed)
    model = shaken(language_model(20, 16, 2, mixer=lambda: MultiHeadAttention(16, 2, attend=attend)))
    prompt, steps = torch.randint(20, (pick(1, 3), pick(1, 5))), pick(1, 12)
    slow = prompt
    with torch.no_grad():
        for _ in range(steps):
            slow = torch.cat([slow, model(slow)[:, -1].argmax(-1)[:, None]], 1)
    model.train()
    assert torch.equal(generate(model, prompt, steps), slow)
    assert model.training, "generate leaves the model in another mode"
    for i in range(len(prompt)):  # rows of a batch do not see each other
        assert torch.equal(generate(model, prompt[i : i + 1], steps)[0], slow[i])
    assert torch.equal(generate(model, prompt, 0), prompt)
    with pytest.raises(ValueError, match="prompt"):
        generate(model, prompt[:, :0], 1)


def test_generate_switches_dropout_off():
    feedforward = lambda: nn.Sequential(nn.Dropout(0.5), FeedForward(16))
    model = shaken(language_model(20, 16, 1, feedforward=feedforward)).train()
    prompt = torch.randint(20, (2, 3))
    assert torch.equal(generate(model, prompt, 10), generate(model, prompt, 10))


# ---------------------------------------------------------------------------------------------------------- sampling


def cut_by_hand(logits, temperature=1.0, top_k=None, top_p=None) -> list[float]:
    """The probabilities of one row of distinct logits, by a loop over the tokens from the likeliest down."""
    p = [math.exp(x / temperature) for x in logits.tolist()]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept, reached = [], 0.0
    for i in order[:top_k]:
        if top_p is not None and reached >= top_p:
            break
        kept.append(i)
        reached += p[i]
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
def test_probabilities_are_cut_as_by_hand(seed, temperature, top_k, top_p):
    pick = numbers(seed)
    logits = 2 * torch.randn(2, 3, pick(2, 12), dtype=torch.float64)
    found = next_token_probabilities(logits, temperature, top_k, top_p)
    for row, expected in zip(found.flatten(0, 1), logits.flatten(0, 1), strict=True):
        assert row.tolist() == pytest.approx(cut_by_hand(expected, temperature, top_k, top_p), abs=1e-9)
    assert torch.equal(found.argmax(-1), logits.argmax(-1))


def test_sampling_with_ties_keeps_exactly_k():
    assert (next_token_probabilities(torch.zeros(1, 5), top_k=2) > 0).sum() == 2


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        next_token_probabilities(torch.randn(1, 4), **bad)


def test_a_sampler_draws_with_the_right_frequencies_and_repeats_with_its_seed():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]).expand(4000, -1)
    settings = {"temperature": 1.5, "top_k": 4, "top_p": 0.95}
    drawn = sampler(**settings, seed=3)(logits)
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = next_token_probabilities(logits[0], **settings)
    assert (share - expected).abs().max() < 0.03
    assert (share[expected == 0] == 0).all()
    assert torch.equal(drawn, sampler(**settings, seed=3)(logits))
    assert not torch.equal(drawn, sampler(**settings, seed=4)(logits))
    draw = sampler(seed=3)
    assert not torch.equal(draw(logits), draw(logits)), "a sampler goes on from draw to draw"
    assert torch.equal(sampler(top_k=1)(logits), greedy(logits))


@pytest.mark.parametrize("top_k", [None, 1500, 40])
@pytest.mark.parametrize("spread", [0.01, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_of_a_large_vocabulary_the_same_tokens_are_kept_as_by_a_full_sort(top_k, spread, top_p):
    """A flat row needs more than the first thousand, a peaked one does not; both stand in one batch."""
    logits = torch.stack([spread * torch.randn(3000), 3 * torch.randn(3000)]).double()
    found = next_token_probabilities(logits, 0.8, top_k, top_p)
    for row, given in zip(found, logits, strict=True):
        order = given.argsort(descending=True)[: top_k or 3000]
        p = (given / 0.8).softmax(-1)
        kept = order[(p[order].cumsum(-1) - p[order]) < top_p]
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(row, expected)
    p, ids = likeliest(logits, 0.8, top_k, top_p)
    assert (p.diff() <= 0).all() and p.shape == ids.shape and p.shape[-1] <= (top_k or 3000)
    assert torch.equal(logits.gather(1, ids), logits.sort(descending=True).values[:, : p.shape[1]])


# ---------------------------------------------------------------------------------------------------------- prefixes


def of_prompt(model, length: int, prompt) -> nn.Module:
    """The model with prefixes that hold the keys and values of a prompt."""
    with torch.no_grad(), watch(model) as seen:
        model(prompt)
    soft = prefixed(model, length)
    for name, layer in seen.items():
        attend = soft.get_submodule(name).attend
        attend.k.data, attend.v.data = layer.k[0], layer.v[0]
    return soft


ATTENDS = {
    "plain": (causal_attention, {}),
    "rotary": (Rotary(8, causal_attention), {"positions": NoPositions()}),
    "relative bias": (Alibi(2, causal_attention), {"positions": NoPositions()}),
}


@pytest.mark.parametrize("name", ATTENDS)
def test_a_prefix_made_of_a_prompt_is_the_prompt(name):
    attend, more = ATTENDS[name]
    model = shaken(language_model(20, 16, 2, heads=2, attend=attend, **more)).double().eval()
    prompt, ids = torch.randint(20, (1, 5)), torch.randint(20, (3, 7))
    soft = of_prompt(model, 5, prompt)
    expected = model(torch.cat([prompt.expand(3, -1), ids], 1))[:, 5:]
    torch.testing.assert_close(soft(ids, 5), expected)
    with remember(soft) as past:
        pieces = [soft(ids[:, :2], 5), soft(ids[:, 2:3], 7), soft(ids[:, 3:], 8)]
        past.select(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(torch.cat(pieces, 1), expected)


def test_a_prefix_passes_masks_and_biases_on():
    soft = SoftPrefix(2, 4, 3, attention).double()
    q, k, v = torch.randn(3, 2, 2, 5, 4).double().unbind(0)
    whole = lambda own, x: torch.cat([own.expand(2, -1, -1, -1), x], 2)
    mask, bias = torch.rand(2, 1, 5, 5) > 0.4, torch.randn(2, 5, 5).double()
    seen = torch.cat([torch.ones(2, 1, 5, 3, dtype=torch.bool), mask], -1)
    expected = attention(q, whole(soft.k, k), whole(soft.v, v), seen, torch.cat([torch.zeros(2, 5, 3), bias], -1))
    torch.testing.assert_close(soft(q, k, v, mask=mask, bias=bias), expected)
    torch.testing.assert_close(soft(q, k, v, mask=mask[:, :, 0][:, :, None], bias=None), attention(
        q, whole(soft.k, k), whole(soft.v, v), seen[:, :, :1]))  # fmt: skip


def test_prefixes_alone_are_trained_and_the_model_stays_as_it_was():
    model, ids = language_model(20, 16, 2, heads=2), torch.randint(20, (2, 6))
    before, soft = model(ids), prefixed(model, 4)
    assert measure.parameters(soft) == 2 * 2 * 4 * 16 and measure.parameters(model) > 5000
    soft(ids).sum().backward()
    learned = {name for name, p in soft.named_parameters() if p.grad is not None}
    assert learned == {f"stack.blocks.{i}.mix.part.attend.{part}" for i in (0, 1) for part in "kv"}
    assert torch.equal(model(ids), before) and not torch.allclose(soft(ids), before)
    grouped = prefixed(GroupedQueryAttention(16, 4, 2, attend=causal_attention), 3)
    assert grouped(torch.randn(2, 5, 16)).shape == (2, 5, 16) and grouped.attend.k.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="got 0"):
        prefixed(model, 0)
    with pytest.raises(ValueError, match="Linear has no attention layer"):
        prefixed(nn.Linear(2, 2), 3)


# ------------------------------------------------------------------------------------------------------- translators


def small_translator(**parts) -> EncoderDecoder:
    return encoder_decoder(12, 15, 16, depth=2, heads=2, **parts)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_decoder_is_causal_and_padding_in_the_source_is_not_seen(seed):
    pick = numbers(seed)
    model = small_translator().eval()
    source, target = torch.randint(1, 12, (2, pick(3, 8))), torch.randint(15, (2, pick(2, 7)))
    assert contracts.causal(lambda target: model(source, target), target)
    real = torch.ones_like(source, dtype=torch.bool)
    real[1, pick(1, source.shape[1] - 1) :] = False
    before = model(source, target, real)
    filled = torch.where(real, source, torch.randint(1, 12, source.shape))
    longer, more = F.pad(filled, (0, 3), value=5), F.pad(real, (0, 3))
    torch.testing.assert_close(model(filled, target, real), before)
    torch.testing.assert_close(model(longer, target, more), before)
    assert not torch.allclose(model(longer, target), before, atol=1e-4), "padding without a mask goes unnoticed"


@pytest.mark.parametrize("seed", SEEDS)
def test_translate_equals_decoding_without_a_cache(seed):
    pick = numbers(seed)
    model = shaken(small_translator())
    source = torch.randint(1, 12, (3, pick(3, 8)))
    real = torch.ones_like(source, dtype=torch.bool)
    real[1, 2:] = False
    ids = torch.full((3, 1), 1)
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat([ids, model(source, ids, real)[:, -1].argmax(-1)[:, None]], 1)
    end = int(ids[0, 4])  # so that at least one row ends early
    for row in ids:
        if (stop := (row[1:] == end).nonzero()).numel():
            row[1 + int(stop[0]) :] = end
    found = translate(model, source, start=1, end=end, steps=9, real=real)
    assert torch.equal(found, ids[:, : found.shape[1]])
    assert found.shape[1] == 10 or (found[:, -1] == end).all()
    assert model.training


class Counting(EncoderDecoder):
    """Writes the next number, whatever the source: a row that begins with 1 reads 1 2 3 ..., modulo 10."""

    def __init__(self):
        super().__init__(*[nn.Identity() for _ in range(5)])

    def encode(self, source, real=None):
        return torch.zeros(*source.shape, 1)

    def decode(self, target, memory, real=None, start=0):
        step = 1 + torch.arange(len(target))[:, None]  # the second row counts in twos
        return F.one_hot((target + step) % 10, 10).float()


def test_translate_repeats_the_end_and_stops_when_all_rows_have_ended():
    model, source = Counting(), torch.zeros(2, 3, dtype=torch.long)
    assert translate(model, source, start=1, end=5, steps=9).tolist() == [[1, 2, 3, 4, 5], [1, 3, 5, 5, 5]]
    assert translate(model, source, start=1, end=5, steps=2).tolist() == [[1, 2, 3], [1, 3, 5]]
    assert translate(model, source, start=1, end=8, steps=9)[1].tolist() == [1, 3, 5, 7, 9, 1, 3, 5, 7, 9]


def test_translators_need_every_part():
    model = small_translator()
    assert contracts.gradients_reach(model, torch.randint(12, (2, 5)), torch.randint(15, (2, 6)))
    deep = transformer_encoder(16, 2, 4, PostNorm)
    assert contracts.permutation_equivariant(deep, torch.randn(2, 5, 16))


# ---------------------------------------------------------------------------------------------------------- char_nmt


@pytest.mark.parametrize("seed", SEEDS)
def test_char_nmt_length_is_rounded_up_and_the_mask_shrinks_with_it(seed):
    pick = numbers(seed)
    n, stride, c = pick(1, 20), pick(1, 7), pick(1, 4)
    m = -(-n // stride)
    x, real = torch.randn(2, n, c), torch.rand(2, n) > 0.5
    pooled, shrunk = segment_max(x, stride), shrink_padding(real, stride)
    assert pooled.shape == (2, m, c) and shrunk.shape == (2, m)
    for i in range(m):
        segment = slice(i * stride, (i + 1) * stride)
        assert torch.equal(pooled[:, i], x[:, segment].amax(1))
        assert torch.equal(shrunk[:, i], real[:, segment].any(1))
    front = CharacterFrontEnd(9, 8, {1: 3, 2: 2, 5: 3}, stride)
    assert front(torch.randint(9, (2, n))).shape == (2, m, 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_char_nmt_convolutions_of_several_widths_see_their_window(seed):
    pick = numbers(seed)
    kernels = [pick(1, 6) for _ in range(pick(1, 3))]
    convolutions = nn.ModuleList(nn.Conv1d(5, pick(1, 4), k) for k in kernels).double()
    x, real = torch.randn(2, pick(1, 9), 5, dtype=torch.float64), None
    if seed:
        real = torch.rand(x.shape[:2]) > 0.3
    found = parallel_convolutions(x, convolutions, real)
    seen = x if real is None else x.masked_fill(~real[..., None], 0.0)
    expected = []
    for k, conv in zip(kernels, convolutions, strict=True):
        out = conv.bias.expand(*x.shape[:2], -1).clone()
        for i in range(x.shape[1]):
            for step in range(k):
                if 0 <= (j := i + step - (k - 1) // 2) < x.shape[1]:
                    out[:, i] += seen[:, j] @ conv.weight[:, :, step].T
        expected.append(out)
    torch.testing.assert_close(found, torch.cat(expected, -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_char_nmt_reduces_to_the_plain_character_transformer(seed):
    pick = numbers(seed)
    source, target = torch.randint(1, 12, (2, pick(2, 9))), torch.randint(12, (2, pick(1, 6)))
    for kernel, expected in ((1, True), (3, False)):
        front = shaken(CharacterFrontEnd(12, 16, {kernel: 16}, stride=1, highways=0))
        special = encoder_decoder(12, 12, 16, depth=1, heads=2, embed_source=front)
        table = TokenEmbedding(12, 16, SinusoidalPositions())
        conv = front.convolutions[0]
        table.table.weight.data = F.linear(front.table.weight, conv.weight[..., kernel // 2], conv.bias).relu().detach()
        parts = (special.encoder, special.embed_target, special.decoder, special.head)
        assert bool(contracts.agree(special, EncoderDecoder(table, *parts), source, target)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_char_nmt_padding_changes_nothing_and_a_front_end_that_ignores_it_is_found(seed):
    pick = numbers(seed)
    stride = pick(2, 4)
    model = small_translator(embed_source=shaken(CharacterFrontEnd(12, 16, {1: 6, 3: 4, 4: 6}, stride))).eval()
    source, target = torch.randint(1, 12, (2, pick(5, 10))), torch.randint(15, (2, 4))
    source[1, pick(2, source.shape[1] - 1) :] = 0
    longer = F.pad(source, (0, 2 * stride + 1))
    with_mask = lambda source: model(source, target, shrink_padding(source != 0, stride))
    torch.testing.assert_close(with_mask(longer), with_mask(source))
    model.embed_source.padding = -1  # padding counts as a character
    assert not torch.allclose(with_mask(longer), with_mask(source), atol=1e-4)


def test_char_nmt_attention_costs_s_squared_less():
    layer = MultiHeadAttention(16, 2)
    work = {}
    for stride in (1, 2, 5):
        front = CharacterFrontEnd(12, 16, {3: 16}, stride)
        work[stride] = measure.flops(layer.attend, *layer.project(front(torch.randint(12, (1, 60)))))
    assert work[1] == 4 * work[2] == 25 * work[5]


def test_char_nmt_translates_with_the_cache():
    model = shaken(small_translator(embed_source=CharacterFrontEnd(12, 16, {3: 16}, 3)))
    source = torch.randint(1, 12, (2, 8))
    found = translate(model, source, 1, 14, steps=6, real=shrink_padding(source != 0, 3))
    assert found.shape[0] == 2 and found.shape[1] <= 7


def test_char_nmt_highway_gate_open_and_closed():
    layer, x = Highway(6), torch.randn(2, 3, 6)
    nn.init.zeros_(layer.gate.weight)
    nn.init.constant_(layer.gate.bias, -40.0)
    torch.testing.assert_close(layer(x), x)
    nn.init.constant_(layer.gate.bias, 40.0)
    torch.testing.assert_close(layer(x), layer.change(x).relu())


@pytest.mark.parametrize("filters, stride", [({1: 8, 3: 4}, 2), ({3: 16}, 0), ({0: 16}, 1), ({}, 2)])
def test_char_nmt_refuses_filters_that_do_not_fit(filters, stride):
    with pytest.raises(ValueError, match=f"16.*stride {stride}"):
        CharacterFrontEnd(12, 16, filters, stride)


# -------------------------------------------------------------------------------------------- heterogeneous_encoders

MIXERS = {
    "attention": lambda: MultiHeadAttention(12, 2),
    "convolution": lambda: GatedConvolution(12),
    "LSTM": lambda: Recurrence(12),
    "Fourier": FourierMixing,
    "expansion": lambda: StaticExpansion(12, slots=5),
}


def some_texts(seed: int):
    pick = numbers(seed)
    x, real = torch.randn(2, pick(3, 9), 12), None
    if seed:
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        real[1, pick(1, x.shape[1] - 1) :] = False
    return x, real, None if real is None else padding_mask(real)


@pytest.mark.parametrize("seed", SEEDS)
def test_heterogeneous_encoders_one_of_attention_is_the_transformer(seed):
    x, _, mask = some_texts(seed)
    plain = shaken(transformer_encoder(12, 2, 2))
    single = multi_encoder(12, 2, [MIXERS["attention"]])
    single.encoders[0].load_state_dict(plain.state_dict())
    assert contracts.reduces_to(lambda x: single(x, mask), lambda x: plain(x, mask=mask), x)


class Averaged(SummedEncoders):
    def forward(self, x, mask=None):
        return super().forward(x, mask) / len(self.encoders)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("silent", range(len(MIXERS)))
def test_heterogeneous_encoders_without_one_is_the_exact_sum_of_the_others(seed, silent):
    x, _, mask = some_texts(seed)
    five = multi_encoder(12, 1, [*MIXERS.values()])
    whole = five(x, mask)
    torch.testing.assert_close(whole, torch.stack([e(x, mask=mask) for e in five.encoders]).sum(0))
    nn.init.zeros_(five.encoders[silent].norm.weight)
    others = [e for i, e in enumerate(five.encoders) if i != silent]
    assert torch.equal(five(x, mask), SummedEncoders(others)(x, mask))
    assert not torch.allclose(five(x, mask), whole, atol=1e-3)
    mean = Averaged([*five.encoders])
    assert not torch.allclose(mean(x, mask), Averaged(others)(x, mask), atol=1e-3), "a mean goes unnoticed"


@pytest.mark.parametrize("seed", SEEDS)
def test_heterogeneous_encoders_fourier_is_the_sum_of_waves(seed):
    pick = numbers(seed)
    n, d = pick(1, 9), pick(1, 9)
    x = torch.randn(2, n, d, dtype=torch.float64)
    i, j = torch.arange(n).double(), torch.arange(d).double()
    angle = 2 * math.pi * (torch.outer(i, i)[:, None, :, None] / n + torch.outer(j, j)[None, :, None, :] / d)
    expected = torch.einsum("pqnd,bnd->bpq", angle.cos(), x)
    assert contracts.reduces_to(FourierMixing(), lambda x: torch.einsum("pqnd,bnd->bpq", angle.cos(), x), x, atol=1e-9)
    if n > 1 and d > 1:
        along_one = torch.fft.fft(x, dim=-1).real  # the transform over features alone
        assert not torch.allclose(along_one, expected, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_heterogeneous_encoders_gated_convolution_is_value_times_gate(seed):
    pick = numbers(seed)
    width, kernel = pick(1, 8), 2 * pick(0, 2) + 1
    layer, x = GatedConvolution(width, kernel), torch.randn(2, pick(kernel, 12), width)
    conv = layer.convolutions[0]
    both = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=kernel // 2).transpose(1, 2)
    expected = both[..., :width] * both[..., width:].sigmoid()
    torch.testing.assert_close(layer(x), expected)
    assert contracts.local(layer, x, window=kernel // 2, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_heterogeneous_encoders_lstm_reads_each_text_to_its_own_end(seed):
    x, real, mask = some_texts(seed + 1)
    layer = Recurrence(12)
    found = layer(x, mask)
    for text, keep, row in zip(x, real, found, strict=True):
        torch.testing.assert_close(row[keep], layer.read(text[keep][None])[0][0])
    assert not torch.allclose(layer.read(x)[0][1][real[1]], found[1][real[1]], atol=1e-4), "padding read backward"


@pytest.mark.parametrize("seed", SEEDS)
def test_heterogeneous_encoders_static_expansion_is_its_definition(seed):
    pick = numbers(seed)
    b, s, n, d = 2, pick(1, 5), pick(2, 7), pick(1, 6)
    z, values = torch.randn(b, s, n, dtype=torch.float64), torch.randn(b, n, d, dtype=torch.float64)
    slots, real = torch.randn(s, d, dtype=torch.float64), torch.rand(b, n) > 0.3
    expected = torch.zeros(b, n, d, dtype=torch.float64)
    for row in range(b):
        w = [[max(float(z[row, e, i]), 0.0) * float(real[row, i]) for i in range(n)] for e in range(s)]
        content = [slots[e] + sum(w[e][i] / (sum(w[e]) + 1e-9) * values[row, i] for i in range(n)) for e in range(s)]
        for i in range(n):
            column = sum(w[e][i] for e in range(s)) + 1e-9
            expected[row, i] = sum(w[e][i] / column * content[e] for e in range(s))
    torch.testing.assert_close(expand(z, values, slots, real), expected)


def test_heterogeneous_encoders_static_expansion_sees_positive_and_negative_scores():
    layer, x = StaticExpansion(12, slots=4), torch.randn(2, 6, 12)
    assert contracts.permutation_equivariant(layer, x)
    z = layer.queries @ layer.key(x).transpose(1, 2) / 12**0.5
    real = torch.ones(2, 6, dtype=torch.bool)
    above, below = (
        expand(s * z, part(x), layer.slots, real) for s, part in ((1, layer.positive), (-1, layer.negative))
    )
    gate = layer.gate(x).sigmoid()
    torch.testing.assert_close(layer(x), gate * above + (1 - gate) * below)


@pytest.mark.parametrize("name", MIXERS)
def test_heterogeneous_encoders_all_but_fourier_ignore_padding(name):
    x, real, _ = some_texts(1)
    mixer = MIXERS[name]()
    found = contracts.padding_invariant(lambda x, real: mixer(x, mask=padding_mask(real)), x, real)
    assert bool(found) == (name != "Fourier")


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "attention"])
def test_heterogeneous_encoders_refuse_masks_that_are_not_padding(name):
    with pytest.raises(ValueError, match=r"2, 1, 1, 5.*\(5, 5\)"):
        MIXERS[name]()(torch.randn(2, 5, 12), mask=causal_mask(5))


def test_heterogeneous_encoders_bad_arguments():
    with pytest.raises(ValueError, match="at least one"):
        SummedEncoders([])
    with pytest.raises(ValueError, match="7"):
        Recurrence(7)


def test_heterogeneous_encoders_in_a_translator():
    model = encoder_decoder(12, 15, 12, depth=1, heads=2, encoder=multi_encoder(12, 1, [*MIXERS.values()]))
    source, target = torch.randint(1, 12, (2, 6)), torch.randint(15, (2, 5))
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert contracts.gradients_reach(model, source, target, real)
    assert contracts.causal(lambda target: model(source, target, real), target)
    assert translate(model, source, 1, 2, 4, real).shape[0] == 2


# --------------------------------------------------------------------------------------------------------- inceptive


@pytest.mark.parametrize("seed", SEEDS)
def test_inceptive_with_zero_kernels_is_attention_pooling(seed):
    pick = numbers(seed)
    heads, classes, n = pick(1, 4), pick(2, 5), pick(2, 9)
    width = heads * pick(3, 5)
    tokens = InceptionTokens(width, [pick(1, 5) for _ in range(pick(1, 3))])
    head, x = shaken(InceptiveHead(width, tokens, MultiHeadAttention(width, heads), classes)), torch.randn(2, n, width)
    real = torch.rand(2, n) > 0.3
    real[:, 0] = True

    def pooled(x):
        layer, x = head.weigh, head.norm(x)
        maps = layer.maps(x, mask=padding_mask(real))  # (b, h, n, n)
        looking = real[:, None, :, None].float()
        weights = (maps * looking).sum(2) / looking.sum(2)  # (b, h, n)
        values = torch.einsum("bhn,bhne->bhe", weights, layer.project(x)[2]).flatten(1)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads))
        return head.classify(layer.to_out(values))

    assert not contracts.agree(lambda x: head(x, real), pooled, x, atol=1e-5)
    for parameter in tokens.convolutions.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(tokens(x), x)
    assert contracts.agree(lambda x: head(x, real), pooled, x, atol=1e-5)


@pytest.mark.parametrize("kernels", [(1,), (2,), (3,), (1, 3, 5), (2, 5), (4, 4)])
def test_inceptive_kernels_reach_as_far_as_the_widest(kernels):
    tokens, x = InceptionTokens(12, kernels), torch.randn(2, 9, 12)
    i, j = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    widest = max(kernels)
    near = (j - i >= -((widest - 1) // 2)) & (j - i <= widest // 2)
    assert contracts.structured(tokens, x, near, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_inceptive_padding_changes_nothing(seed):
    pick = numbers(seed)
    head = shaken(InceptiveHead(12, InceptionTokens(12, (1, 2, 5)), MultiHeadAttention(12, 2), classes=3))
    n = pick(2, 7)
    x, real = torch.randn(2, n + 4, 12), torch.ones(2, n + 4, dtype=torch.bool)
    real[:, n:] = False
    torch.testing.assert_close(head(x, real), head(x[:, :n]))
    assert not torch.allclose(head(x), head(x[:, :n]), atol=1e-4)


@pytest.mark.parametrize("augment", [nn.Identity, lambda: InceptionTokens(12, (2, 3, 5))])
@pytest.mark.parametrize("weigh", [nn.Identity, lambda: MultiHeadAttention(12, 2)])
def test_inceptive_slots_can_be_emptied(augment, weigh):
    head, x = InceptiveHead(12, augment(), weigh(), classes=3), torch.randn(2, 5, 12)
    assert head(x).shape == (2, 3)
    assert contracts.gradients_reach(head, x)
    expected = head.classify(head.weigh(head.norm(head.augment(x))).mean(1))
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("kernels", [(), (0,), (1, -2), (1,) * 5])
def test_inceptive_refuses_bad_kernels(kernels):
    with pytest.raises(ValueError, match="1 to 4"):
        InceptionTokens(4, kernels)


# ----------------------------------------------------------------------------------------------------------- learning


def test_a_translator_learns_the_made_up_language():
    """The whole machine on eight sentences: the loss of the right answers falls to almost nothing."""
    import tfkit

    tfkit.set_seed(0)
    pairs = data.translation(8, seed=0)
    model = encoder_decoder(len(data.TRANSLATION_SOURCE), len(data.TRANSLATION_TARGET), 32, depth=1, heads=2)

    def loss(model, source, target):
        logits = model(source, target[:, :-1], source != 0)
        return tfkit.train.next_token_loss(logits, target[:, 1:].masked_fill(target[:, 1:] == 0, data.IGNORE))

    tfkit.fit(model, iter(lambda: tuple(pairs), None), 80, lr=1e-2, loss=loss)
    found = translate(model, pairs.source, 1, 2, steps=10, real=pairs.source != 0)
    found = F.pad(found, (0, pairs.target.shape[1] - found.shape[1]), value=2)
    assert ((found == pairs.target) | (pairs.target == 0)).all()


def test_stack_passes_masks_to_every_block_and_ends_with_its_norm():
    x, real = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    blocks = [our_block(8, 2, 16, PreNorm) for _ in range(2)]
    stack, norm, mask = Stack(blocks), nn.LayerNorm(8), padding_mask(real)
    by_hand = blocks[1](blocks[0](x, mask=mask), mask=mask)
    torch.testing.assert_close(stack(x, mask=mask), by_hand)
    torch.testing.assert_close(Stack(blocks, norm)(x, mask=mask), norm(by_hand))


# --- 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_float32_computes_wide_and_answers_in_the_type_that_came(dtype):
    seen = []

    @in_float32
    def compute(x, scale=None):
        seen.append((x.dtype, scale.dtype, torch.is_autocast_enabled("cpu")))
        return x @ x.T * scale, torch.complex(x, x), "a word", torch.arange(2)

    x = torch.randn(3, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        product, wave, word, whole = compute(x, scale=torch.tensor(2.0, dtype=dtype))
    assert seen == [(torch.float32, torch.float32, False)]
    assert product.dtype == dtype and wave.dtype == torch.complex64 and word == "a word" and whole.dtype == torch.int64
    torch.testing.assert_close(product, (x.float() @ x.float().T * 2).to(dtype))
    for wide in (torch.float32, torch.float64):
        assert in_float32(lambda x: x + 1)(torch.zeros(2, dtype=wide)).dtype == wide


def test_in_float32_works_on_shapes_alone():
    x = torch.ones(2, 6, 4, dtype=torch.bfloat16, device="meta")
    mixed = FourierMixing()(x)
    assert mixed.is_meta and mixed.dtype == torch.bfloat16 and mixed.shape == x.shape


def test_fourier_mixing_in_16_bits_is_that_of_float32_rounded():
    x = torch.randn(2, 6, 4)
    exact = FourierMixing()(x.bfloat16().float())
    torch.testing.assert_close(FourierMixing()(x.bfloat16()), exact.bfloat16())
