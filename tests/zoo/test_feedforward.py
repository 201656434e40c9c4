"""Chapter 07: feed-forward layers and activations."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfkit import contracts, measure
from tfkit.train import next_token_loss
from tfkit.zoo import feedforward as zoo
from tfkit.zoo.attention import MultiHeadAttention, attention, causal_attention
from tfkit.zoo.transformer import FeedForward, generate, remember, translate

SEEDS = (0, 1, 2)


@pytest.fixture(params=SEEDS)
def seed(request):
    torch.manual_seed(request.param)
    return request.param


def slope(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# ------------------------------------------------------------------------------------------------ activations and gates


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (zoo.gelu, F.gelu),
        (zoo.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
        (zoo.silu, F.silu),
        (zoo.squared_relu, lambda x: x.clamp(min=0) ** 2),
    ],
    ids=["gelu", "gelu_tanh", "silu", "squared_relu"],
)
def test_activations_equal_torch(seed, ours, theirs):
    x = 3 * torch.randn(4, 33, dtype=torch.float64)
    assert contracts.reduces_to(ours, theirs, x, atol=1e-10)
    assert not contracts.agree(lambda x: ours(1.01 * x), theirs, x)


@pytest.mark.parametrize("width, hidden", [(8, 12), (32, 7)])
def test_swiglu_equals_llama(seed, width, hidden):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = transformers.LlamaConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=2)
    theirs = LlamaMLP(config)
    ours = zoo.GatedFeedForward(width, hidden, bias=False)
    names = {f"{part}_proj.weight": f"{part}.weight" for part in ("gate", "up", "down")}
    contracts.copy_weights(theirs, ours, names)
    x = torch.randn(2, 5, width)
    assert contracts.agree(ours, theirs, x, atol=1e-5)
    ours.gate, ours.up = ours.up, ours.gate  # the bend on the wrong half
    assert not contracts.agree(ours, theirs, x, atol=1e-3)


@pytest.mark.parametrize("kind, bend", [("gelu", nn.GELU), ("relu", nn.ReLU)])
def test_gates_equal_llama_with_another_bend(kind, bend):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaMLP

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, hidden_act=kind, mlp_bias=True)
    theirs, ours = LlamaMLP(config), zoo.GatedFeedForward(8, 12, bend)
    contracts.copy_weights(theirs, ours, lambda name: name.replace("_proj", ""))
    assert contracts.agree(ours, theirs, torch.randn(3, 8), atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the whole Llama


@pytest.mark.parametrize(
    "make, total", [(zoo.llama_7b, 6_738_415_616), (zoo.llama_13b, 13_015_864_320), (zoo.llama_65b, 65_285_660_672)]
)
def test_llama_has_the_published_size(make, total):
    with torch.device("meta"):
        assert measure.parameters(make()) == total


def test_llama_starts_knowing_nothing(seed):
    """Normal weights of deviation 0.02, unit gains, and a first loss near ln V."""
    model = zoo.llama(500, 64, 2, 4, 172)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert abs(weight.std().item() / 0.02 - 1) < 5 / (2 * weight.numel()) ** 0.5, name
            assert abs(weight.mean().item()) < 0.02 * 5 / weight.numel() ** 0.5, name
    ids = torch.randint(500, (4, 33))
    assert abs(next_token_loss(model(ids[:, :-1]), ids[:, 1:]).item() - math.log(500)) < 0.05


def test_llama_turns_with_its_base(seed):
    """Attention in two lines of complex numbers: feature c with feature c + e / 2, speed base^(-2 c / e)."""
    layer, e, n = zoo.rotary_attention(24, 2, base=500.0), 12, 7
    x = torch.randn(1, n, 24)
    q, k, v = layer.project(x)
    turn = torch.polar(torch.ones(n, e // 2), torch.arange(n)[:, None] * 500.0 ** (-torch.arange(0, e, 2) / e))
    q, k = (torch.complex(t[..., : e // 2], t[..., e // 2 :]) * turn for t in (q, k))
    scores = (q @ k.mH).real * e**-0.5
    weights = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    expected = (weights @ v).transpose(1, 2).flatten(2) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert layer.to_qkv.bias is None and layer.to_out.bias is None
    assert not torch.allclose(zoo.rotary_attention(24, 2).attend(*layer.project(x)), layer.attend(*layer.project(x)))


def test_llama_takes_its_eps_and_mixer(seed):
    mixers = []

    def mixer():
        mixers.append(zoo.rotary_attention(16, 2))
        return mixers[-1]

    model = zoo.llama(20, 16, 3, 4, 24, mixer=mixer, eps=0.125)
    assert [block.mix.part for block in model.stack.blocks] == mixers
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    assert len(norms) == 7 and {norm.eps for norm in norms} == {0.125}


def test_llama_writes_with_an_exact_cache(seed):
    model, ids = zoo.llama(20, 16, 2, 2, 24), torch.randint(20, (2, 9))
    with remember(model):
        pieces = [model(ids[:, :4]), model(ids[:, 4:5], start=4), model(ids[:, 5:], start=5)]
    assert contracts.causal(model, ids)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("bias", [True, False])
def test_lora_is_its_formula_and_merges(seed, bias):
    linear, x = nn.Linear(6, 10, bias=bias), torch.randn(4, 3, 6)
    expected, weight = linear(x), linear.weight
    layer = zoo.LoRALinear(linear, 2, alpha=5.0)
    assert torch.equal(layer(x), expected) and layer.weight is weight
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"a", "b"}
    with torch.no_grad():
        layer.b.normal_()
    full = F.linear(x, weight + 2.5 * layer.b @ layer.a, linear.bias)
    torch.testing.assert_close(layer(x), full, atol=1e-5, rtol=1e-5)
    merged = layer.merged()
    assert type(merged) is nn.Linear and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged(x), full, atol=1e-5, rtol=1e-5)
    assert zoo.LoRALinear(nn.Linear(6, 10), 3).scale == 1.0
    large = zoo.LoRALinear(nn.Linear(400, 500), 300)
    assert abs(large.a.std().item() * 400**0.5 - 1) < 0.02 and not large.b.any()


def test_lora_learns_a_difference_of_its_rank(seed):
    model, ids = zoo.llama(20, 16, 2, 2, 24), torch.randint(20, (4, 9))
    start, before = copy.deepcopy(model), model(ids)
    assert zoo.lora_(model, 3, alpha=6.0) is model
    assert torch.equal(model(ids), before)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == 2 * 3 * ((16 + 48) + (16 + 16))
    optimizer = torch.optim.SGD(learned, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        next_token_loss(model(ids), ids.roll(-1, 1)).backward()
        optimizer.step()
    after = model(ids)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), after)
    zoo.merge_lora_(model)
    torch.testing.assert_close(model(ids), after, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == start.state_dict().keys()
    for (name, old), new in zip(start.state_dict().items(), model.state_dict().values(), strict=True):
        change = new - old
        if name.endswith(("to_qkv.weight", "to_out.weight")):
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) == 3, name
        else:
            assert not change.any(), name


def test_lora_refuses():
    with pytest.raises(ValueError, match="rank must be 1 to 6, got 7"):
        zoo.LoRALinear(nn.Linear(6, 10), 7)
    with pytest.raises(ValueError, match="no linear layer is called to_q or to_v"):
        zoo.lora_(zoo.llama(20, 16, 1, 2, 24), 2, where=("to_q", "to_v"))


def test_squared_relu_equals_transformers():
    activations = pytest.importorskip("transformers.activations")
    assert contracts.agree(zoo.SquaredReLU(), activations.ACT2FN["relu2"], torch.randn(5, 7))


@pytest.mark.parametrize("name", zoo.GATES)
def test_gates_are_local_and_matched(name):
    layer = zoo.GatedFeedForward(48, activation=zoo.GATES[name], bias=False)
    assert contracts.local(layer, torch.randn(1, 5, 48), window=0)
    assert measure.parameters(layer) == measure.parameters(FeedForward(48, bias=False))


# ------------------------------------------------------------------------------------------------------------- primer


def test_primer_squared_relu_is_homogeneous_of_degree_two(seed):
    x = torch.randn(100, dtype=torch.float64)
    c = torch.rand(1, dtype=torch.float64) * 5
    assert torch.allclose(zoo.squared_relu(c * x), c**2 * zoo.squared_relu(x))
    assert torch.allclose(slope(zoo.squared_relu, x), 2 * F.relu(x))
    assert not torch.allclose(F.gelu(c * x), c**2 * F.gelu(x))


@pytest.mark.parametrize("heads, width, size", [(1, 5, 3), (4, 8, 3), (2, 3, 5), (3, 2, 1)])
def test_primer_convolution_equals_a_loop(seed, heads, width, size):
    x, kernel = torch.randn(2, heads, 9, width), torch.randn(heads, width, size)
    y = torch.zeros_like(x)
    for t in range(9):
        for i in range(size):
            if (s := t - (size - 1) + i) >= 0:
                y[:, :, t] += kernel[..., i] * x[:, :, s]
    assert torch.allclose(zoo.causal_depthwise_conv(x, kernel), y, atol=1e-5)
    if size > 1:
        assert not torch.allclose(zoo.causal_depthwise_conv(x, kernel.flip(-1)), y, atol=1e-3)


def test_primer_convolution_equals_torch_conv1d(seed):
    x, kernel = torch.randn(2, 3, 11, 4), torch.randn(3, 4, 3)
    channels = F.pad(x.transpose(-1, -2).reshape(2, 12, 11), (2, 0))
    theirs = F.conv1d(channels, kernel.reshape(12, 1, 3), groups=12).view(2, 3, 4, 11).transpose(-1, -2)
    assert torch.allclose(zoo.causal_depthwise_conv(x, kernel), theirs, atol=1e-5)


def delta(layer):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.kernel.zero_()
        layer.kernel[..., -1] = 1
    return layer


@pytest.mark.parametrize("width, heads, head_width", [(16, 4, None), (12, 1, None), (10, 3, 8)])
def test_primer_with_a_delta_kernel_is_attention(seed, width, heads, head_width):
    layer = zoo.MultiDConvHeadAttention(width, heads, head_width)
    plain = MultiHeadAttention(width, heads, head_width, attend=causal_attention)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "kernel"})
    x = torch.randn(2, 7, width)
    assert contracts.reduces_to(delta(layer), plain, x)
    assert not contracts.agree(layer, plain, x, atol=1e-3)
    inner = heads * (head_width or width // heads)
    assert measure.parameters(layer) - measure.parameters(plain) == 9 * inner


@pytest.mark.parametrize("build", [zoo.primer_ez, zoo.primer_full])
def test_primer_is_causal_and_its_cache_exact(seed, build):
    model, ids = build(13, 16, 2, 4), torch.randint(13, (2, 9))
    assert contracts.causal(model, ids)
    with torch.no_grad():
        whole = model(ids)
        for pieces in ([1] * 9, [4, 1, 1, 3], [2, 7]):
            with remember(model):
                ends = torch.tensor(pieces).cumsum(0).tolist()
                found = [model(ids[:, e - p : e], start=e - p) for p, e in zip(pieces, ends, strict=True)]
            assert torch.allclose(torch.cat(found, 1), whole, atol=1e-5)
        assert torch.allclose(model(ids), whole, atol=1e-6), "nothing is left over from `remember`"
        longer = generate(model, ids[:, :2], 8)
        for t in range(2, 10):
            assert torch.equal(longer[:, t], model(longer[:, :t])[:, -1].argmax(-1))


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("kind, parts", [(zoo.MultiDConvHeadAttention, 3), (zoo.SharedQKAttention, 2)])
def test_primer_convolution_starts_at_the_token_itself(kind, parts, size):
    """Half for the newest tap, which is the token's own, 1 / (2 k) for each older one: so it says, and so it acts."""
    layer = kind(8, 2, kernel_size=size)
    assert layer.kernel.shape == (parts * 2, 4, size)
    assert (layer.kernel[..., -1] == 0.5).all() and (layer.kernel[..., :-1] == 0.5 / size).all()
    impulse = torch.zeros(1, parts * 2, 6, 4)
    impulse[:, :, 1] = 1.0  # the response follows the token, newest tap first
    response = layer.convolve(impulse)[0, 0, :, 0]
    expected = [0.0, 0.5] + [0.5 / size] * (size - 1) + [0.0] * (5 - size)
    assert torch.allclose(response, torch.tensor(expected)[:6])


