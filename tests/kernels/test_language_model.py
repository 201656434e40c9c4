"""Chapter 02's language model with a kernel in every slot trains to the same losses as without."""

from functools import partial

import pytest
import torch
from torch import nn

from kernels import DEVICE, INTERPRET
from kernels.cross_entropy import cross_entropy
from kernels.flash_attention import flash_attention
from kernels.layer_norm import LayerNorm
from kernels.linear_attention import normalized_linear_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import Linear
from kernels.rms_norm import RMSNorm
from kernels.rotary import rotate_halves, rotate_pairs
from kernels.swiglu import SwiGLU
from tfkit.train import fit, next_token_loss
from tfkit.zoo import positions
from tfkit.zoo.attention import MultiHeadAttention, causal_attention
from tfkit.zoo.feedforward import GatedFeedForward
from tfkit.zoo.transformer import NoPositions, language_model

VOCABULARY, WIDTH, HEADS, LENGTH = 37, 16, 2, 12


def batches(seed=0):
    g = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=g).to(DEVICE)
        yield ids[:, :-1], ids[:, 1:]


def model(attend, feedforward, norm, linear=nn.Linear, **given):
    """A model of two blocks, with weights that depend on nothing but the seed."""
    torch.manual_seed(0)
    mixer = partial(MultiHeadAttention, WIDTH, HEADS, attend=attend)
    built = language_model(
        VOCABULARY, WIDTH, 2, mixer=mixer, feedforward=feedforward, norm=norm, positions=NoPositions(), **given
    )
    for block in built.modules():
        for name, child in list(block.named_children()):
            if type(child) is nn.Linear and linear is not nn.Linear:
                new = linear(child.in_features, child.out_features, child.bias is not None)
                setattr(block, name, new)
    return built.to(DEVICE)


def losses(built, loss=next_token_loss, steps=4):
    history = fit(built, batches(), steps, lr=1e-2, loss=lambda m, x, y: loss(m(x), y), seed=0)
    return torch.tensor(history.loss)


def flat(loss):
    return lambda logits, targets: loss(logits.flatten(0, 1), targets.flatten())


def same(plain, fast, **given):
    fast.load_state_dict(plain.state_dict())
    expected, found = losses(plain), losses(fast, **given)
    assert torch.allclose(expected, found, atol=2e-4), (expected, found)
    assert expected[-1] < expected[0]
    for (name, a), b in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=5e-3), name
    return expected


layer_norm, rms_norm = (partial(norm, WIDTH) for norm in (nn.LayerNorm, partial(nn.RMSNorm, eps=1e-6)))
flash = partial(flash_attention, causal=True)


@pytest.mark.slow
def test_every_kernel_in_place_gives_the_same_losses():
    """Flash attention with rotary positions, RMSNorm, SwiGLU, the tiled product and cross-entropy, all at once."""
    plain_attend = positions.Rotary(WIDTH // HEADS, causal_attention)
    fast_attend = positions.Rotary(WIDTH // HEADS, flash, rotate=rotate_halves)
    plain = model(plain_attend, partial(GatedFeedForward, WIDTH), rms_norm)
    fast = model(fast_attend, partial(SwiGLU, WIDTH), partial(RMSNorm, WIDTH, eps=1e-6), Linear)
    assert any(isinstance(m, Linear) for m in fast.modules())
    same(plain, fast, loss=flat(cross_entropy))


@pytest.mark.slow
def test_layer_norm_and_the_other_pairing():
    plain_attend = positions.Rotary(WIDTH // HEADS, causal_attention, rotate=positions.rotate_pairs)
    fast_attend = positions.Rotary(WIDTH // HEADS, flash, rotate=rotate_pairs)
    plain = model(plain_attend, partial(GatedFeedForward, WIDTH), layer_norm)
    fast = model(fast_attend, partial(SwiGLU, WIDTH), partial(LayerNorm, WIDTH))
    same(plain, fast, loss=flat(cross_entropy))


def test_a_head_that_never_stores_the_logits():
    """linear_cross_entropy takes the states and the head's weight, and the model its gradients."""
    plain = model(causal_attention, None, layer_norm)
    ids, targets = next(batches())
    plain.zero_grad()
    next_token_loss(plain(ids), targets).backward()
    expected = {name: p.grad.clone() for name, p in plain.named_parameters()}
    plain.zero_grad()
    states = plain.stack(plain.embed(ids))
    linear_cross_entropy(states.flatten(0, 1), plain.embed.table.weight, targets.flatten()).backward()
    for name, p in plain.named_parameters():
        assert torch.allclose(p.grad, expected[name], atol=1e-5), name


@pytest.mark.skipif(not INTERPRET, reason="a broken mask is shown once, in the interpreter")
def test_a_wrong_kernel_shows_in_the_losses():
    plain = model(causal_attention, None, layer_norm)
    with pytest.raises(ValueError, match="sees later tokens"):
        model(flash_attention, None, layer_norm)
    fast = model(flash_attention, None, layer_norm, check=None)  # not causal: it sees the answer
    fast.load_state_dict(plain.state_dict())
    assert not torch.allclose(losses(plain, steps=2), losses(fast, steps=2), atol=2e-4)


def test_linear_attention_fits_the_slot():
    feature = lambda x: nn.functional.elu(x) + 1
    attend = lambda q, k, v, mask=None: normalized_linear_attention(feature(q), feature(k), v)

    def written_out(q, k, v, mask=None):
        weights = (feature(q) @ feature(k).mT).tril()
        return weights / weights.sum(-1, keepdim=True) @ v

    same(model(written_out, None, layer_norm), model(attend, None, layer_norm))
