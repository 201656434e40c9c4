"""Chapter 74: bytetransformer, an encoder on packed rows, against the padded and masked one and against BERT."""

import pytest
import torch
from torch import nn

import kernels
from tfkit import contracts, measure
from tfkit.zoo.attention import MultiHeadAttention, attention
from tfkit.zoo.transformer import Block, FeedForward, FourierMixing, PostNorm, PreNorm, Stack, transformer_encoder
from tfkit.zoo.variable_length import Padded, PaddingFree, attend_each, pack, packed_stack, unpack

SEEDS = range(4)


def batch(seed, b=5, n=13, d=32):
    """Tokens and a random mask with holes; one sequence is full, one has a single token."""
    g = torch.Generator().manual_seed(seed)
    real = torch.rand(b, n, generator=g) < torch.rand(b, 1, generator=g)
    real[:, 0], real[0], real[1, 1:] = True, True, False
    return torch.randn(b, n, d, generator=g), real


def gap(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wiring", [PreNorm, PostNorm])
def test_bytetransformer_equals_padded_and_masked_on_real_tokens(seed, wiring):
    stack = transformer_encoder(32, 2, 4, wiring)
    x, real = batch(seed)
    free, padded = PaddingFree(stack)(x, real), Padded(stack)(x, real)
    assert gap(free[real], padded[real]) < 1e-5
    assert not free[~real].any()


def test_bytetransformer_gradients_equal_and_weights_are_shared():
    stack = transformer_encoder(32, 2, 4)
    x, real = batch(0)
    grads = []
    for model in (PaddingFree(stack), Padded(stack)):
        stack.zero_grad()
        model(x, real)[real].square().mean().backward()
        grads.append([p.grad.clone() for p in stack.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    assert {id(p) for p in PaddingFree(stack).parameters()} == {id(p) for p in stack.parameters()}


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed here; it exists for Linux")
def test_bytetransformer_with_the_triton_kernel():
    from kernels.varlen_attention import varlen_attention

    stack = transformer_encoder(32, 1, 2).to(kernels.DEVICE)
    x, real = (t.to(kernels.DEVICE) for t in batch(1, b=3, n=7))
    by_kernel, by_loop = (PaddingFree(stack, attend)(x, real) for attend in (varlen_attention, attend_each))
    assert gap(by_kernel, by_loop) < 1e-5
    grads = [torch.autograd.grad(y.square().sum(), list(stack.parameters())) for y in (by_kernel, by_loop)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("lengths", [[20, 16, 12, 8, 4], [10, 10, 2, 2, 6, 6], [5]])
def test_bytetransformer_flops(lengths):
    """Outside attention as many as real tokens, inside 4 d times the sum of squares in each layer; both exact."""
    n, width, depth = max(lengths), 16, 2
    real = torch.arange(n) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), n, width)
    nothing = lambda q, k, v, *given, **named: v

    def flops(attend_padded, attend_packed):
        stack = transformer_encoder(width, depth, 2)
        for block in stack.blocks:
            block.mix.part.attend = attend_padded
        return [measure.flops(m, x, real) for m in (Padded(stack), PaddingFree(stack, attend_packed))]

    (padded, packed), whole = flops(nothing, nothing), flops(attention, attend_each)
    assert packed * n * len(lengths) == padded * sum(lengths)
    assert whole[1] - packed == 4 * width * depth * sum(m * m for m in lengths)
    assert whole[0] - padded == 4 * width * depth * len(lengths) * n * n


def test_bytetransformer_padding_is_never_touched():
    stack = transformer_encoder(32, 2, 4)
    x, _ = batch(2)
    front = torch.arange(13) < torch.tensor([13, 1, 5, 9, 2])[:, None]
    assert contracts.padding_invariant(PaddingFree(stack), x, front)
    broken = Padded(stack)
    broken.forward = lambda x, real: stack(x)  # without a mask the contract must fail
    assert not contracts.padding_invariant(broken, x, front)
    poisoned = torch.where(front[..., None], x, torch.nan)
    assert PaddingFree(stack)(poisoned, front).isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [lambda o: o[[0, -1]], lambda o: torch.cat([o[:1], o[1:-1] + 1, o[-1:]]), lambda o: torch.cat([o[:1], o[2:]])],
    ids=["one sequence of all", "off by one", "two sequences joined"],
)
def test_wrong_offsets_are_noticed(wrong):
    stack = transformer_encoder(32, 1, 4)
    x, real = batch(3)
    leak = lambda q, k, v, offsets, longest: attend_each(q, k, v, wrong(offsets), longest)
    assert gap(PaddingFree(stack, leak)(x, real)[real], Padded(stack)(x, real)[real]) > 1e-3


def test_parity_with_transformers_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    for p in bert.parameters():  # the defaults are near zero, and a norm of ones and zeros hides a swap
        nn.init.normal_(p, std=0.3)
    norm = lambda: nn.LayerNorm(32, eps=config.layer_norm_eps)
    make = lambda: Block(MultiHeadAttention(32, 4), FeedForward(32, 64), norm, PostNorm)
    stack = Stack([make() for _ in range(2)])

    def copy(target, *sources):
        with torch.no_grad():
            target.weight.copy_(torch.cat([s.weight for s in sources]))
            target.bias.copy_(torch.cat([s.bias for s in sources]))

    for block, layer in zip(stack.blocks, bert.encoder.layer, strict=True):
        inner, out = layer.attention.self, layer.attention.output
        copy(block.mix.part.to_qkv, inner.query, inner.key, inner.value)
        copy(block.mix.part.to_out, out.dense)
        copy(block.mix.norm, out.LayerNorm)
        copy(block.feed.part.up, layer.intermediate.dense)
        copy(block.feed.part.down, layer.output.dense)
        copy(block.feed.norm, layer.output.LayerNorm)
    ids = torch.randint(60, (4, 11))
    real = torch.arange(11) < torch.tensor([11, 3, 7, 1])[:, None]
    with torch.no_grad():
        theirs = bert(input_ids=ids, attention_mask=real.long()).last_hidden_state
        ours = PaddingFree(stack)(bert.embeddings(input_ids=ids), real)
    assert gap(ours[real], theirs[real]) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_pack_and_unpack(seed):
    x, real = batch(seed, b=3, n=7, d=4)
    rows, offsets = pack(x, real)
    assert torch.equal(rows, x[real]) and offsets.dtype == torch.int32
    assert offsets.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    assert torch.equal(unpack(rows, real), torch.where(real[..., None], x, 0.0))
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, real)[0], real), x.double().requires_grad_())