def test_primer_full_normalizes_what_its_feedforward_writes(seed):
    """x + attention(norm(x)), then x + norm(feedforward(x)): the norm stands before the one and behind the other."""
    model = zoo.primer_full(20, 16, 2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = model.embed(torch.randint(20, (2, 7)))
    expected = x
    for block in model.stack.blocks:
        attend, feed = block.mix, block.feed
        expected = expected + attend.part(attend.norm(expected))
        squared = F.relu(feed.part.up(expected)).square()
        expected = expected + feed.norm(feed.part.down(squared))
    torch.testing.assert_close(model.stack(x), model.stack.norm(expected), atol=1e-5, rtol=1e-5)


def test_primer_cache_without_memory_of_the_convolution_is_caught():
    class Forgetful(zoo.MultiDConvHeadAttention):
        def convolve(self, raw, mask=None):
            return zoo.causal_depthwise_conv(raw, self.kernel)

    layer, x = Forgetful(16, 4), torch.randn(2, 6, 16)
    with torch.no_grad(), remember(layer):
        pieces = torch.cat([layer(x[:, t : t + 1]) for t in range(6)], 1)
    assert not torch.allclose(pieces, layer(x), atol=1e-3)


def test_primer_with_a_centered_convolution_is_caught():
    class Centered(zoo.MultiDConvHeadAttention):
        def convolve(self, raw, mask=None):
            return zoo.causal_depthwise_conv(raw.roll(-1, 2), self.kernel)

    assert not contracts.causal(Centered(16, 4), torch.randn(2, 6, 16))


def test_primer_norm_is_layer_norm(seed):
    x = 3 * torch.randn(5, 24, dtype=torch.float64) + 1
    centered = x - x.mean(-1, keepdim=True)
    ours = centered / ((x * centered).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(ours, F.layer_norm(x, (24,), eps=1e-6))


def test_primer_shares_queries_and_keys(seed):
    layer, x = zoo.SharedQKAttention(16, 4), torch.randn(2, 5, 16)
    with torch.no_grad():
        layer.to_q.weight.copy_(torch.eye(16))
    q, k, _ = layer.project(x)
    assert torch.allclose(q, k)
    assert layer.to_qkv.out_features == 2 * 16 and layer.kernel.shape == (8, 4, 3)
    part = zoo.NormOutput(nn.Linear(16, 16), nn.LayerNorm(16))
    assert torch.allclose(part(x), x + part.norm(part.part(x)))


# ------------------------------------------------------------------------------------------------------------ polycom


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_polycom_equals_the_sum_of_powers(seed, degree):
    x, a = torch.randn(3, 8, dtype=torch.float64), torch.randn(degree + 1, dtype=torch.float64)
    assert torch.allclose(zoo.poly_relu(x, a), sum(w * F.relu(x) ** i for i, w in enumerate(a)))
    b = torch.randn((), dtype=torch.float64)
    powers = [x ** (i + 1) for i in range(degree)]
    normed = [p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt() for p in powers]
    expected = b + sum(w * p for w, p in zip(a[:-1], normed, strict=True))
    assert torch.allclose(zoo.poly_norm(x, a[:-1], b), expected)


def test_polycom_special_cases(seed):
    x, one = torch.randn(4, 9, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert contracts.reduces_to(lambda x: zoo.poly_relu(x, one[1]), F.relu, x)
    assert contracts.reduces_to(lambda x: zoo.poly_relu(x, one[2]), zoo.squared_relu, x)
    assert not contracts.agree(lambda x: zoo.poly_relu(x, one[3]), zoo.squared_relu, x)


def test_polycom_norm_equals_the_released_form(seed):
    layer = zoo.PolyNorm()
    with torch.no_grad():
        layer.weights.normal_(), layer.bias.normal_()
    cube_first = layer.weights.flip(0)

    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def released(x):
        return cube_first[0] * norm(x**3) + cube_first[1] * norm(x**2) + cube_first[2] * norm(x) + layer.bias

    x = torch.randn(2, 5, 16)
    assert contracts.reduces_to(layer, released, x)
    assert torch.allclose(zoo.PolyNorm().weights, torch.full((3,), 1 / 3))
    assert torch.allclose(zoo.PolyReLU().weights, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("scale", [0.01, 7.0, 1e4])
def test_polycom_norm_ignores_scale(seed, scale):
    x, a = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    f = lambda x: zoo.poly_norm(x, a, torch.zeros((), dtype=x.dtype), eps=0.0)
    assert contracts.agree(lambda x: f(scale * x), f, x, atol=1e-12)
    assert not contracts.agree(lambda x: f(-scale * x), f, x, atol=1e-3), "odd powers change sign"
    wrong = lambda x: zoo.poly_relu(x, a)
    assert not contracts.agree(lambda x: wrong(scale * x), wrong, x, atol=1e-3)


def test_polycom_four_units_multiply(seed):
    net = FeedForward(2, 4, zoo.PolyReLU, bias=False)
    with torch.no_grad():
        net.up.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]))
        net.down.weight.copy_(torch.tensor([0.25, 0.25, -0.25, -0.25]).expand(2, 4))
        net.activation.weights.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    x = torch.randn(50, 2)
    assert torch.allclose(net(x)[:, 0], x.prod(-1), atol=1e-5)


@pytest.mark.parametrize("layer", [zoo.PolyReLU, zoo.PolyNorm])
def test_polycom_refuses_degree_zero(layer):
    with pytest.raises(ValueError, match="got 0"):
        layer(0)


# -------------------------------------------------------------------------------------------------------- vikanformer


@pytest.mark.parametrize("low, high, intervals", [(-3.0, 3.0, 5), (0.0, 1.0, 1), (-1.5, 4.0, 12)])
def test_vikanformer_splines_equal_scipy(low, high, intervals):
    interpolate = pytest.importorskip("scipy.interpolate")
    h = (high - low) / intervals
    x = torch.linspace(low, high, 200, dtype=torch.float64)[1:-1]
    knots = low + h * torch.arange(-3, intervals + 4, dtype=torch.float64)
    theirs = interpolate.BSpline.design_matrix(x.numpy(), knots.numpy(), 3).toarray()
    ours = zoo.cubic_splines(x, low, high, intervals)
    assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-10)
    assert torch.allclose(ours.sum(-1), torch.ones(198, dtype=torch.float64))
    far = zoo.cubic_splines(torch.tensor([low - 3.1 * h, high + 3.1 * h]), low, high, intervals)
    assert not far.any()


