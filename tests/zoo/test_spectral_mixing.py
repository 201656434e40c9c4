"""Chapter 12: transforms against their definitions and libraries, mixers against their limits, and broken twins."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.zoo import spectral_mixing as z
from tfkit.zoo.attention import MultiHeadAttention, padding_mask
from tfkit.zoo.transformer import Block, FeedForward, FourierMixing, Stack

seeds = pytest.mark.parametrize("seed", [0, 1, 2])
lengths = pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 13])
images = pytest.mark.parametrize("height, columns", [(4, 6), (2, 8), (10, 4)])
close = lambda a, b, atol=1e-5: torch.allclose(a, b, atol=atol)


@pytest.fixture(autouse=True)
def start():
    torch.manual_seed(0)


def randomized(module, scale=0.5):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def dft(n):
    k = torch.arange(n, dtype=torch.float64)
    return torch.exp(-2j * math.pi * k[:, None] * k / n)


# -------------------------------------------------------------------------------------------------- cosine transform


@lengths
def test_cosine_transform_equals_scipy_and_its_matrix(n):
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(3, 2, n, dtype=torch.float64)
    assert close(z.dct(x), torch.from_numpy(fft.dct(x.numpy(), norm="ortho")), 1e-12)
    assert close(z.idct(x), torch.from_numpy(fft.idct(x.numpy(), norm="ortho")), 1e-12)
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (2 * k + 1) / (2 * n)) * torch.where(k == 0, 1 / n, 2 / n).sqrt()[:, None]
    assert close(z.dct(x), x @ matrix.T, 1e-12)
    assert close(z.idct(z.dct(x.float())), x.float())


@images
def test_cosine_transform_of_images_equals_scipy(height, columns):
    fft = pytest.importorskip("scipy.fft")
    x = torch.randn(2, height, columns, dtype=torch.float64)
    assert close(z.dct2(x), torch.from_numpy(fft.dctn(x.numpy(), axes=(1, 2), norm="ortho")), 1e-12)
    assert close(z.idct2(z.dct2(x)), x, 1e-12)


def test_an_unfolded_cosine_transform_is_another():
    x = torch.randn(2, 8)
    k = torch.arange(8)
    broken = (torch.fft.fft(x) * torch.polar(torch.full((8,), 0.5), -math.pi * k / 16)).real  # forgets to fold
    assert not close(broken, z.dct(x), 1e-2)


# --------------------------------------------------------------------------------------------------------------- fnet


@seeds
@pytest.mark.parametrize("n, d", [(5, 4), (8, 6), (1, 3)])
def test_fnet_mixing_is_two_dft_matrices_and_its_square_reads_backwards(seed, n, d):
    torch.manual_seed(seed)
    x, mix = torch.randn(2, n, d, dtype=torch.float64), FourierMixing()
    assert close(mix(x), (dft(n) @ x.to(torch.complex128) @ dft(d)).real, 1e-10)
    backwards = x.flip(1, 2).roll((1, 1), (1, 2))
    twice = n * d / 2 * (x + backwards)
    assert close(mix(mix(x)), twice, 1e-9)
    if n > 1:
        broken = lambda x: torch.fft.fft(x, dim=-1).real  # mixes features alone
        assert not close(broken(broken(x)), twice, 1e-2)


def hf_fnet(depth=3, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.FNetConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=depth, intermediate_size=40, max_position_embeddings=12,
        type_vocab_size=4, hidden_dropout_prob=0.0, pad_token_id=3, **options,
    )  # fmt: skip
    return transformers, config


def copy_fnet(theirs, ours):
    """Weights of a `transformers` FNetModel."""
    e, theirs_e = ours.embed, theirs.embeddings
    pairs = [
        (e.table, theirs_e.word_embeddings),
        (e.types, theirs_e.token_type_embeddings),
        (e.norm, theirs_e.LayerNorm),
        (e.project, theirs_e.projection),
    ]
    for block, layer in zip(ours.stack.blocks, theirs.encoder.layer, strict=True):
        pairs += [
            (block.mix.norm, layer.fourier.output.LayerNorm),
            (block.feed.part.up, layer.intermediate.dense),
            (block.feed.part.down, layer.output.dense),
            (block.feed.norm, layer.output.LayerNorm),
        ]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    with torch.no_grad():
        e.positions.table.copy_(theirs_e.position_embeddings.weight)


@seeds
def test_fnet_equals_transformers_states_pooler_and_words(seed):
    transformers, config = hf_fnet()
    torch.manual_seed(seed)
    theirs = randomized(transformers.FNetForPreTraining(config), 0.1).eval()
    embed = z.FNetEmbedding(23, 12, 16)
    ours = z.FNet(embed, [FourierMixing() for _ in range(3)], 16, hidden=40)
    copy_fnet(theirs.fnet, ours)
    ids, types = torch.randint(23, (2, 9)), torch.randint(4, (2, 9))
    with torch.no_grad():
        expected = theirs.fnet(input_ids=ids, token_type_ids=types)
        states = ours(ids, types)
        assert close(states, expected.last_hidden_state)
        assert close(ours(ids), theirs.fnet(input_ids=ids).last_hidden_state)
        pool, head = z.FirstTokenPooler(16), z.masked_word_head(16, 23)
        pool.dense.load_state_dict(theirs.fnet.pooler.dense.state_dict())
        assert close(pool(states), expected.pooler_output)
        predict = theirs.cls.predictions
        head[0].load_state_dict(predict.transform.dense.state_dict())
        head[2].load_state_dict(predict.transform.LayerNorm.state_dict())
        head[3].load_state_dict(predict.decoder.state_dict())
        assert close(head(states), theirs(input_ids=ids, token_type_ids=types).prediction_logits)
        ours.stack.blocks[1].mix.part = nn.Identity()  # broken: one layer does not mix
        assert not close(ours(ids, types), states, 1e-2)


def test_fnet_sizes_and_hybrid():
    with torch.device("meta"):
        base, hybrid = z.fnet(), z.hybrid_fnet()
    assert measure.parameters(hybrid) - measure.parameters(base) == 2 * (4 * 768**2 + 4 * 768)
    kinds = [type(block.mix.part) for block in hybrid.stack.blocks]
    assert kinds == [FourierMixing] * 10 + [MultiHeadAttention] * 2
    with pytest.raises(ValueError, match="6"):
        z.fnet(9, length=4, width=8, depth=1)(torch.zeros(1, 6, dtype=torch.long))


# ------------------------------------------------------------------------------------------------ fourier_transformer


@seeds
@pytest.mark.parametrize("n, m", [(12, 6), (9, 4), (7, 7), (5, 1)])
def test_fourier_transformer_resamples_slow_waves_without_loss(seed, n, m):
    torch.manual_seed(seed)
    weights = torch.randn(m, 3)  # any mixture of the m slowest waves
    waves = lambda n: torch.cos(math.pi * torch.arange(m) * (torch.arange(n)[:, None] + 0.5) / n)
    assert close(z.shorten((waves(n) @ weights)[None], m), (n / m) ** 0.5 * (waves(m) @ weights)[None])
    x = torch.randn(2, n, 3)
    assert close(z.shorten(x, n), x)
    if 1 < m < n:
        assert not close(x[:, :m], z.shorten(x, m), 1e-2)  # cutting tokens off is not shortening


def stack_of(depth, kind=Stack, *given):
    norm = lambda: nn.LayerNorm(8)
    return kind([Block(MultiHeadAttention(8, 2), FeedForward(8), norm) for _ in range(depth)], *given)


@seeds
def test_fourier_transformer_stack_loads_plain_weights_and_equals_it_at_ratio_one(seed):
    torch.manual_seed(seed)
    plain, x = stack_of(3), torch.randn(2, 9, 8)
    for ratio, length in ((1.0, 9), (0.5, 1 + 2), (0.3, 1 + 1)):
        short = stack_of(3, z.ShortenedStack, {1: ratio, 2: ratio})
        short.load_state_dict(plain.state_dict())
        assert short(x).shape == (2, length, 8)
        if ratio == 1:
            assert close(short(x), plain(x))
        else:
            assert not close(short(x)[:, :1], plain(x)[:, :1], 1e-4)
    by_hand = plain.blocks[0](x)
    by_hand = torch.cat([by_hand[:, :1], z.shorten(by_hand[:, 1:], 4)], 1)
    assert close(stack_again(plain)(x), plain.blocks[2](plain.blocks[1](by_hand)))


def stack_again(plain):
    short = stack_of(3, z.ShortenedStack, {1: 0.5})
    short.load_state_dict(plain.state_dict())
    return short


@pytest.mark.parametrize("length", [0, 6])
def test_fourier_transformer_refuses(length):
    with pytest.raises(ValueError, match=str(length)):
        z.shorten(torch.randn(1, 5, 2), length)
    with pytest.raises(ValueError, match="1.5"):
        stack_of(1, z.ShortenedStack, {0: 1.5})


# ------------------------------------------------------------------------------------------------------------- wavspa


def wavelets(width):
    angles, lifting = z.RotationWavelet(width, taps=6), z.LiftingWavelet(width)
    for p in [*angles.parameters(), *lifting.parameters()]:
        nn.init.normal_(p)
    taps = [z.TapWavelet(low[:, None]) for low in (z.HAAR, z.DAUBECHIES)]
    return [*taps, angles, lifting]


@seeds
@pytest.mark.parametrize("n, k", [(8, 2), (16, 4), (12, 8), (2, 6)])
def test_wavspa_wavelet_step_equals_convolution_and_inverts(seed, n, k):
    ndimage = pytest.importorskip("scipy.ndimage")
    torch.manual_seed(seed)
    low = z.rotation_filter(torch.randn(k // 2, 3))
    assert low.shape == (k, 3)
    assert close(low.square().sum(0), torch.ones(3))
    x = torch.randn(2, n, 3)
    smooth, detail = z.wavelet_split(x, low)
    for found, taps in ((smooth, low), (detail, z.mirror_filter(low))):
        for c in range(3):
            slow = ndimage.correlate1d(x[..., c].numpy(), taps[:, c].numpy(), axis=1, mode="wrap", origin=-(k // 2))
            assert np.allclose(found[..., c], slow[:, ::2], atol=1e-5)
    assert close(z.wavelet_merge(smooth, detail, low), x)
    assert close(smooth.square().sum() + detail.square().sum(), x.square().sum(), 1e-3)
    if k > 2:
        broken = low + 0.3 * torch.randn(k, 3)
        assert not close(z.wavelet_merge(*z.wavelet_split(x, broken), broken), x, 1e-2)


def test_wavspa_daubechies_filter_equals_the_library_and_ignores_slopes():
    slope = torch.arange(16.0)[None, :, None].expand(1, 16, 1)
    detail = z.wavelet_split(slope, z.DAUBECHIES[:, None])[1]
    assert close(detail[:, :-1], torch.zeros(1, 7, 1), 1e-5)  # the last wraps around
    haar = z.wavelet_split(slope, z.HAAR[:, None])[1]
    assert not close(haar[:, :-1], torch.zeros(1, 7, 1), 1e-2)
    pywt = pytest.importorskip("pywt")
    x = torch.randn(2, 16, 1)
    ours, theirs = z.wavelet_split(x, z.DAUBECHIES[:, None]), pywt.dwt(x.roll(-1, 1).numpy(), "db2", "periodization", 1)
    assert close(ours[0], torch.from_numpy(theirs[0]))
    assert close(ours[1].abs().sum(), torch.from_numpy(theirs[1]).abs().sum(), 1e-3)


@seeds
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_wavspa_without_mixing_returns_its_input(seed, levels):
    torch.manual_seed(seed)
    x = torch.randn(2, 16, 4)
    for wavelet in wavelets(4):
        assert close(z.WaveletSpace([nn.Identity()] * (levels + 1), wavelet)(x), x, 1e-3)


def test_wavspa_without_levels_is_attention_and_masks_padding():
    attend, x = MultiHeadAttention(8, 2), torch.randn(2, 8, 8)
    space = z.WaveletSpace([attend], z.RotationWavelet(8))
    assert close(space(x), attend(x))
    real = torch.arange(8) < torch.tensor([[8], [5]])
    layer, other = z.wavelet_attention(8, 2, 2), torch.where(real[..., None], x, 9.0)
    assert close(layer(x, mask=padding_mask(real)), layer(other, mask=padding_mask(real)))
    assert not close(layer(x), layer(other), 1e-3)
    with pytest.raises(ValueError, match="6 tokens"):
        layer(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="5 and 2"):
        z.wavelet_split(torch.randn(1, 5, 1), z.HAAR[:, None])


@seeds
def test_wavspa_local_change_stays_local(seed):
    torch.manual_seed(seed)
    x = torch.randn(1, 64, 1)
    y = x + F.one_hot(torch.randint(64, ()), 64).float()[None, :, None]
    for t, s in zip(*(z.wavelet_split(t, z.DAUBECHIES[:, None]) for t in (x, y)), strict=True):
        assert 1 <= ((t - s).abs() > 1e-6).sum() <= 2


# ---------------------------------------------------------------------------------------------------------------- svt


@seeds
@images
def test_svt_transform_inverts_and_each_band_is_a_filter(seed, height, columns):
    ndimage = pytest.importorskip("scipy.ndimage")
    torch.manual_seed(seed)
    x = torch.randn(2, 3, height, columns)
    low, high = z.dtcwt(x)
    assert close(z.inverse_dtcwt(low, high), x)
    assert not close(z.inverse_dtcwt(low, high.conj()), x, 1e-2)  # broken: phases turned around
    both = lambda r, c: ndimage.correlate1d(
        ndimage.correlate1d(x.numpy(), r.numpy(), axis=2, mode="reflect"), c.numpy(), axis=3, mode="reflect"
    )
    L, H = z.ANALYSIS_LOW, z.ANALYSIS_HIGH
    assert np.allclose(low, both(L, L), atol=1e-5)
    for i, (r, c) in enumerate([(H, L), (H, H), (L, H)]):
        y = both(r, c)
        p, q, s, t = y[..., ::2, ::2], y[..., ::2, 1::2], y[..., 1::2, ::2], y[..., 1::2, 1::2]
        assert np.allclose(high[:, :, i], (p - t + 1j * (q + s)) / 2**0.5, atol=1e-5)
        assert np.allclose(high[:, :, 5 - i], (p + t + 1j * (q - s)) / 2**0.5, atol=1e-5)
    mean = low.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert close(z.scattering(x, 2), torch.cat([mean[:, :, None], high.abs()], 2))


def test_svt_transform_equals_the_library():
    pytest.importorskip("pytorch_wavelets")
    from pytorch_wavelets import DTCWTForward

    x = torch.randn(2, 3, 8, 12)
    low, (high,) = DTCWTForward(J=1, biort="near_sym_a", qshift="qshift_a")(x)
    ours = z.dtcwt(x)
    assert close(ours[0], low)
    assert close(ours[1], torch.view_as_complex(high.contiguous()))


@images
def test_svt_mixer_passes_through_and_mixes(height, columns):
    x, mixer = torch.randn(2, height * columns, 8), z.ScatteringMixer(8, height, columns, nn.Identity())
    assert close(mixer(x), x)
    with torch.no_grad():
        mixer.low.mul_(0.5)
    assert not close(mixer(x), x, 1e-2)
    full = randomized(z.ScatteringMixer(8, height, columns))
    effect = contracts.influence(full, x)
    assert (effect > 0).float().mean() > 0.2
    with pytest.raises(ValueError, match="3 tokens"):
        full(torch.randn(1, 3, 8))


@seeds
def test_svt_complex_network_is_block_diagonal(seed):
    torch.manual_seed(seed)
    mlp = randomized(z.ComplexMLP(4, 3))
    x = torch.randn(5, 4, 3, dtype=torch.complex64)
    w, b = (torch.view_as_complex(p) for p in (mlp.weight, mlp.bias))
    for g in range(4):
        hidden = x[:, g] @ w[0, g] + b[0, g]
        hidden = torch.complex(hidden.real.relu(), hidden.imag.relu())
        assert close(mlp(x)[:, g], hidden @ w[1, g] + b[1, g], 1e-4)
    assert not close(mlp(x)[:, 0], mlp(x.conj())[:, 0], 1e-2)


def test_svt_refuses():
    for call in (lambda: z.dtcwt(torch.randn(1, 1, 5, 4)), lambda: z.HighBands(6, 2, 2, groups=4)):
        with pytest.raises(ValueError, match="5|6"):
            call()
    for window in (3, 6):
        with pytest.raises(ValueError, match=str(window)):
            z.scattering(torch.randn(1, 1, 8, 8), window)


# -------------------------------------------------------------------------------------------------------- spectformer


@seeds
@pytest.mark.parametrize("height, columns", [(4, 6), (3, 5), (1, 4)])
def test_spectformer_gate_is_a_circular_convolution(seed, height, columns):
    torch.manual_seed(seed)
    gate, x = z.SpectralGate(2, height, columns), torch.randn(3, height * columns, 2)
    weight = torch.view_as_complex(gate.weight.detach())
    kernel = torch.fft.irfft2(weight, s=(height, columns), dim=(0, 1))
    picture = x.unflatten(1, (height, columns))
    slow = sum(
        kernel[i, j] * picture.roll((i, j), (1, 2)) for i in range(height) for j in range(columns)
    )  # (b, H, W, d)
    assert close(gate(x), slow.flatten(1, 2))
    assert close(z.spectral_gate(picture, torch.ones_like(weight)), picture)
    half = z.spectral_gate(picture, torch.full_like(weight, 0.5))
    assert close(half, picture / 2)
    broken = torch.fft.irfft2(torch.fft.rfft2(picture, dim=(1, 2)) * weight.abs(), s=(height, columns), dim=(1, 2))
    assert not close(broken, slow, 1e-4)  # broken: the phase of the weights is lost


def test_spectformer_is_vit_without_gates_and_its_block_has_one_residual():
    x = torch.randn(2, 12, 8)
    plain, none = stack_of(2, Stack, nn.LayerNorm(8)), z.spectformer_blocks(8, 2, 2, 0, 3, 4)
    plain.load_state_dict(none.state_dict())
    assert close(plain(x), none(x))
    block = z.spectformer_blocks(8, 2, 2, 2, 3, 4).blocks[1]
    assert close(block(x), x + block.feedforward(block.norm2(block.mixer(block.norm1(x)))))
    two = Block(block.mixer, block.feedforward, lambda: nn.LayerNorm(8))
    assert not close(two(x), block(x), 1e-4)
    for call in (
        lambda: z.spectformer_blocks(8, 2, 2, 3, 3, 4),
        lambda: z.ImageClassifier(1, 2, 7, 3, 8, plain),
        lambda: block(torch.randn(1, 3, 8)),
    ):
        with pytest.raises(ValueError, match="3"):
            call()


def test_spectformer_gate_masks_padding():
    real = torch.arange(6) < torch.tensor([[6], [4]])
    x, gate = torch.randn(2, 6, 4), z.SpectralGate(4, 2, 3)
    other = torch.where(real[..., None], x, 7.0)
    assert close(gate(x, mask=padding_mask(real)), gate(other, mask=padding_mask(real)))


# --------------------------------------------------------------------------------------------- dynamic_spectrum_mixer


@seeds
@images
def test_dynamic_spectrum_mixer_starts_as_identity_and_is_not_linear(seed, height, columns):
    torch.manual_seed(seed)
    x, y = torch.randn(2, 2, height * columns, 4)
    for make, linear in ((z.BandWeights, False), (z.StaticBandWeights, True)):
        layer = z.DynamicSpectrumMixer(height, columns, make(4, 2), bands=2)
        assert close(layer(x), x)
        randomized(layer, 1.0)
        assert close(layer(x + y), layer(x) + layer(y), 1e-4) == linear
        spectrum = z.dct2(x.transpose(1, 2).unflatten(2, (height, columns)))
        weights = layer.weights(spectrum)
        fast = torch.maximum(torch.arange(height)[:, None] * columns, torch.arange(columns) * height) * 2
        member = fast // (height * columns)  # 0 or 1
        by_hand = z.idct2(torch.where(member == 0, weights[:, :, :1, None], weights[:, :, 1:, None]) * spectrum)
        assert close(layer(x), by_hand.flatten(2).transpose(1, 2))


def test_dynamic_spectrum_mixer_bands():
    band = z.frequency_bands(4, 6, 4)
    assert band[0, 0] == 0 and band.max() == 3 and (band.diff(dim=0) >= 0).all() and (band.diff(dim=1) >= 0).all()
    for bands in (0, 5):
        with pytest.raises(ValueError, match=str(bands)):
            z.frequency_bands(4, 6, bands)


# --------------------------------------------------------------------------------------------------------- all mixers


@pytest.mark.parametrize("name", ["plain attention", *[n for n in z.mechanisms if n != "plain attention"]])
def test_mechanisms_run_and_train(name):
    module, inputs = z.mechanisms[name]()
    result = module(*inputs)
    assert result.shape[0] == 4 and result.shape[2] == 64 and torch.isfinite(result).all()
    if any(True for _ in module.parameters()):
        result.square().mean().backward()
        assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    "make",
    [FourierMixing, lambda: z.SpectralGate(4, 2, 4), lambda: z.wavelet_attention(4, 2, 1)],
    ids=["fourier", "gate", "wavelet"],
)
def test_no_mixer_is_causal(make):
    assert not contracts.causal(make(), torch.randn(1, 8, 4))
