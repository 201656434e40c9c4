"""Normalization: every norm against its formula and its gradient, every conversion against the model it came from."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, set_seed
from tfkit.zoo.attention import MultiHeadAttention, causal_attention
from tfkit.zoo.normalization import (
    BatchMemory,
    BranchNorm,
    CRMSNorm,
    DynamicTanh,
    ImageClassifier,
    MaskedLanguageModel,
    PatchEmbedding,
    ProgressiveNorm,
    RepBatchNorm,
    SandwichNorm,
    ScaleNorm,
    SimplifiedLinearAttention,
    SubNormAttention,
    SubNormFeedForward,
    TokenBatchNorm,
    TokenGroupNorm,
    UnifiedNorm,
    bert,
    bert_base,
    bert_large,
    centered,
    digit_classifier,
    dual_patch_embedding,
    ends,
    fix_norm_,
    fold,
    fold_norms,
    geometric_mean,
    hide_tokens,
    is_outlier,
    magneto_init_,
    magneto_model,
    mechanisms,
    never,
    rms,
    rms_gradient,
    simplified_linear_attention,
    small_init_,
    standardize,
    standardize_gradient,
    sub_norm_gain,
    sub_norm_gains,
    t5,
    t5_base,
    t5_large,
    t5_small,
    to_crms_norm,
    to_rms_norm,
)
from tfkit.zoo.transformer import (
    Block,
    CrossAttention,
    FeedForward,
    LearnedPositions,
    NoPositions,
    PostNorm,
    PreNorm,
    SinusoidalPositions,
    Stack,
    TokenEmbedding,
    generate,
    gpt2,
    language_model,
)

SEEDS = [0, 1, 2]


def double(*shape, scale=1.0, shift=0.0):
    return scale * torch.randn(*shape, dtype=torch.float64) + shift


def shake_(module: nn.Module) -> nn.Module:
    """Every parameter and running statistic somewhere else than at its start."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point():
                continue
            positive = "var" in name or name.endswith("square")
            value.copy_(torch.rand_like(value) + 0.5 if positive else value + 0.3 * torch.randn_like(value))
    return module


# ------------------------------------------------------------------------------------------- the norms and gradients


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 12), (1, 1, 4), (2, 3, 2, 6)])
def test_norms_are_those_of_torch(shape):
    x, d = double(*shape, scale=3, shift=2), shape[-1]
    assert torch.allclose(standardize(x), F.layer_norm(x, (d,)))
    assert torch.allclose(rms(x), F.rms_norm(x, (d,), eps=1e-5))
    for groups in (1, 2, d):
        norm = shake_(TokenGroupNorm(groups, d).double())
        cut = standardize(x.unflatten(-1, (groups, -1))).flatten(-2)
        assert torch.allclose(norm(x), cut * norm.weight + norm.bias)


@pytest.mark.parametrize("shape", [(2, 3, 8), (6, 4)])
def test_batch_norm_in_both_modes(shape):
    norm, x = shake_(TokenBatchNorm(shape[-1]).double()), double(*shape, scale=3, shift=2)
    everywhere = tuple(range(len(shape) - 1))
    assert torch.allclose(norm(x), standardize(x, everywhere) * norm.weight + norm.bias)
    scale, shift = norm.scale_and_shift()
    assert torch.allclose(norm.eval()(x), scale * x + shift)


def test_batch_norm_leaks_in_training_alone():
    norm, x = TokenBatchNorm(4), torch.randn(2, 6, 4)
    assert not contracts.causal(lambda x: norm(x), x)
    assert contracts.causal(norm, x)