def test_vikanformer_splines_refuse_bad_grids():
    with pytest.raises(ValueError, match="3.0, -3.0, 5"):
        zoo.cubic_splines(torch.zeros(2), 3.0, -3.0, 5)
    with pytest.raises(ValueError, match="3.0, 0"):
        zoo.cubic_splines(torch.zeros(2), -3.0, 3.0, 0)


@pytest.mark.parametrize("make", [zoo.spline_kan, zoo.fast_kan, zoo.sine_kan, zoo.fourier_kan])
@pytest.mark.parametrize("inputs, outputs", [(3, 5), (6, 1)])
def test_vikanformer_layer_is_a_sum_of_curves(seed, make, inputs, outputs):
    layer, x = make(inputs, outputs), torch.randn(2, 4, inputs)
    bumps = layer.basis(x)
    assert bumps.shape == (2, 4, inputs, layer.basis.size)
    curves = torch.einsum("bnig,oig->bnoi", bumps, layer.coefficients)
    base = 0 if layer.base is None else layer.base(x)
    assert torch.allclose(layer(x), curves.sum(-1) + layer.bias + base, atol=1e-5)


def test_vikanformer_curves_do_not_mix_inputs(seed):
    """The effect of one input does not depend on the others, unlike in a plain feed-forward."""

    def mixed(f):
        a, b = torch.randn(2, 20, 4)
        ab, ba = a.clone(), b.clone()
        ab[:, 0], ba[:, 0] = b[:, 0], a[:, 0]
        return (f(a) + f(b) - f(ab) - f(ba)).abs().max()

    assert mixed(zoo.spline_kan(4, 3)) < 1e-5 and mixed(zoo.fourier_kan(4, 3)) < 1e-5
    assert mixed(FeedForward(4)) > 1e-3