@pytest.mark.parametrize("heads, groups, lengths", [(4, 4, [3, 0, 5]), (4, 2, [1, 6]), (6, 1, [4]), (2, 2, [0, 0])])
def test_attend_each(heads, groups, lengths):
    total, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    q, (k, v) = torch.randn(total, heads, 8), torch.randn(2, total, groups, 8)
    out = attend_each(q, k, v, offsets, max(lengths))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    wide = [t.repeat_interleave(t.shape[1] and heads // t.shape[1], 1).transpose(0, 1) for t in (q, k, v)]
    want = attention(*wide, mask=owner[:, None] == owner).transpose(0, 1) if total else q
    assert out.shape == q.shape and torch.allclose(out, want, atol=1e-5)


def test_errors():
    x, real = batch(0)
    with pytest.raises(ValueError, match=r"\(5, 13\); got \(5, 12\)"):
        getattr(pack, "__wrapped__", pack)(x, real[:, :12])  # the runtime check of shapes would refuse it first
    with pytest.raises(ValueError, match="3 rows for"):
        unpack(x[0, :3], real)
    with pytest.raises(ValueError, match="end at 4, and there are 7 rows"):
        attend_each(*torch.randn(3, 7, 2, 4), torch.tensor([0, 4]), 4)
    mixing = Stack([Block(FourierMixing(), FeedForward(8), lambda: nn.LayerNorm(8))])
    with pytest.raises(ValueError, match="FourierMixing cannot be packed"):
        packed_stack(mixing)