@pytest.mark.parametrize("dim", [-1, 0, 1, (0, 1), (1, 2)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_are_those_of_autograd(dim, seed):
    set_seed(seed)
    x, grad = double(3, 4, 5, scale=2, shift=1).requires_grad_(), double(3, 4, 5)
    for norm, formula in ((standardize, standardize_gradient), (rms, rms_gradient)):
        (true,) = torch.autograd.grad(norm(x, dim), x, grad)
        assert torch.allclose(formula(x.detach(), grad, dim), true)
    # the gradient of one is not that of the other
    (true,) = torch.autograd.grad(standardize(x, dim), x, grad)
    assert not torch.allclose(rms_gradient(x.detach(), grad, dim), true, atol=1e-3)


def test_rms_is_that_of_transformers():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    x, gain = torch.randn(2, 3, 8) * 4, torch.randn(8)
    for kind, offset in ((LlamaRMSNorm, 0), (T5LayerNorm, 0), (Gemma2RMSNorm, 1)):
        norm = kind(8, eps=1e-6)
        norm.weight.data.copy_(gain)
        assert torch.allclose(norm(x), rms(x, eps=1e-6) * (gain + offset), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the wirings


def test_wirings_are_their_formulas():
    x, part = torch.randn(2, 3, 8), FeedForward(8)
    sandwich, branch = SandwichNorm(part, nn.LayerNorm(8)), BranchNorm(part, nn.LayerNorm(8))
    shake_(sandwich.norm), shake_(sandwich.after), shake_(branch.norm)
    assert sandwich.after.weight is not sandwich.norm.weight
    assert torch.allclose(sandwich(x), x + sandwich.after(part(sandwich.norm(x))))
    assert torch.allclose(branch(x), x + branch.norm(part(x)))
    assert not torch.allclose(branch(x), PreNorm(part, branch.norm)(x), atol=1e-3)


class Attending(nn.Module):
    """Stands in for the attention of a `transformers` layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **given):
        return self.layer(hidden_states), None


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_wirings_are_those_of_gemma2_and_olmo2(name):
    if name == "gemma2":
        from transformers.models.gemma2 import modeling_gemma2 as code
        from transformers.models.gemma2.configuration_gemma2 import Gemma2Config as Config

        layer, wiring, offset = code.Gemma2DecoderLayer, SandwichNorm, 1
    else:
        from transformers.models.olmo2 import modeling_olmo2 as code
        from transformers.models.olmo2.configuration_olmo2 import Olmo2Config as Config

        layer, wiring, offset = code.Olmo2DecoderLayer, BranchNorm, 0
    config = Config(
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        vocab_size=10,
        pad_token_id=0,
    )
    theirs = layer(config, 0)
    mixer, feed = MultiHeadAttention(8, 2, attend=causal_attention), FeedForward(8)
    theirs.self_attn, theirs.mlp = Attending(mixer), feed
    ours = Block(mixer, feed, lambda: nn.RMSNorm(8, eps=1e-6), wiring)
    pairs = [
        (theirs.post_attention_layernorm, getattr(ours.mix, "after", ours.mix.norm)),
        (theirs.post_feedforward_layernorm, getattr(ours.feed, "after", ours.feed.norm)),
    ]
    if name == "gemma2":
        pairs += [(theirs.input_layernorm, ours.mix.norm), (theirs.pre_feedforward_layernorm, ours.feed.norm)]
    for their_norm, our_norm in pairs:
        gain = torch.randn(8)
        their_norm.weight.data.copy_(gain)
        our_norm.weight.data.copy_(gain + offset)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- scale_norm


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 16), (1, 4)])
def test_scale_norm_gives_every_token_one_length(shape):
    norm, x = ScaleNorm(shape[-1]), torch.randn(*shape) * torch.rand(shape[:-1]).add(0.1).unsqueeze(-1)
    assert norm.gain.item() == pytest.approx(math.sqrt(shape[-1]))
    norm.gain.data.fill_(2.5)
    assert torch.allclose(norm(x).norm(dim=-1), torch.tensor(2.5), atol=1e-5)
    assert torch.allclose(norm(5 * x), norm(x), atol=1e-5)
    assert torch.allclose(norm(x), rms(x, eps=0.0) * 2.5 / math.sqrt(shape[-1]), atol=1e-5)
    assert norm(torch.zeros(shape)).abs().max() == 0  # no 0/0
    layer_norm = shake_(nn.LayerNorm(shape[-1]))  # which does not
    assert (layer_norm(x).norm(dim=-1) - 2.5).abs().max() > 1e-3


def test_scale_norm_fix_norm_and_small_init():
    embed = fix_norm_(TokenEmbedding(11, 6))
    optimizer = torch.optim.SGD(embed.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (embed(torch.arange(11)[None]) * torch.randn(11, 6)).sum().backward()
        optimizer.step()
        assert torch.allclose(embed.table.weight.norm(dim=-1), torch.ones(11), atol=1e-6)
    stack = small_init_(Stack([Block(MultiHeadAttention(64, 4), FeedForward(64), lambda: ScaleNorm(64))]), 64)
    for layer in stack.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 320), rel=0.1)
            assert not layer.bias.any()


def test_scale_norm_bounds_the_logits_of_a_tied_head():
    model = language_model(13, 16, 1, norm=lambda: ScaleNorm(16))
    fix_norm_(model.embed)
    model.stack.norm.gain.data.fill_(3.0)
    assert model(torch.randint(13, (3, 7))).abs().max() <= 3.0 + 1e-4


def test_scale_norm_model_is_saved_whole():
    model = language_model(13, 16, 1, norm=lambda: ScaleNorm(16))
    fix_norm_(model.embed)
    ids = torch.randint(13, (3, 7))
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), model(ids))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


# ----------------------------------------------------------------------------------------------------- T5, dynamic tanh


@pytest.mark.parametrize("make, total", [(bert_base, 109_482_240), (bert_large, 335_141_888)])
def test_bert_has_the_published_size(make, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == total


@pytest.mark.parametrize("seed", SEEDS)
def test_bert_starts_as_published(seed):
    """Normal of deviation 0.02 cut at two deviations, whose own deviation is 0.02 times 0.8796; zero biases."""
    torch.manual_seed(seed)
    model = MaskedLanguageModel(bert(500, 32, 64, 2, 4))
    for name, p in model.named_parameters():
        if p.ndim > 1 and "kinds" not in name:
            assert p.abs().max() <= 0.04 and p.std().item() == pytest.approx(0.02 * 0.8796, rel=0.05), name
        elif name.endswith("bias"):
            assert not p.any(), name
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    hidden, targets = hide_tokens(torch.randint(500, (20, 30)), 3, 500)
    loss = F.cross_entropy(model(hidden).flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


def test_bert_sees_both_sides_and_no_padding():
    model, ids = bert(20, 8, 16, 2, 2), torch.randint(20, (2, 6))
    real = torch.arange(6) < torch.tensor([[6], [4]])
    other = torch.where(real, ids, (ids + 1) % 20)
    assert torch.equal(model(ids, real=real)[real], model(other, real=real)[real])
    assert not torch.allclose(model(ids)[real], model(other)[real])
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 20
    assert not torch.allclose(model(ids)[:, 0], model(changed)[:, 0])
    assert torch.equal(model(ids), model(ids, torch.zeros_like(ids)))
    assert not torch.allclose(model(ids), model(ids, torch.ones_like(ids)))
    with pytest.raises(ValueError, match="positions are known up to 8, and the text has 9"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_bert_hides_tokens_in_its_shares():
    ids, generator = torch.randint(4, 1000, (400, 100)), torch.Generator().manual_seed(0)
    seen, targets = hide_tokens(ids, 3, 1000, generator=generator)
    asked = targets != -100
    assert torch.equal(targets[asked], ids[asked]) and torch.equal(seen[~asked], ids[~asked])
    assert asked.float().mean().item() == pytest.approx(0.15, abs=0.006)
    marked, same = (seen[asked] == 3).float().mean().item(), (seen[asked] == ids[asked]).float().mean().item()
    assert marked == pytest.approx(0.8, abs=0.02) and same == pytest.approx(0.1, abs=0.02)
    again = hide_tokens(ids, 3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[0], seen) and (hide_tokens(ids, 3, 1000, share=1.0)[1] == ids).all()
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=str(share)):
            hide_tokens(ids, 3, 1000, share)


@pytest.mark.parametrize("make, total", [(t5_small, 60_506_624), (t5_base, 222_903_552), (t5_large, 737_668_096)])
def test_t5_has_the_published_size(make, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == total


@pytest.mark.parametrize("seed", SEEDS)
def test_t5_starts_as_published(seed):
    """Variance 1 / fan-in; queries 1 / (d e); embeddings 1; the bias 1 / d; no bias vectors, unit gains."""
    torch.manual_seed(seed)
    d, h, e, hidden = 64, 4, 48, 200
    model = t5(300, d, 2, h, hidden, e)
    for block in model.decoder.blocks:
        q, k, v = block.mix.part.to_qkv.weight.chunk(3)
        to_k, to_v = block.look.part.to_kv.weight.chunk(2)
        expected = [(q, d * e), (k, d), (v, d), (block.mix.part.to_out.weight, h * e)]
        expected += [(block.look.part.to_q.weight, d * e), (to_k, d), (to_v, d)]
        expected += [(block.feed.part.up.weight, d), (block.feed.part.down.weight, hidden)]
        for weight, fan_in in expected:
            assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert model.embed_source.table.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.encoder.blocks[0].mix.part.attend.table.std().item() == pytest.approx(d**-0.5, rel=0.3)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert all((m.weight == 1).all() and m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.RMSNorm))
    source, read = torch.randint(300, (4, 9)), torch.randint(300, (4, 20))
    others = model(source, read)[torch.arange(300) != read[..., None]]
    assert others.var().item() == pytest.approx(1, rel=0.25)


def test_t5_shares_its_table_and_its_biases():
    model = t5(20, 16, 3, 2, 24, 8)
    assert model.embed_source is model.embed_target and model.head.table is model.embed_source.table
    for stack in (model.encoder, model.decoder):
        assert len({id(block.mix.part.attend) for block in stack.blocks}) == 1
    assert model.encoder.blocks[0].mix.part.attend is not model.decoder.blocks[0].mix.part.attend
    x = torch.randn(5, 16)
    assert torch.allclose(model.head(x), x @ model.embed_source.table.weight.T / 4, atol=1e-5)
    target = torch.randint(20, (1, 12))
    assert contracts.causal(lambda ids: model(torch.arange(6)[None], ids), target)
    longer = model.encode(torch.arange(12)[None])[:, :6]  # the encoder sees both sides
    assert not torch.allclose(longer, model.encode(torch.arange(6)[None]), atol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_tanh_is_its_formula(seed):
    torch.manual_seed(seed)
    layer = shake_(DynamicTanh(7, alpha=0.8))
    assert DynamicTanh(7, alpha=0.8).alpha.item() == pytest.approx(0.8) and DynamicTanh(7).alpha.item() == 0.5
    x = 3 * torch.randn(2, 5, 7)
    up, down = (layer.alpha * x).exp(), (-layer.alpha * x).exp()
    assert torch.allclose(layer(x), (up - down) / (up + down) * layer.weight + layer.bias, atol=1e-5)
    assert contracts.local(layer, x, window=0)


# ------------------------------------------------------------------------------------------------------- pre_crmsnorm


def shaken_model(seed: int, positions: nn.Module, **options):
    set_seed(seed)
    return shake_(language_model(17, 16, 2, positions=positions, **options)).double()


WITHOUT_BIAS = {
    "mixer": lambda: MultiHeadAttention(16, 2, bias=False, attend=causal_attention),
    "feedforward": lambda: FeedForward(16, bias=False),
}


@pytest.mark.parametrize("convert", [to_rms_norm, to_crms_norm])
@pytest.mark.parametrize("options", [{}, WITHOUT_BIAS], ids=["bias", "no_bias"])
@pytest.mark.parametrize("positions", [SinusoidalPositions, NoPositions, lambda: LearnedPositions(9, 16)])
@pytest.mark.parametrize("seed", SEEDS)
def test_pre_crmsnorm_changes_nothing(convert, options, positions, seed):
    model = shaken_model(seed, positions(), **options)
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(17, (2, 9))
    converted = convert(model)
    assert contracts.agree(converted, model, ids, atol=1e-9)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(isinstance(m, nn.LayerNorm) for m in converted.modules())
    assert converted.embed(ids).shape[-1] == (16 if convert is to_rms_norm else 15)
    assert contracts.causal(converted, ids[:1])
    assert torch.equal(generate(converted, ids[:, :3], 5), generate(model, ids[:, :3], 5))


def test_pre_crmsnorm_needs_the_centering():
    model = shaken_model(0, SinusoidalPositions())
    ids, careless = torch.randint(17, (2, 9)), to_rms_norm(model)
    part = model.stack.blocks[0].feed.part
    careless.stack.blocks[0].feed.part.down = part.down  # one writer left as it was
    assert not contracts.agree(careless, model, ids, atol=1e-3)


def test_pre_crmsnorm_with_a_head_of_its_own():
    model = shaken_model(0, SinusoidalPositions())
    model.head = nn.Linear(16, 5).double()
    ids = torch.randint(17, (2, 9))
    assert contracts.agree(to_crms_norm(model), model, ids, atol=1e-9)


@pytest.mark.parametrize("d", [4, 9, 64])
def test_pre_crmsnorm_norm_is_rms_of_the_whole_token(d):
    x = double(3, 5, d)
    x = x - x.mean(-1, keepdim=True)
    assert torch.allclose(CRMSNorm(1e-3)(x[..., :-1]), rms(x, eps=1e-3)[..., :-1])
    assert not torch.allclose(rms(x[..., :-1], eps=1e-3), rms(x, eps=1e-3)[..., :-1], atol=1e-3)


def test_pre_crmsnorm_refuses_what_is_not_exact():
    for model in (
        language_model(9, 16, 1, wiring=PostNorm),
        language_model(9, 16, 1, wiring=SandwichNorm),
        language_model(9, 16, 1, norm=lambda: nn.RMSNorm(16)),
    ):
        with pytest.raises(ValueError, match="exact for PreNorm with LayerNorm alone"):
            to_rms_norm(model)
    with pytest.raises(ValueError, match="where a Linear reads and writes is not known"):
        to_crms_norm(language_model(9, 16, 1, feedforward=lambda: nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="Identity"):
        ends(nn.Identity())


class SecondReader(MultiHeadAttention):
    """Attention with a gate that reads the input beside the queries, as several subclasses of later chapters have."""

    def __init__(self):
        super().__init__(16, 2, attend=causal_attention)
        self.to_gate = nn.Linear(16, 16)

    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.to_gate(x).sigmoid()


class Declared(MultiHeadAttention):
    ends = ("to_qkv", "to_out")


class InheritsTheDeclaration(Declared):
    pass


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(
            MultiHeadAttention(16, 2, attend=causal_attention), FeedForward(16), lambda: nn.LayerNorm(16)
        )

    def forward(self, x, **given):
        return self.block(x, **given) + 1.0


@pytest.mark.parametrize("convert", [to_rms_norm, to_crms_norm])
def test_pre_crmsnorm_refuses_parts_with_a_second_reader(convert):
    from tfkit.zoo.attention_variants import GatedAttention
    from tfkit.zoo.experts_and_elastic_width import MixtureOfHeads, token_attention

    for mixer in (
        SecondReader,
        lambda: GatedAttention(16, 2, attend=causal_attention),
        lambda: MixtureOfHeads(16, 4, 1, 1, attend=causal_attention),
        lambda: InheritsTheDeclaration(16, 2, attend=causal_attention),
    ):
        with pytest.raises(ValueError, match="reads and writes is not known"):
            convert(language_model(9, 16, 1, mixer=mixer))
    with pytest.raises(ValueError, match="to_qkv of a MultiHeadAttention should be a linear layer, and is a Beside"):
        convert(language_model(9, 16, 1, mixer=lambda: token_attention(16, 2, 3, causal_attention)))
    model = language_model(9, 16, 1)
    model.stack.blocks[0] = Sums()
    with pytest.raises(ValueError, match="Sums"):
        convert(model)
    model.stack.blocks[0], model.head = nn.Identity(), nn.Sequential(nn.Linear(16, 9))
    with pytest.raises(ValueError, match="Identity, Sequential"):
        convert(model)


@pytest.mark.parametrize("mixer", [Declared, partial(SubNormAttention, attend=causal_attention)])
def test_pre_crmsnorm_believes_a_class_that_declares_its_ends(mixer):
    kind = (lambda: mixer(16, 2)) if mixer is not Declared else (lambda: Declared(16, 2, attend=causal_attention))
    model = shaken_model(0, SinusoidalPositions(), mixer=kind)
    ids = torch.randint(17, (2, 9))
    assert contracts.agree(to_crms_norm(model), model, ids, atol=1e-9)


def test_pre_crmsnorm_on_gpt2_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)).eval()
    shake_(theirs)
    ours = gpt2(31, 12, 16, 2, 2)
    source, state = theirs.state_dict(), {}
    state["embed.table.weight"], state["embed.positions.table"] = (
        source["transformer.wte.weight"],
        source["transformer.wpe.weight"],
    )
    names = {
        "ln_1": "mix.norm",
        "ln_2": "feed.norm",
        "attn.c_attn": "mix.part.to_qkv",
        "attn.c_proj": "mix.part.to_out",
        "mlp.c_fc": "feed.part.up",
        "mlp.c_proj": "feed.part.down",
    }
    for kind in ("weight", "bias"):
        state[f"stack.norm.{kind}"] = source[f"transformer.ln_f.{kind}"]
        for block in range(2):
            for old, new in names.items():
                value = source[f"transformer.h.{block}.{old}.{kind}"]
                state[f"stack.blocks.{block}.{new}.{kind}"] = value.T if value.ndim == 2 else value
    ours.load_state_dict(state)
    ids = torch.randint(31, (2, 12))
    with torch.no_grad():
        logits = theirs(ids).logits
        assert torch.allclose(ours(ids), logits, atol=1e-5)
        assert torch.allclose(to_rms_norm(ours)(ids), logits, atol=1e-5)
        assert torch.allclose(to_crms_norm(ours)(ids), logits, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_fold_and_centered(bias):
    linear, x, scale, shift = nn.Linear(6, 4, bias=bias), torch.randn(3, 6), torch.randn(6), torch.randn(6)
    assert torch.allclose(fold(scale, shift, linear)(x), linear(scale * x + shift), atol=1e-5)
    y = linear(x)
    assert torch.allclose(centered(linear)(x), y - y.mean(-1, keepdim=True), atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- slab


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_slab_slides_from_one_norm_to_the_other(steps):
    norm = ProgressiveNorm(shake_(nn.LayerNorm(6)), shake_(RepBatchNorm(6)), steps)
    for step in range(steps + 3):
        x, share = torch.randn(4, 3, 6), max(0.0, 1 - step / steps)
        first, last = norm.first(x), copy.deepcopy(norm.last)(x)
        assert torch.allclose(norm(x), share * first + (1 - share) * last, atol=1e-5)
    x = torch.randn(4, 3, 6)
    assert torch.equal(norm.eval()(x), norm.last(x))
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        ProgressiveNorm(nn.LayerNorm(6), RepBatchNorm(6), 0)


FOLDING = {
    "slab": lambda: ProgressiveNorm(nn.LayerNorm(16), RepBatchNorm(16), 5),
    "unified_norm": lambda: UnifiedNorm(16),
    "batch": lambda: TokenBatchNorm(16),
}


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("seed", SEEDS)
def test_slab_and_unified_norm_fold_into_the_next_layer(name, seed):
    set_seed(seed)
    model = shake_(digit_classifier(16, 2, norm=FOLDING[name])).double()
    images, folded = torch.rand(3, 1, 8, 8).double(), fold_norms(model)
    assert model.training and not folded.training
    assert all(isinstance(m.norm, nn.Identity) for m in folded.modules() if isinstance(m, PreNorm))
    assert contracts.agree(folded, model, images, atol=1e-9)
    assert not contracts.agree(lambda x: folded(x), lambda x: model.train()(x), images, atol=1e-3)


def test_slab_folding_needs_eta_and_refuses_layer_norm():
    norm, linear, x = shake_(RepBatchNorm(6)).eval(), nn.Linear(6, 3), torch.randn(2, 6)
    assert torch.allclose(fold(*norm.scale_and_shift(), linear)(x), linear(norm(x)), atol=1e-5)
    plain = TokenBatchNorm.scale_and_shift(norm)
    assert not torch.allclose(fold(*plain, linear)(x), linear(norm(x)), atol=1e-3)
    with pytest.raises(ValueError, match="LayerNorm is no fixed scale and shift"):
        fold_norms(digit_classifier(16, 1))


@pytest.mark.parametrize("n, m, e, c", [(3, 3, 8, 8), (40, 40, 4, 4), (2, 50, 4, 7), (50, 2, 4, 7)])
def test_slab_attention_is_the_normalized_table(n, m, e, c):
    q, k, v = double(2, 3, n, e), double(2, 3, m, e), double(2, 3, m, c)
    table = q.relu() @ k.relu().mT
    expected = table / (table.sum(-1, keepdim=True) + 1e-6) @ v
    assert torch.allclose(simplified_linear_attention(q, k, v), expected)
    signed = q @ k.mT
    assert not torch.allclose(
        simplified_linear_attention(q, k, v), signed / signed.sum(-1, keepdim=True) @ v, atol=1e-2
    )


def test_slab_attention_adds_a_depthwise_convolution():
    attend = shake_(SimplifiedLinearAttention(2, 3, 4, 5)).double()
    q, k, v = double(3, 2, 2, 20, 3).unbind(0)
    linear = simplified_linear_attention(q, k + attend.places, v)
    padded = F.pad(v.unflatten(2, (4, 5)), (0, 0, 2, 2, 2, 2))  # (b, h, H + 4, W + 4, e)
    detail = attend.local.bias.expand_as(v).clone()
    for i in range(4):
        for j in range(5):
            window = padded[:, :, i : i + 5, j : j + 5]  # (b, h, 5, 5, e)
            detail[:, :, 5 * i + j] += torch.einsum("bhyxe,eyx->bhe", window, attend.local.weight[:, 0])
    assert torch.allclose(attend(q, k, v), linear + detail)
    with pytest.raises(ValueError, match="20 places of a grid"):
        attend(q[:, :, :6], k[:, :, :6], v[:, :, :6])
    with pytest.raises(ValueError, match="no mask"):
        attend(q, k, v, mask=torch.ones(20, 20, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------------- unified_norm


@pytest.mark.parametrize("seed", SEEDS)
def test_unified_norm_means_and_their_bound(seed):
    set_seed(seed)
    window = torch.rand(5, 200, dtype=torch.float64) * 10 ** (3 * torch.rand(200, dtype=torch.float64))
    gap = window.mean(0) - geometric_mean(window)
    assert (gap >= 0).all()
    assert (gap <= 5 * window.sqrt().var(0, correction=0) + 1e-12).all()
    assert torch.allclose(geometric_mean(window), window.prod(0) ** 0.2)
    same = torch.full((3, 4), 2.0)
    assert torch.allclose(geometric_mean(same), same[0])
    assert is_outlier(window[:, :8], torch.cat([window[1:, :8], window[:1, :8] * 1e6]))
    assert not never(window, window * 1e6)


class Slow:
    """UN for one layer, written as the paper's steps one after another, without autograd."""

    def __init__(self, width, window, warmup, momentum=0.9, eps=1e-5):
        self.__dict__.update(window=window, warmup=max(warmup, window + 1), momentum=momentum, eps=eps)
        self.squares, self.products = [torch.ones(width).double()] * window, [torch.zeros(width).double()] * window
        self.square, self.product, self.t = torch.ones(width).double(), torch.zeros(width).double(), 0

    def step(self, x, weight, bias, grad):
        self.t += 1
        now, slot = (x**2).mean((0, 1)), self.t % self.window
        variance = torch.stack(self.squares).sqrt().var()
        self.squares[slot] = now
        window = torch.stack(self.squares)
        am, gm = window.mean(0), window.log().mean(0).exp()
        ready = self.t >= self.warmup and self.window > 1
        odd = ready and bool((am - gm > self.window * variance).any())
        smoothed = ready and not odd
        square = gm if smoothed else now
        r = (square / self.square).sqrt().clamp(1 / 5, 5) if smoothed else torch.ones_like(now)
        if odd:
            self.squares[slot] = self.square
        else:
            self.square = self.momentum * self.square + (1 - self.momentum) * square
        size = (square + self.eps).sqrt()
        z = x / size
        g = grad * weight * r
        product = (g * z).mean((0, 1))
        self.products[slot] = self.product if odd else product
        psi = product
        if not odd and self.window > 1:
            mean = torch.stack(self.products).mean(0) if smoothed else product
            psi = self.product = self.momentum * self.product + (1 - self.momentum) * mean
        return weight * z + bias, (g - z * psi) / size, (grad * r * z).sum((0, 1)), grad.sum((0, 1)), odd


@pytest.mark.parametrize("window, warmup", [(1, 0), (2, 0), (4, 6), (4, 100)])
@pytest.mark.parametrize("seed", SEEDS)
def test_unified_norm_is_the_written_out_algorithm(window, warmup, seed):
    set_seed(seed)
    norm = UnifiedNorm(6, window, warmup).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    slow, outliers = Slow(6, window, warmup), 0
    for step in range(20):
        x = double(3, 5, 6, scale=30 if step == 14 else 1).requires_grad_()
        grad = double(3, 5, 6)
        y = norm(x)
        found = torch.autograd.grad(y, [x, norm.weight, norm.bias], grad)
        *expected, odd = slow.step(x.detach(), norm.weight.detach(), norm.bias.detach(), grad)
        outliers += odd
        for a, b in zip((y, *found), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), step
    x = double(3, 5, 6)
    assert torch.allclose(norm.eval()(x), norm.weight * x / (slow.square + 1e-5).sqrt() + norm.bias)
    assert (outliers > 0) == (window > 1 and warmup < 14)


def test_unified_norm_filters_what_smoothing_lets_through():
    for outlier, moved in ((is_outlier, False), (never, True)):
        norm = UnifiedNorm(8, warmup=5, outlier=outlier)
        for _ in range(30):
            norm(torch.randn(16, 4, 8))
        before = norm.memory.square.clone()
        size = norm(10 * torch.randn(16, 4, 8)).square().mean().sqrt()
        assert (not torch.equal(norm.memory.square, before)) == moved
        assert (size > 2) == moved
    with pytest.raises(ValueError, match="at least 1 batch, got 0"):
        UnifiedNorm(8, window=0)


def test_unified_norm_check_sees_an_arithmetic_mean(monkeypatch):
    import tfkit.zoo.normalization as module

    monkeypatch.setattr(module, "geometric_mean", lambda window: window.mean(0))
    with pytest.raises(AssertionError):
        test_unified_norm_is_the_written_out_algorithm(4, 6, 0)


def test_unified_norm_memory_answers_for_each_batch():
    memory = BatchMemory(4, window=2, warmup=0, momentum=0.5, outlier=never)
    for _ in range(3):
        square, ratio, smooth = memory(torch.full((4,), 4.0))
    assert torch.allclose(square, torch.full((4,), 4.0)) and (ratio >= 0.2).all() and (ratio <= 5).all()
    assert smooth(torch.ones(4)).shape == (4,)


# --------------------------------------------------------------------------------------------- foundation_transformers


@pytest.mark.parametrize("seed", SEEDS)
def test_foundation_transformers_inner_norm_fixes_the_size(seed):
    set_seed(seed)
    x = double(2, 5, 8, scale=100)
    for make, grow in (
        (lambda: SubNormAttention(8, 2), lambda part: [p.chunk(3)[2] for p in part.to_qkv.parameters()]),
        (lambda: SubNormFeedForward(8, activation=nn.ReLU), lambda part: list(part.up.parameters())),
    ):
        part = make().double()
        louder, bare = copy.deepcopy(part), copy.deepcopy(part)
        bare.inner = nn.Identity()
        bare_louder = copy.deepcopy(bare)
        with torch.no_grad():
            for model in (louder, bare_louder):
                for value in grow(model):
                    value.mul_(50)
        assert contracts.agree(louder, part, x, atol=1e-4)
        assert not contracts.agree(bare_louder, bare, x, atol=1.0)


def test_foundation_transformers_without_the_inner_norm_is_pre_norm():
    x = torch.randn(2, 5, 8)
    bare = SubNormAttention(8, 2, norm=lambda width: nn.Identity())
    plain = MultiHeadAttention(8, 2)
    contracts.copy_weights(plain, bare)
    assert contracts.agree(bare, plain, x)
    bare, plain = SubNormFeedForward(8, 12, norm=lambda width: nn.Identity()), FeedForward(8, 12)
    contracts.copy_weights(plain, bare)
    assert contracts.agree(bare, plain, x)


def test_foundation_transformers_is_causal():
    ids = torch.randint(11, (2, 8))
    assert contracts.causal(magneto_model(11, 16, 2, 2), ids)
    leaky = language_model(11, 16, 2, mixer=lambda: SubNormAttention(16, 2), check=None)
    assert not contracts.causal(leaky, ids)


def test_foundation_transformers_gains():
    assert sub_norm_gain(12) == pytest.approx(math.log(24) ** 0.5)
    encoder, decoder = sub_norm_gains(18, 6)
    assert encoder == pytest.approx((math.log(18) * math.log(36) / 3) ** 0.5)
    assert decoder == pytest.approx(math.log(18) ** 0.5)
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        sub_norm_gain(0)
    with pytest.raises(ValueError, match="got 3 and 0"):
        sub_norm_gains(3, 0)


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_foundation_transformers_start(gain):
    model = Stack([Block(SubNormAttention(64, 4), SubNormFeedForward(64), lambda: nn.LayerNorm(64)) for _ in range(2)])
    cross = CrossAttention(64, 4)
    untouched = cross.to_q.weight.clone()
    magneto_init_(nn.ModuleList([model, cross]), gain)
    for block in model.blocks:
        q, k, v = block.mix.part.to_qkv.weight.chunk(3)
        xavier = math.sqrt(2 / 128)
        assert q.std().item() == pytest.approx(xavier, rel=0.06) == k.std().item()
        assert v.std().item() == pytest.approx(gain * xavier, rel=0.06)
        assert block.mix.part.to_out.weight.std().item() == pytest.approx(gain * xavier, rel=0.06)
        for layer in (block.feed.part.up, block.feed.part.down):
            assert layer.weight.std().item() == pytest.approx(gain * math.sqrt(2 / 320), rel=0.06)
            assert not layer.bias.any()
    assert torch.equal(cross.to_q.weight, untouched)


def test_foundation_transformers_block_is_that_of_kosmos2():
    from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextBlock

    config = Kosmos2TextConfig(
        embed_dim=16,
        attention_heads=4,
        ffn_dim=24,
        layers=1,
        vocab_size=10,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    config._attn_implementation = "eager"
    theirs = shake_(Kosmos2TextBlock(config, layer_idx=0)).eval()
    ours = Block(SubNormAttention(16, 4), SubNormFeedForward(16, 24), lambda: nn.LayerNorm(16))
    attention = theirs.self_attn
    names = {
        "mix.norm": theirs.self_attn_layer_norm,
        "mix.part.inner": attention.inner_attn_ln,
        "mix.part.to_out": attention.out_proj,
        "feed.norm": theirs.final_layer_norm,
        "feed.part.up": theirs.ffn.fc1,
        "feed.part.inner": theirs.ffn.ffn_layernorm,
        "feed.part.down": theirs.ffn.fc2,
    }
    state = {f"{new}.{kind}": getattr(layer, kind) for new, layer in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        state[f"mix.part.to_qkv.{kind}"] = torch.cat(
            [getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        )
    ours.load_state_dict(state)
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


# ------------------------------------------------------------------------------------------------------ dual_patchnorm


@pytest.mark.parametrize("size, channels", [(2, 1), (4, 3)])
@pytest.mark.parametrize("seed", SEEDS)
def test_dual_patchnorm_does_not_see_the_light(size, channels, seed):
    set_seed(seed)
    count = (8 // size) ** 2
    dual, plain = (make(size, channels, 12, count).double() for make in (dual_patch_embedding, PatchEmbedding))
    images = 10 * torch.rand(3, channels, 8, 8).double()
    scale = torch.rand(3, 1, 8 // size, 8 // size).double() + 0.5  # one a and one c for each patch
    shift = torch.randn(3, 1, 8 // size, 8 // size).double()
    grow = lambda t: t.repeat_interleave(size, 2).repeat_interleave(size, 3)
    relit = grow(scale) * images + grow(shift)
    assert torch.allclose(dual(relit), dual(images), atol=1e-4)
    assert not torch.allclose(dual(-images), dual(images), atol=1e-1)  # a must be positive
    assert not torch.allclose(plain(relit), plain(images), atol=1e-1)
    count_of = lambda module: sum(p.numel() for p in module.parameters())
    assert count_of(dual) - count_of(plain) == 2 * size * size * channels + 2 * 12


def test_dual_patchnorm_is_its_formula():
    dual, images = shake_(dual_patch_embedding(4, 2, 6, count=6)), torch.rand(2, 2, 8, 12)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)  # (b, 6, 32)
    expected = dual.after(dual.project(dual.before(patches))) + dual.places
    assert torch.allclose(dual(images), expected, atol=1e-5)
    with pytest.raises(ValueError, match="6 patches are expected.*give 4"):
        dual(torch.rand(1, 2, 8, 8))


def test_image_classifier_and_its_errors():
    model = digit_classifier(16, 1, 2)
    assert isinstance(model, ImageClassifier) and model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert model.embed.places.shape == (16, 16)
    with pytest.raises(ValueError, match="divide the 8 pixels of a digit, got 3"):
        digit_classifier(16, 1, 3)


# --------------------------------------------------------------------------------------------------------- mechanisms


@pytest.mark.parametrize("name", mechanisms)
def test_every_mechanism_takes_a_training_step(name):
    module, inputs = mechanisms[name]()
    y = module(*inputs)
    y.square().mean().backward()
    assert torch.isfinite(y).all() and all(p.grad is not None for p in module.parameters())
    assert next(iter(mechanisms)) == "feed-forward"