@pytest.mark.parametrize("intervals, factor", [(3, 2), (5, 3), (4, 4), (1, 2)])
def test_vikanformer_refinement_is_exact_inside_the_grid(seed, intervals, factor):
    layer = zoo.spline_kan(3, 4, intervals).double()
    finer = zoo.refine(layer, factor * intervals)
    inside = torch.rand(200, 3, dtype=torch.float64) * 6 - 3
    assert contracts.agree(finer, layer, inside, atol=1e-9)
    assert finer.basis.size == factor * intervals + 3 and finer.base is not layer.base
    with torch.no_grad():
        finer.coefficients[..., 1] += 0.01
    assert not contracts.agree(finer, layer, inside, atol=1e-5)


def test_vikanformer_refinement_is_knot_insertion(seed):
    layer = zoo.KANLayer(1, 1, zoo.SplineBasis(5)).double()
    c = layer.coefficients.detach()[0, 0]
    fine = c.new_empty(13)
    fine[0::2], fine[1::2] = (c[:-1] + c[1:]) / 2, (c[:-2] + 6 * c[1:-1] + c[2:]) / 8
    assert torch.allclose(zoo.refine(layer, 10).coefficients[0, 0], fine, atol=1e-9)


def test_vikanformer_refinement_to_other_grids_is_not_exact(seed):
    layer = zoo.spline_kan(2, 2, 5).double()
    assert not contracts.agree(zoo.refine(layer, 7), layer, torch.rand(200, 2, dtype=torch.float64) * 6 - 3, atol=1e-4)


