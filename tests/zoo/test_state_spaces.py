"""Chapter 15: three forms of a recurrence, Legendre memory, Hyena, Mamba, DeciMamba and Avey on random shapes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.past import remember
from tfkit.zoo import state_spaces as z
from tfkit.zoo.attention import padding_mask
from tfkit.zoo.transformer import PreNorm, generate


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def loop(decay, x, h=None):
    h, states = torch.zeros_like(x[:, 0]) if h is None else h, []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t]
        states.append(h)
    return torch.stack(states, 1)


# ------------------------------------------------------------------------------------------------- scan and convolution


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 21, 49, 50])
def test_scan_equals_the_loop(seed, n):
    decay, x = torch.rand(2, n, 3, 2), torch.randn(2, n, 3, 2)
    assert contracts.reduces_to(z.linear_scan, loop, decay, x)
    state = torch.randn(2, 3, 2)
    assert torch.allclose(z.linear_scan(decay, x, state), loop(decay, x, state), atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_scan_gradients_in_double_precision(n):
    torch.manual_seed(0)
    decay, x, state = (torch.randn(2, *shape, dtype=torch.double).requires_grad_() for shape in ((n, 3), (n, 3), (3,)))
    assert torch.autograd.gradcheck(z.linear_scan, (decay, x, state))


def test_scan_of_complex_numbers(seed):
    decay, x = (torch.randn(2, 6, 3, dtype=torch.cdouble).requires_grad_() for _ in range(2))
    assert torch.allclose(z.linear_scan(decay, x), loop(decay, x))
    assert torch.autograd.gradcheck(z.linear_scan, (decay, x))
    assert torch.autograd.gradgradcheck(z.linear_scan, (decay, x))
    real = decay.detach().real
    assert torch.allclose(z.linear_scan(real, x), loop(real, x))


def test_scan_in_float32_stays_exact_for_long_and_strongly_decaying_inputs(seed):
    decay, x = torch.rand(1, 1000, 8) ** torch.tensor([0.01, 0.1, 1.0, 3, 10, 30, 100, 1000]), torch.randn(1, 1000, 8)
    exact = loop(decay.double(), x.double())
    assert ((z.linear_scan(decay, x) - exact).abs() <= 1e-5 * exact.abs().amax(1, keepdim=True)).all()
    inputs = list(scan_inputs(1000))
    inputs[1], inputs[2] = inputs[1] * torch.tensor([0.01, 0.1, 10, 100]), inputs[2] * 16
    exact = selective_loop(*(t.double() for t in inputs))
    assert ((z.selective_scan(*inputs) - exact).abs() <= 1e-5 * exact.abs().amax(1, keepdim=True)).all()


def test_a_scan_whose_chunks_start_from_nothing_is_caught(seed, monkeypatch):
    decay, x, inputs = torch.rand(2, 9, 3), torch.randn(2, 9, 3), scan_inputs(9)
    assert contracts.agree(z.linear_scan, loop, decay, x)
    assert contracts.agree(z.selective_scan, selective_loop, *inputs)
    starts = z._starts
    monkeypatch.setattr(z, "_starts", lambda first, passed, ends: starts(first, 0 * passed, ends))
    assert not contracts.agree(z.linear_scan, loop, decay, x)
    assert not contracts.agree(z.selective_scan, selective_loop, *inputs)


def test_scan_checks_its_input():
    with pytest.raises(ValueError, match="at least one token"):
        z.linear_scan(torch.ones(2, 0, 3), torch.ones(2, 0, 3))
    with pytest.raises(ValueError, match="at least one token"):
        z.selective_scan(*scan_inputs(0))


@pytest.mark.parametrize("n, m", [(1, 1), (9, 9), (9, 3), (6, 11)])
def test_convolution_equals_the_sum(seed, n, m):
    x, kernel = torch.randn(2, n, 4), torch.randn(m, 4)
    expected = torch.zeros_like(x)
    for t in range(n):
        for j in range(max(0, t - m + 1), t + 1):
            expected[:, t] += kernel[t - j] * x[:, j]
    assert torch.allclose(z.causal_convolution(x, kernel), expected, atol=1e-5)


def test_a_circular_convolution_is_caught(seed):
    kernel, x = torch.randn(8, 3), torch.randn(2, 8, 3)
    wave = lambda x: torch.fft.rfft(x, dim=1)
    assert contracts.causal(lambda x: z.causal_convolution(x, kernel), x)
    assert not contracts.causal(lambda x: torch.fft.irfft(wave(x) * wave(kernel[None]), 8, dim=1), x)


@pytest.mark.parametrize("length", [1, 2, 16, 23])
def test_s4d_kernel_is_its_sum(seed, length):
    step, a = torch.rand(3) + 0.1, torch.complex(-torch.rand(3, 4) - 0.1, torch.randn(3, 4))
    c = torch.randn(3, 4, dtype=torch.cfloat)
    rows = []
    for t in range(length):
        turn = step[:, None] * a
        rows.append(2 * (c * (turn.exp() - 1) / a * (turn * t).exp()).sum(-1).real)
    assert torch.allclose(z.s4d_kernel(step, a, c, length), torch.stack(rows), atol=1e-4)


def test_s4d_streams_and_is_causal(seed):
    layer, x = z.S4D(5, states=3), torch.randn(2, 9, 5)
    assert contracts.decodes_in_parallel(layer, layer.step, x)
    assert contracts.causal(layer, x)


# ------------------------------------------------------------------------------------------------------------ lmuformer


@pytest.mark.parametrize("order, window", [(1, 4), (4, 10), (12, 40)])
def test_lmuformer_memory_by_convolution_is_the_recurrence(seed, order, window):
    a, b = z.legendre_memory(order, window)
    u = torch.randn(1, 30, 1).double()
    h, states = torch.zeros(order).double(), []
    for t in range(30):
        h = a @ h + b * u[0, t]
        states.append(h)
    found = z.causal_convolution(u.expand(-1, -1, order), z.impulse_response(a, b, 30))
    assert torch.allclose(found[0], torch.stack(states), atol=1e-10)


def reconstruction_error(a, b, order, window):
    t = torch.arange(200).double()
    u = (t / 9).sin()
    m = z.causal_convolution(u[None, :, None].expand(1, -1, order), z.impulse_response(a, b, 200))[0, -1]
    back = z.legendre_readout(order, (torch.arange(window).double() + 0.5) / window) @ m
    return (back - u.flip(0)[:window]).abs().max()


@pytest.mark.parametrize("order, window", [(8, 40), (12, 64), (20, 80)])
def test_lmuformer_memory_reconstructs_its_window_and_a_wrong_sign_does_not(order, window):
    a, b = z.legendre_memory(order, window)
    assert reconstruction_error(a, b, order, window) < 0.03
    assert reconstruction_error(a, b.abs(), order, window) > 0.3


def test_lmuformer_readout_is_legendre():
    x = torch.rand(7, dtype=torch.double)
    table = z.legendre_readout(4, x)
    y = 2 * x - 1
    expected = torch.stack([torch.ones_like(y), y, (3 * y**2 - 1) / 2, (5 * y**3 - 3 * y) / 2], -1)
    assert torch.allclose(table, expected)
    assert z.legendre_readout(1, x).shape == (7, 1)


def test_lmuformer_streams(seed):
    unit, x = z.LegendreMemoryUnit(6, order=5, window=8), torch.randn(2, 13, 6)
    assert contracts.decodes_in_parallel(unit, unit.step, x)
    assert contracts.causal(z.lmuformer(3, 8, 4, order=5, window=8), torch.randn(2, 8, 3))


def test_lmuformer_errors():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        z.legendre_memory(0, 5)
    with pytest.raises(ValueError, match="got 0"):
        z.impulse_response(torch.eye(2), torch.ones(2), 0)


# ---------------------------------------------------------------------------------------------------------------- hyena


def hyena_by_matrices(v, gates, filters, skips):
    n = v.shape[1]
    age = torch.arange(n)[:, None] - torch.arange(n)
    out = torch.empty_like(v)
    for b in range(v.shape[0]):
        for c in range(v.shape[2]):
            result = v[b, :, c]
            for gate, kernel, skip in zip(gates, filters, skips, strict=True):
                toeplitz = torch.where(age >= 0, kernel[age.clamp_min(0), c], 0.0)
                result = gate[b, :, c] * (toeplitz @ result + skip[c] * result)
            out[b, :, c] = result
    return out


@pytest.mark.parametrize("order, n", [(1, 5), (2, 9), (3, 6)])
def test_hyena_is_diagonal_times_toeplitz(seed, order, n):
    v, *gates = torch.randn(order + 1, 2, n, 3).unbind(0)
    filters, skips = list(torch.randn(order, n, 3)), torch.randn(order, 3)
    found = z.hyena(v, gates, filters, skips)
    expected = hyena_by_matrices(v, gates, filters, skips)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(z.hyena(v, gates, filters, 0 * skips), expected, atol=1e-2)


def test_hyena_is_causal_and_ignores_padding(seed):
    layer, x = z.Hyena(8, length=12, order=3), torch.randn(2, 9, 8)
    assert contracts.causal(layer, x)
    real = torch.arange(9) < torch.tensor([[9], [6]])
    assert contracts.padding_invariant(lambda x, real: layer(x, mask=real[:, None, None]), x, real)


def test_hyena_filters_do_not_grow_and_end():
    sizes = {measure.parameters(z.ImplicitFilter(6, length)) for length in (8, 64, 512)}
    assert len(sizes) == 1
    with pytest.raises(ValueError, match="know 8 positions, got 9"):
        z.ImplicitFilter(6, 8)(9)
    with pytest.raises(ValueError, match="2 gates, 1 filters"):
        z.hyena(torch.ones(1, 2, 3), [torch.ones(1, 2, 3)] * 2, [torch.ones(2, 3)], torch.ones(2, 3))


def test_hyena_windows_fall_to_a_hundredth():
    filters = z.ImplicitFilter(5, length=10)
    with torch.no_grad():
        window = filters(10) / filters.network(filters.features)
    t = torch.arange(10) / 10
    assert torch.allclose(window[:, 0], 100 ** (-t / 1.5), atol=1e-4)
    assert torch.allclose(window[:, -1], 100 ** (-t / 0.3), atol=1e-4)
    assert abs(window[3, -1].item() - 0.01) < 1e-4


# ------------------------------------------------------------------------------------------------------ selective scan


def scan_inputs(n, dtype=torch.float32, channels=4, states=3):
    x, delta = torch.randn(2, n, channels, dtype=dtype), torch.rand(2, n, channels, dtype=dtype)
    b, c = torch.randn(2, 2, n, states, dtype=dtype).unbind(0)
    return x, delta, -torch.rand(channels, states, dtype=dtype), b.contiguous(), c.contiguous()


def selective_loop(x, delta, a, b, c):
    h, out = x.new_zeros(len(x), *a.shape), []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("n", [1, 2, 6, 16, 17, 50])
def test_selective_scan_equals_the_loop(seed, n):
    assert contracts.reduces_to(z.selective_scan, selective_loop, *scan_inputs(n))


@pytest.mark.parametrize("n", [1, 3, 5, 9])
def test_selective_scan_gradients_in_double_precision(n):
    torch.manual_seed(0)
    inputs = [*scan_inputs(n, torch.double, 2, 3), torch.randn(2).double(), torch.randn(2, 2, 3).double()]
    scan = lambda *given: z.selective_scan_from(given[6], *given[:6])
    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in inputs])


def test_selective_scan_goes_on_from_a_state(seed):
    x, delta, a, b, c = scan_inputs(17)
    h = torch.zeros(2, *a.shape)
    for t in range(7):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * x[:, t])[..., None] * b[:, t, None]
    rest = z.selective_scan(x[:, 7:], delta[:, 7:], a, b[:, 7:], c[:, 7:], state=h)
    assert torch.allclose(rest, z.selective_scan(x, delta, a, b, c)[:, 7:], atol=1e-5)


def test_selective_scan_keeps_few_states_for_training():
    x, delta, a, b, c = scan_inputs(400, channels=8, states=16)
    kept = measure.saved_bytes(lambda x: z.selective_scan(x, delta, a, b, c), x.requires_grad_())
    assert kept < delta.numel() * 16 * 4 / 2  # half of one tensor of all states


def test_kernels_agree():
    kernels = pytest.importorskip("kernels")
    if not kernels.HAS_TRITON:
        pytest.skip("Triton is not installed")
    from kernels.scan import linear_scan
    from kernels.selective_scan import selective_scan

    torch.manual_seed(0)
    inputs = [t.to(kernels.DEVICE) for t in scan_inputs(5, channels=2, states=2)]
    assert torch.allclose(selective_scan(*inputs), z.selective_scan(*inputs), atol=1e-5)
    decay, x = torch.rand(2, 5, 3, device=kernels.DEVICE), torch.randn(2, 5, 3, device=kernels.DEVICE)
    assert torch.allclose(linear_scan(decay, x), z.linear_scan(decay, x), atol=1e-5)


NAMES = {
    "embeddings.weight": "embed.table.weight",
    "norm_f.weight": "stack.norm.weight",
    "in_proj": "into",
    "conv1d": "convolve",
    "x_proj": "select",
    "dt_proj": "valve",
    "A_log": "log_a",
    "out_proj": "out",
    "mixer.D": "mixer.skip",
    "layers.": "stack.blocks.",
    ".mixer.": ".part.",
}


def renamed(name):
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("n", [1, 2, 11])
def test_mamba_equals_transformers(seed, n):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=30, hidden_size=24, state_size=5, num_hidden_layers=2, conv_kernel=4, residual_in_fp32=False
    )
    theirs = transformers.MambaModel(config).eval()
    ours = z.mamba(30, 24, 2, states=5).eval()
    contracts.copy_weights(theirs, ours, renamed)
    ids = torch.randint(30, (2, n))
    with torch.no_grad():
        hidden = theirs(ids, use_cache=False).last_hidden_state
        assert torch.allclose(ours.stack(ours.embed(ids)), hidden, atol=1e-5)
        assert torch.allclose(ours(ids), F.linear(hidden, theirs.embeddings.weight), atol=1e-4)
        ours.stack.blocks[0].part.skip.zero_()
        assert not torch.allclose(ours.stack(ours.embed(ids)), hidden, atol=1e-3)


def dual_loop(x, delta, a, b, c, state):
    outs = []
    for t in range(x.shape[1]):
        new = torch.einsum("bs,bhe->bhse", b[:, t], delta[:, t, :, None] * x[:, t])
        state = (delta[:, t] * a).exp()[..., None, None] * state + new
        outs.append(torch.einsum("bs,bhse->bhe", c[:, t], state))
    return torch.cat([torch.stack(outs, 1).flatten(1), state.flatten(1)], 1)


@pytest.mark.parametrize("n, chunk", [(1, 4), (7, 4), (16, 8), (37, None)])
def test_state_space_dual_is_its_recurrence(seed, n, chunk):
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    x, delta, a = random(2, n, 3, 5), random(2, n, 3).abs(), -random(3).exp()
    b, c, state = random(2, n, 4), random(2, n, 4), random(2, 3, 4, 5)
    ours = lambda *given: torch.cat([t.flatten(1) for t in z.state_space_dual(*given, chunk)], 1)
    assert contracts.reduces_to(ours, dual_loop, x, delta, a, b, c, state, atol=1e-8)
    fixed = lambda delta: ours(x, delta, a, b, c, state)
    assert not torch.allclose(fixed(delta), fixed(delta.mean(-1, keepdim=True).expand_as(delta)), atol=1e-3)


def mamba2_pair(n_heads=4):
    transformers = pytest.importorskip("transformers")
    code = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = transformers.Mamba2Config(
        hidden_size=32, num_heads=n_heads, head_dim=64 // n_heads, state_size=8, n_groups=1, expand=2, chunk_size=8,
        num_hidden_layers=1, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs, ours = code.Mamba2Mixer(config, 0).eval(), z.Mamba2Mixer(32, n_heads, states=8).eval()
    names = {"into.weight": "in_proj.weight", "convolve.weight": "conv1d.weight", "convolve.bias": "conv1d.bias",
             "valve": "dt_bias", "log_a": "A_log", "skip": "D", "norm.weight": "norm.weight",
             "out.weight": "out_proj.weight"}  # fmt: skip
    with torch.no_grad():
        for own, other in names.items():
            weight = theirs.get_parameter(other)
            weight.add_(0.1 * torch.randn_like(weight))
            ours.get_parameter(own).copy_(weight)
    return theirs, ours


@pytest.mark.parametrize("n, heads", [(1, 4), (5, 1), (21, 4)])
def test_mamba2_equals_transformers(seed, n, heads):
    theirs, ours = mamba2_pair(heads)
    x = torch.randn(2, n, 32)
    assert contracts.agree(ours, theirs, x)
    ours.skip.data.zero_()
    assert not contracts.agree(ours, theirs, x, atol=1e-3)


def test_mamba2_starts_with_slow_and_fast_heads():
    layer = z.Mamba2Mixer(16, 32)
    step, rate = F.softplus(layer.valve), layer.log_a.exp()
    assert 0.001 <= step.min() and step.max() <= 0.1 and 1 <= rate.min() and rate.max() <= 16
    with pytest.raises(ValueError, match="32.*5"):
        z.Mamba2Mixer(16, 5)


def test_gated_linear_attention_is_its_formula(seed):
    layer, x = z.GatedLinearAttention(16, 2).double(), torch.randn(2, 23, 16, dtype=torch.float64)
    heads = lambda t: t.unflatten(-1, (2, -1)).transpose(1, 2)
    q, k, v = heads(layer.to_q(x)), heads(layer.to_k(x)), heads(layer.to_v(x))
    alpha = heads(layer.to_fade(x).sigmoid() ** (1 / 16))
    assert q.shape == k.shape == alpha.shape == (2, 2, 23, 4) and v.shape == (2, 2, 23, 8)
    state, found = 0, []
    for t in range(23):
        state = alpha[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        read = (q[:, :, t, None] @ state)[:, :, 0] / 2
        found.append(read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight)
    y = torch.stack(found, 1).flatten(2) * F.silu(layer.to_gate(x))
    torch.testing.assert_close(layer(x), y @ layer.out.weight.T)
    assert alpha.min() > 0.8, "at first little is forgotten"
    with pytest.raises(ValueError, match="18.*4"):
        z.GatedLinearAttention(18, 2)


def test_mamba_is_causal(seed):
    assert contracts.causal(z.mamba(20, 16, 2, states=3), torch.randint(20, (2, 8)))


# ------------------------------------------------------------------------------------------------------------ decimamba


@pytest.mark.parametrize("n, layers", [(9, [0]), (20, [0, 2]), (33, [1])])
def test_decimamba_with_room_for_all_is_mamba(seed, n, layers):
    model, ids = z.mamba(20, 16, 3, states=3), torch.randint(20, (2, n))
    assert contracts.agree(z.decimamba(model, layers, base=4 * n), model, ids)
    assert z.decimamba(model, layers, base=4, least=2)(ids).shape[1] == max(2, 4 // 2 ** (len(layers) - 1)) + 1


@pytest.mark.parametrize("n, count, last", [(10, 4, 0), (10, 4, 3), (6, 9, 1), (5, 5, 0), (3, 2, 4)])
def test_decimamba_keeps_the_largest_in_order(seed, n, count, last):
    delta = torch.rand(3, n, 4)
    kept = z.important_tokens(delta, count, last)
    context = max(0, n - last)
    assert kept.shape == (3, min(count, context) + n - context)
    for row, scores in zip(kept.tolist(), delta.norm(dim=-1).tolist(), strict=True):
        best = sorted(range(context), key=lambda t: -scores[t])[:count]
        assert row == sorted(best) + list(range(context, n))


def test_decimamba_may_drop_tokens_with_delta_zero(seed):
    x, delta, a, b, c = scan_inputs(12)
    idle = torch.rand(12) < 0.4
    idle[-1] = False
    delta[:, idle] = 0.0
    kept = z.important_tokens(delta, int((~idle).sum()))
    shorter = z.selective_scan(*(z.take(t, kept) for t in (x, delta)), a, *(z.take(t, kept) for t in (b, c)))
    assert torch.allclose(shorter, z.take(z.selective_scan(x, delta, a, b, c), kept), atol=1e-5)
    delta[:, 0] = 1.0
    wrong = z.important_tokens(-delta + 0 * x, 3)
    assert wrong.shape == (2, 3)


def test_decimamba_that_drops_the_important_is_caught(seed):
    x, delta, a, b, c = scan_inputs(12)
    delta[:, 3:] = 0.0
    full = z.selective_scan(x, delta, a, b, c)[:, -1]
    for score, right in ((delta, True), (1 - delta, False)):
        kept = z.important_tokens(score, 6, last=1)
        parts = [z.take(t, kept) for t in (x, delta, b, c)]
        found = z.selective_scan(parts[0], parts[1], a, *parts[2:])[:, -1]
        assert torch.allclose(found, full, atol=1e-5) == right


def test_decimamba_errors():
    with pytest.raises(ValueError, match="got 0"):
        z.important_tokens(torch.rand(1, 4, 2), 0)


# ----------------------------------------------------------------------------------------------------------------- avey


def retrieve_by_loop(splits, top, query):
    """The same, split by split."""
    rows = []
    asked = query(splits)
    for b in range(len(splits)):
        for i in range(splits.shape[1]):
            scores = [z.maxsim(asked[b, i], splits[b, j : j + 1]).item() for j in range(i)]
            chosen = sorted(sorted(range(i), key=lambda j: -scores[j])[:top])
            best = max([scores[j] for j in chosen] + [1e-6])
            parts = [splits[b, j] * scores[j] / best for j in chosen]
            zeros = [torch.zeros_like(splits[b, i])] * (top - len(chosen))
            rows.append(torch.cat([*zeros, *parts, splits[b, i]]))
    return torch.stack(rows).unflatten(0, splits.shape[:2])


@pytest.mark.parametrize("g, top", [(1, 2), (5, 1), (6, 2), (4, 4), (5, 0)])
@pytest.mark.parametrize("query", [z.split_before, z.split_itself])
def test_avey_retrieval_equals_the_loop(seed, g, top, query):
    splits = torch.randn(2, g, 3, 16) + 0.5  # scores above zero
    found = z.retrieve(splits, top, query)
    assert found.shape == (2, g, 3 * (top + 1), 16)
    assert torch.allclose(found, retrieve_by_loop(splits, top, query), atol=1e-4)


def test_avey_maxsim_is_its_definition(seed):
    query, candidates = torch.randn(4, 6), torch.randn(3, 5, 6)
    expected = [sum(max(F.cosine_similarity(q, s, dim=0) for s in split) for q in query) for split in candidates]
    assert torch.allclose(z.maxsim(query, candidates), torch.stack(expected), atol=1e-5)
    splits = torch.randn(2, 4, 3, 6)
    pairs = torch.stack([z.maxsim(splits[:, i], splits) for i in range(4)], 1)
    assert torch.allclose(z.rank_splits(splits, splits), pairs, atol=1e-5)


@pytest.mark.parametrize("g", [1, 2, 5, 30])
def test_avey_ranks_only_earlier_splits(seed, g):
    queries, splits = torch.randn(2, 2, g, 3, 6).unbind(0)
    scores = z.rank_earlier(queries, splits)
    earlier = torch.ones(g, g, dtype=torch.bool).tril(-1)
    assert (scores[:, ~earlier] == -torch.inf).all()
    assert torch.allclose(scores[:, earlier], z.rank_splits(queries, splits)[:, earlier], atol=1e-5)


@pytest.mark.parametrize("last", [1, 4, 12])
def test_avey_processor_computes_only_the_last_outputs(seed, last):
    layer, x = z.NeuralProcessor(8, 12), torch.randn(3, 12, 8)
    assert contracts.reduces_to(lambda x: layer(x, last), lambda x: layer(x)[:, -last:], x)


@pytest.mark.parametrize("n, split, top", [(11, 4, 1), (16, 4, 2), (9, 3, 5)])
def test_avey_is_causal_and_the_released_query_is_not(seed, n, split, top):
    model, x = z.Avey(8, split, top, depth=2), torch.randn(2, n, 8)
    assert contracts.causal(model, x)
    model.query = z.split_itself
    assert not contracts.causal(model, torch.randn(4, 6 * split, 8)) or top >= 5


def test_avey_processor_is_its_formula(seed):
    layer, x = z.NeuralProcessor(6, 5, expand=4, share=0.5), torch.randn(2, 5, 6)
    rich = (x @ layer.enrich.weight.T + layer.enrich.bias).clamp_min(0) ** 2  # 24 features: 6 + 6 mixed, 12 bypass
    a, b, bypass = rich.split([6, 6, 12], -1)
    unit = a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    mixed = ((layer.mix.tril() * (unit @ unit.mT)) @ a) * b
    assert torch.allclose(layer(x), layer.fuse(torch.cat([mixed, bypass], -1)), atol=1e-5)


def test_avey_mixing_is_its_sum(seed):
    a, b, mix = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 5)
    expected = torch.zeros(5, 4)
    for i in range(5):
        for j in range(i + 1):
            expected[i] += mix[i, j] * F.cosine_similarity(a[i], a[j], dim=0) * a[j]
    assert torch.allclose(z.contextualize(a, b, mix), expected * b, atol=1e-5)


def test_avey_errors():
    with pytest.raises(ValueError, match="got -1"):
        z.retrieve(torch.randn(1, 3, 2, 4), -1)
    with pytest.raises(ValueError, match="got 0"):
        z.Avey(8, 0, 1)
    with pytest.raises(ValueError, match="depth 0"):
        z.Avey(8, 4, 1, depth=0)


# ------------------------------------------------------------------------------------------- in a real training run

LAYERS = {
    "s4d": lambda: z.S4D(16, states=3),
    "lmu": lambda: z.LegendreMemoryUnit(16, order=5, window=20),
    "hyena": lambda: z.Hyena(16, length=40, order=3),
    "mamba": lambda: z.MambaMixer(16, states=4),
    "mamba-2": lambda: z.Mamba2Mixer(16, 2, states=4),
    "gla": lambda: z.GatedLinearAttention(16, 2),
    "avey": lambda: z.Avey(16, split=4, top=2, depth=2),
}
# numbers kept of b texts after n tokens; S4D's are complex, Hyena keeps its inputs, Avey all tokens
KEPT = {
    "s4d": lambda b, n: b * 16 * 3,
    "lmu": lambda b, n: b * 5,
    "hyena": lambda b, n: b * (3 * 16 * n + 4 * 16 * min(n, 2)) + 1,
    "mamba": lambda b, n: b * (32 * 4 + 32 * min(n, 3)),
    "mamba-2": lambda b, n: b * (32 * 4 + (32 + 2 * 4) * min(n, 3)),
    "gla": lambda b, n: b * 2 * 4 * 8,
    "avey": lambda b, n: b * 16 * n,
}
layers = pytest.mark.parametrize("name", list(LAYERS))


@layers
@pytest.mark.parametrize("cuts", [[1, 3, 33], [20, 1, 1, 15]])
def test_a_text_in_pieces_is_the_whole_text_and_the_state_has_the_promised_size(name, cuts):
    torch.manual_seed(0)
    layer, x, n, pieces = LAYERS[name]().eval(), torch.randn(2, 37, 16), 0, []
    with torch.no_grad(), remember(layer) as past:
        for piece in x.split(cuts, 1):
            pieces.append(layer(piece))
            n += piece.shape[1]
            assert past.numbers() == KEPT[name](2, n)
    assert torch.allclose(torch.cat(pieces, 1), layer(x), atol=1e-5)


def test_a_classifier_streams():
    torch.manual_seed(0)
    model, x = z.lmuformer(3, 8, 4, order=5, window=8).eval(), torch.randn(2, 20, 3)
    with torch.no_grad(), remember(model):
        pieces = torch.cat([model(piece) for piece in x.split([1, 3, 16], 1)], 1)
    assert torch.allclose(pieces, model(x), atol=1e-5)


def test_a_state_carries_gradients():
    torch.manual_seed(0)
    layer, x = z.MambaMixer(8, states=3).double(), torch.randn(1, 9, 8, dtype=torch.double, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x)[:, 5:].square().sum(), x)
    with remember(layer):
        layer(x[:, :5])
        (found,) = torch.autograd.grad(layer(x[:, 5:]).square().sum(), x)
    assert torch.allclose(found, wanted) and wanted[:, :5].abs().max() > 1e-4


def test_mamba_writes_what_it_computes():
    torch.manual_seed(0)
    model, ids = z.mamba(20, 16, 2, states=4), torch.randint(20, (2, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    written, again = generate(model, ids, 12), ids
    for _ in range(12):
        again = torch.cat([again, model(again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, again)


def test_what_reads_the_whole_text_refuses_pieces():
    with pytest.raises(ValueError, match="whole text has been read"), remember(z.decimamba(z.mamba(9, 8, 1), [0], 4)):
        pass
    avey = z.Avey(8, 4, 1, query=z.split_itself)
    with pytest.raises(ValueError, match="later tokens"), remember(avey):
        pass
    avey.query, real = z.split_before, torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="cannot have padding"), remember(avey):
        avey(torch.randn(1, 3, 8), padding_mask(real))


@layers
def test_padding_anywhere_changes_nothing(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(2, 11, 16)
    real = torch.tensor([[True] * 11, [False] * 3 + [True] * 6 + [False] * 2])
    padded = lambda x, real: layer(x, mask=padding_mask(real))
    assert contracts.padding_invariant(padded, x, real)
    assert torch.allclose(padded(x, real)[1, 3:9], layer(x[1:, 3:9])[0], atol=1e-5)
    assert not torch.allclose(padded(x, real | True)[1, 3:9], layer(x[1:, 3:9])[0], atol=1e-3)
    assert padded(x, real & False).isfinite().all()


@layers
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, "autocast"], ids=["bf16", "fp16", "autocast"])
def test_sixteen_bits_stay_near(name, kind):
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(2, 37, 16, requires_grad=True)
    wanted = layer(x)
    (slope,) = torch.autograd.grad(wanted.square().sum(), x)
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    else:
        found = layer.to(kind)(x.to(kind))
    (other,) = torch.autograd.grad(found.float().square().sum(), x)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert (other - slope).norm() < 0.06 * slope.norm()


def test_a_state_in_sixteen_bits_does_not_wear_off():
    torch.manual_seed(0)
    layer, x = z.MambaMixer(16, states=4).bfloat16(), torch.randn(1, 60, 16).bfloat16()
    with torch.no_grad(), remember(layer):
        pieces = torch.cat([layer(piece) for piece in x.split(1, 1)], 1)
    assert (pieces - layer(x)).float().norm() < 0.01 * layer(x).float().norm()


@layers
def test_gradients_by_transform_equal_those_of_autograd(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(2, 13, 16)
    weights = dict(layer.named_parameters())
    loss = lambda weights, x: torch.func.functional_call(layer, weights, (x[None],)).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(2):
        found = torch.autograd.grad(loss(weights, x[i]), list(weights.values()))
        for slope, (key, wanted) in zip(found, each.items(), strict=True):
            assert torch.allclose(slope, wanted[i], rtol=1e-3, atol=1e-4), key


def test_scans_of_several_systems_at_once():
    torch.manual_seed(0)
    decay, x = torch.rand(3, 2, 7, 4), torch.randn(2, 7, 4)
    many = torch.func.vmap(z.linear_scan, (0, None))(decay, x)
    assert torch.allclose(many, torch.stack([loop(d, x) for d in decay]), atol=1e-5)
    x, delta, a, b, c = scan_inputs(7)
    many = torch.func.vmap(z.selective_scan, (None, None, 0, None, None))(x, delta, torch.stack([a, 2 * a]), b, c)
    assert torch.allclose(many[1], selective_loop(x, delta, 2 * a, b, c), atol=1e-5)
    with pytest.raises(NotImplementedError, match="once"):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(z.selective_scan(x, delta, a, b, c).square().sum(), x, create_graph=True)
        slope.sum().backward()


# ------------------------------------------------------------------------------------------------------ the whole table


@pytest.mark.parametrize("name", [n for n in z.mechanisms if n != "DeciMamba"])
def test_every_mechanism_is_a_causal_mixer(name):
    torch.manual_seed(0)
    layer, (x,) = z.mechanisms[name]()
    x = x[:1, :36]
    with torch.no_grad():
        before = layer.eval()(x)
        assert before.shape == x.shape
        changed = x.clone()
        changed[:, 20:] += 1.0
        assert torch.allclose(layer(changed)[:, :20], before[:, :20], atol=1e-4)
        assert math.isfinite(before.sum())


def test_decimated_block_shares_its_weights():
    block = PreNorm(z.MambaMixer(8, states=2), nn.RMSNorm(8))
    assert measure.parameters(nn.ModuleList([block, z.Decimated(block, 4)])) == measure.parameters(block)