def test_vikanformer_refinement_refuses():
    with pytest.raises(ValueError, match="4 intervals are fewer than 5"):
        zoo.refine(zoo.spline_kan(2, 2), 4)
    with pytest.raises(ValueError, match="FourierBasis"):
        zoo.refine(zoo.fourier_kan(2, 2), 8)


def test_vikanformer_bumps(seed):
    x = torch.randn(2, 3, 6)
    fourier = zoo.FourierBasis(3)
    assert torch.allclose(fourier(x + 2 * math.pi), fourier(x), atol=1e-4)
    cosine, sine = fourier(x).split(3, -1)
    assert torch.allclose(cosine.square() + sine.square(), torch.ones(2, 3, 6, 3), atol=1e-5)
    sine = zoo.SineBasis(6, 4)
    assert torch.allclose(sine(x)[..., 2], torch.sin(x * sine.frequency[2] + sine.phase[:, 2]), atol=1e-6)
    radial = zoo.RadialBasis(6, 5)
    at_centers = torch.exp(-((radial.norm(x)[..., None] - torch.linspace(-2, 2, 5)) ** 2))
    assert torch.allclose(radial(x), at_centers, atol=1e-5), "with five centers the width is one"


@pytest.mark.parametrize("width, size", [(5, 8), (3, 2)])
def test_vikanformer_sines_by_their_formula(seed, width, size):
    """sin(w_g x_i + p_ig) with w_g = g / (G + 1) and p_ig = pi i / (d - 1) + g / (G + 1), g = 1 .. G."""
    basis, x = zoo.SineBasis(width, size), torch.randn(4, width)
    for i in range(width):
        for g in range(1, size + 1):
            phase = math.pi * i / (width - 1) + g / (size + 1)
            expected = torch.sin(x[:, i] * g / (size + 1) + phase)
            torch.testing.assert_close(basis(x)[:, i, g - 1], expected, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in basis.named_parameters()] == ["frequency"]
    with torch.no_grad():
        basis.frequency.mul_(2)
    assert not torch.allclose(basis(x)[:, 0, 0], torch.sin(x[:, 0] / (size + 1) + 1 / (size + 1)), atol=1e-2)


def test_vikanformer_classifier():
    model = zoo.kan_classifier(4, 4, 16)
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    tokens = model.tokens(torch.arange(64.0).reshape(1, 1, 8, 8))
    assert tokens[0, 1, :5].tolist() == [4, 5, 6, 7, 12], "the second patch is to the right of the first"
    with pytest.raises(ValueError, match=r"\(9, 8\) does not divide into patches of 4"):
        model(torch.rand(1, 1, 9, 8))


# ------------------------------------------------------------------------------------------------------ partialformer


def without_parts(layer):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.to_gate.weight.zero_(), layer.to_gate.bias.fill_(1.0)
        layer.feedforward.down.weight.zero_(), layer.feedforward.down.bias.zero_()
    return layer


@pytest.mark.parametrize("width, heads, head_width, ratio", [(12, 3, None, 4), (10, 4, 5, 2), (8, 1, 8, 1)])
def test_partialformer_without_parts_is_attention(seed, width, heads, head_width, ratio):
    layer = zoo.PartialAttention(width, heads, head_width, ratio)
    plain = MultiHeadAttention(width, heads, head_width)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    x = torch.randn(2, 6, width)
    assert contracts.reduces_to(without_parts(layer), plain, x)
    assert not contracts.agree(layer, plain, x, atol=1e-3)
    e = layer.head_width
    formula = 4 * (width + 1) * heads * e + (heads * e + 1) * width + 2 * ratio * e * e + (ratio + 1) * e
    assert measure.parameters(layer) == formula


def test_partialformer_written_out(seed):
    layer, x = zoo.PartialAttention(8, 2), torch.randn(1, 5, 8)
    bias = torch.randn(1, 2, 5, 5)
    q, k, v = layer.project(x)
    parts = []
    for h in range(2):
        y = (q[0, h] @ k[0, h].T / 2 + bias[0, h]).softmax(-1) @ v[0, h]
        parts.append(y + layer.feedforward(y))
    expected = layer.to_out(torch.cat(parts, -1) * F.relu(layer.to_gate(x[0])))
    assert torch.allclose(layer(x, bias=bias)[0], expected, atol=1e-5)


def test_partialformer_heads_share_their_feedforward(seed):
    feed = FeedForward(4, 8, nn.ReLU)
    heads, gate = torch.randn(2, 3, 5, 4), torch.randn(2, 5, 12)
    order = [2, 0, 1]
    a = zoo.gated_parts(heads, gate, feed).unflatten(-1, (3, 4))[:, :, order]
    b = zoo.gated_parts(heads[:, order], gate.unflatten(-1, (3, 4))[:, :, order].flatten(2), feed)
    assert torch.allclose(a.flatten(2), b, atol=1e-6)


def test_partialformer_global_scores_reach_every_layer(seed):
    encoder, x = zoo.PartialEncoder(12, 3, 3), torch.randn(2, 6, 12)
    seen = []
    for layer in encoder.layers:
        layer.part.attend = lambda q, k, v, mask=None, bias=None: seen.append(bias) or attention(q, k, v, mask, bias)
    encoder(x)
    q, k = encoder.scores.to_qk(encoder.scores.norm(x)).unflatten(-1, (2, 3, 4)).permute(2, 0, 3, 1, 4)
    expected = torch.einsum("bhie,bhje->bhij", q, k) / 2
    assert len(seen) == 3 and all(torch.allclose(s, expected, atol=1e-5) for s in seen)


def test_partialformer_is_blind_to_padding_and_future(seed):
    encoder = zoo.PartialEncoder(12, 2, 3)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    masked = lambda x, real: encoder(x, mask=real[:, None, None])
    assert contracts.padding_invariant(masked, torch.randn(2, 6, 12), real)
    assert not contracts.padding_invariant(lambda x, real: encoder(x), torch.randn(2, 6, 12), real)
    causal = zoo.PartialAttention(12, 3, attend=causal_attention)
    assert contracts.causal(causal, torch.randn(2, 6, 12))
    assert not contracts.causal(zoo.PartialAttention(12, 3), torch.randn(2, 6, 12))


def test_partialformer_translates_with_an_exact_cache(seed):
    model = zoo.partial_translator(9, 11, 16, 2, 4)
    source, real = torch.randint(1, 9, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    found = translate(model, source, start=1, end=2, steps=6, real=real)
    with torch.no_grad():
        for t in range(1, found.shape[1]):
            wanted = model(source, found[:, :t], real=real)[:, -1].argmax(-1)
            ended = (found[:, 1:t] == 2).any(1)
            assert torch.equal(found[:, t][~ended], wanted[~ended])


# ---------------------------------------------------------------------------------------------------------- activator


@pytest.mark.parametrize("width, hidden", [(8, None), (6, 5)])
def test_activator_unit_written_out(seed, width, hidden):
    unit, x = zoo.ActivatorUnit(width, hidden), torch.randn(2, 4, width)
    with torch.no_grad():
        unit.norm.weight.normal_(), unit.norm.bias.normal_()

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], unit.norm.weight, unit.norm.bias)

    assert torch.allclose(unit(x), unit.down(norm(F.gelu(unit.gate(x))) * norm(unit.up(x))), atol=1e-5)
    assert measure.parameters(unit) == 3 * width * (hidden or 2 * width) + 4 * (hidden or 2 * width) + width
    unnormed = unit.down(F.gelu(unit.gate(x)) * unit.up(x))
    assert not torch.allclose(unit(x), unnormed, atol=1e-2)


@pytest.mark.parametrize("build", [zoo.activator_classifier, zoo.activator_only])
def test_activator_is_a_bag_of_patches(seed, build):
    model = build(2, 12, 2)
    assert contracts.local(model.stack, torch.randn(1, 7, 12), window=0)
    patches = model.tokens(torch.rand(3, 1, 8, 8))
    order = torch.randperm(16)
    assert torch.allclose(model.read(patches[:, order]), model.read(patches), atol=1e-5)
    placed = zoo.kan_classifier(2, 16, 12, feedforward=FeedForward)
    assert not torch.allclose(placed.read(patches[:, order]), placed.read(patches), atol=1e-4)


def test_activator_work_is_linear_in_tokens():
    sizes = [32, 64, 128, 256]
    work = [measure.flops(zoo.ActivatorUnit(16), torch.randn(1, n, 16)) for n in sizes]
    assert work == [work[0] * n // 32 for n in sizes]
    quadratic = [measure.flops(MultiHeadAttention(16, 4), torch.randn(1, n, 16)) for n in sizes]
    assert measure.growth(sizes, quadratic).exponent > 1.2


@pytest.mark.parametrize("name", zoo.mechanisms)
def test_mechanisms_for_the_benchmark(name):
    module, inputs = zoo.mechanisms[name]()
    assert [tuple(x.shape) for x in inputs] == [(4, 128, 64)]
    assert module(*inputs).shape == (4, 128, 64)
