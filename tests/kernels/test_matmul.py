"""matmul: forward and backward against plain torch, every activation, stride and edge; and broken copies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels.int8_matmul as int8
import kernels.linear_cross_entropy as loss
import kernels.matmul as module
from kernels import INTERPRET
from kernels._compile import TARGETS
from kernels.matmul import ACTIVATIONS, Linear, matmul, product, reference

SIZES = [(1, 1, 1), (7, 63, 65), (65, 130, 7), (130, 1, 63), (64, 128, 64)]


def draw(device, *shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 by 16 by 16, so that a small product has many (interpreter only; on a GPU the tiles are tuned)."""
    if not INTERPRET:
        pytest.skip("on a GPU the tiles are tuned")
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        monkeypatch.setitem(module._product.configs[0].kwargs, name, 16)


@pytest.mark.parametrize("m, n, k", SIZES)
def test_product(m, n, k, device, as_exact_as_torch):
    as_exact_as_torch(matmul, reference, *draw(device, (m, k), (k, n)), wrt=(0, 1))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_bias_and_activation(activation, device, as_exact_as_torch):
    inputs = *draw(device, (35, 65), (65, 40), (40,)), activation
    as_exact_as_torch(matmul, reference, *inputs, wrt=(0, 1, 2))


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, activation, device, as_exact_as_torch):
    inputs = *draw(device, (66, 200), (200, 35), (35,), dtype=dtype), activation
    as_exact_as_torch(matmul, reference, *inputs, wrt=(0, 1, 2))


def test_many_tiles_in_grouped_order(device, as_exact_as_torch, small):
    as_exact_as_torch(matmul, reference, *draw(device, (81, 40), (40, 50)), wrt=(0, 1))  # 6 by 4 tiles, 3 steps


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "tiles", [module.TILES, int8.TILES, loss.FORWARD_TILES, loss.SLOPE_TILES], ids=["matmul", "int8", "loss", "slope"]
)
def test_tuning_tries_what_fits_and_something_always_does(tiles, dtype, monkeypatch):
    """Whatever the size, the type and the GPU: pruning leaves configurations, and all fit into its shared memory."""
    configs, pair = module.configurations(tiles), torch.empty(2, 1, dtype=dtype)
    for limit, _ in TARGETS.values():
        monkeypatch.setattr("kernels._runtime.limits", lambda index=None, limit=limit: (limit, 1, None))
        for m in (1, 16, 33, 64, 100, 5000):
            for n in (1, 40, 100, 5000):
                left = module.fitting(configs, {"A": pair[0], "B": pair[1], "m": m, "n": n})
                used = [(c.kwargs["BLOCK_M"] + c.kwargs["BLOCK_N"]) * c.kwargs["BLOCK_K"] * c.num_stages for c in left]
                assert 0 < max(used) * dtype.itemsize <= limit, (m, n)


def test_tuning_key(device):
    """The same for sizes between the same powers of two; another for another layout."""
    keys = [module.tuning_key(*draw(device, (m, 64), (64, 32))) for m in (65, 100, 128, 129)]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    a, b = draw(device, (64, 64), (64, 32))
    assert len({module.tuning_key(*pair) for pair in ((a, b), (a.t(), b), (a, b.t().contiguous().t()))}) == 3
    huge = torch.empty(2**20, 2**20, device="meta")
    assert all(key % 16 == 0 and key < 2**31 for key in (*keys, module.tuning_key(huge, huge)))


def test_grouped_order_visits_every_tile_once(device):
    @module.jit
    def visit(OUT, m, n, BLOCK: module.tl.constexpr, GROUP: module.tl.constexpr):
        i, j = module.tile_of(module.tl.program_id(0), m, n, BLOCK, BLOCK, GROUP)
        module.tl.store(OUT + i * module.tl.cdiv(n, BLOCK) + j, module.tl.program_id(0))

    out = torch.full((5, 3), -1, dtype=torch.int32, device=device)
    visit[(15,)](out, 65, 48, BLOCK=16, GROUP=2)
    assert out.tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11], [12, 13, 14]]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradcheck(activation, gradcheck):
    a, b, bias = (x.requires_grad_() for x in draw("cpu", (3, 4), (4, 5), (5,), dtype=torch.float64))
    assert gradcheck(lambda a, b, bias: matmul(a, b, bias, activation), a, b, bias)


@pytest.mark.parametrize("view", ["transposed a", "transposed b", "both", "every second", "expanded", "permuted batch"])
def test_any_strides(view, device):
    a, b, other = draw(device, (24, 20), (20, 12), (5, 24, 20))
    a, b = {
        "transposed a": (a.t().contiguous().t(), b),
        "transposed b": (a, b.t().contiguous().t()),
        "both": (a.t().contiguous().t(), b.t().contiguous().t()),
        "every second": (a[::2, ::2], b[::2, 1::2]),
        "expanded": (a[:1].expand(9, 20), b[:, :1].expand(20, 7)),
        "permuted batch": (other.permute(1, 0, 2), b),
    }[view]
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    (weight,) = draw(device, (*a.shape[:-1], b.shape[1]), seed=1)
    weight = weight.transpose(0, -1).contiguous().transpose(0, -1)  # the gradient that arrives has odd strides too
    found = torch.autograd.grad(matmul(a, b), (a, b), weight)
    wanted = torch.autograd.grad(a @ b, (a, b), weight)
    torch.testing.assert_close(matmul(a, b), a @ b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradient_of_a_sum_is_expanded(activation, device):
    a, b = (x.requires_grad_() for x in draw(device, (2, 3, 8), (8, 5)))
    found = torch.autograd.grad(matmul(a, b, activation=activation).sum(), (a, b))
    wanted = torch.autograd.grad(reference(a, b, activation=activation).sum(), (a, b))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 8), (2, 3, 4, 8)], ids=str)
def test_leading_dimensions_become_rows(shape, device):
    a, b, bias = draw(device, shape, (8, 5), (5,))
    torch.testing.assert_close(matmul(a, b, bias), a @ b + bias)


@pytest.mark.parametrize("m, n, k", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty(m, n, k, device):
    a, b, bias = (x.requires_grad_() for x in draw(device, (2, m, k), (k, n), (n,)))
    y = matmul(a, b, bias, "gelu")
    torch.testing.assert_close(y, reference(a, b, bias, "gelu"))
    found = torch.autograd.grad(y.sum(), (a, b, bias))
    torch.testing.assert_close(found, torch.autograd.grad(reference(a, b, bias, "gelu").sum(), (a, b, bias)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_stay_finite(activation, device):
    x = torch.tensor([[-1e30, -1e4, -200.0, -9.0, 0.0, 9.0, 1e4, 1e30]], device=device).t().requires_grad_()
    one = torch.ones(1, 1, device=device)
    found, wanted = matmul(x, one, activation=activation), ACTIVATIONS[activation](x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(slope, (x > 0).float() + 0.5 * (x == 0) * (activation != "relu"), atol=2e-3, rtol=0)


def test_nan_is_not_hidden(device):
    x = torch.tensor([[float("nan"), 1.0]], device=device)
    for activation in (None, *ACTIVATIONS):
        assert matmul(x.t(), torch.ones(1, 1, device=device), activation=activation).isnan().tolist() == [
            [True],
            [False],
        ]


def test_add_to_a_wider_sum(device):
    a, b, total = draw(device, (20, 30), (30, 40), (20, 40))
    wanted = total + a @ b
    assert product(a, b, add_to=total) is total
    torch.testing.assert_close(total, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation, kept", [(None, 0), ("relu", 1), ("gelu", 1), ("silu", 1)])
def test_what_is_kept_for_backward(activation, kept, device):
    a, b = (x.requires_grad_() for x in draw(device, (6, 7), (7, 8)))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        matmul(a, b, activation=activation)
    assert sorted(sizes) == sorted([42, 56] + [48] * kept)
    with torch.no_grad():
        assert matmul(a, b, activation=activation).grad_fn is None


def test_only_the_gradients_that_are_asked_for(device, monkeypatch):
    a, b = draw(device, (6, 7), (7, 8))
    y = matmul(a.requires_grad_(), b)
    launches = []
    monkeypatch.setattr(module, "product", lambda *args: launches.append(1) or product(*args))
    y.sum().backward()
    assert len(launches) == 1 and b.grad is None


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_takes_the_place_of_nn_linear(activation, device):
    torch.manual_seed(0)
    theirs = nn.Linear(12, 20).to(device)
    ours = Linear(12, 20, activation=activation).to(device)
    ours.load_state_dict(theirs.state_dict())
    (x,) = draw(device, (2, 5, 12))
    found, wanted = ours(x), theirs(x) if activation is None else F.gelu(theirs(x), approximate="tanh")
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    assert ("gelu" in repr(ours)) == (activation is not None)


def test_linear_without_bias(device):
    layer = Linear(3, 4, bias=False, device=device)
    (x,) = draw(device, (5, 3))
    torch.testing.assert_close(layer(x), x @ layer.weight.t())


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        ((3, 4), (5, 6), {}, r"\(3, 4\) and b \(5, 6\)"),
        ((3, 4), (2, 4, 6), {}, r"\(2, 4, 6\)"),
        ((), (4, 6), {}, r"a \(\)"),
        ((3, 4), (4, 6), {"bias": torch.zeros(4)}, r"bias is \(4,\).*\(6,\)"),
        ((3, 4), (4, 6), {"activation": "tanh"}, "'tanh'; it must be None or relu, gelu, silu"),
        ((3, 4), (4, 6), {"bias": torch.zeros(6, dtype=torch.float16)}, "bias is torch.float16"),
    ],
)
def test_bad_arguments(a, b, options, message, device):
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=message):
        matmul(*draw(device, a, b), **options)


def test_more_bad_arguments(device):
    with pytest.raises(ValueError, match="'mish'"):
        Linear(3, 4, activation="mish")
    with pytest.raises(ValueError, match="int64"):
        matmul(torch.ones(2, 2, dtype=torch.int64, device=device), torch.ones(2, 2, device=device))


MUTANTS = {
    "no mask along k": ("tl.load(a, mask=inner[None, :] < k - start, other=0.0)", "tl.load(a)"),
    "both masks say nothing": (
        'lambda arguments: arguments["k"] % arguments["BLOCK_K"] == 0',
        "lambda arguments: True",
    ),
    "b does not move on": ("b += tl.cast(bk, tl.int64) * BLOCK_K", "b += 0"),
    "b moves by the wrong stride": ("b += tl.cast(bk, tl.int64) * BLOCK_K", "b += tl.cast(bn, tl.int64) * BLOCK_K"),
    "sum in half precision": ("out_dtype=ACC)", "out_dtype=ACC).to(tl.float16).to(ACC)"),
    "last group too high": ("height = tl.minimum(tiles_m - group * GROUP, GROUP)", "height = GROUP"),
    "no bias": (".to(ACC)[None, :]\n    if PRE", ".to(ACC)[None, :] * 0\n    if PRE"),
    "columns not masked at the store": (
        "inside = (row < m)[:, None] & (column < n)[None, :]",
        "inside = (row < m)[:, None]",
    ),
    "one weight gradient is not transposed": ("product(flat.t(), dy)", "product(flat.t(), dy.flip(0))"),
    "gelu without the cube in its slope": ("(1.0 + 0.134145 * x * x)", "1.0"),
}


def small_problem(matmul, device, as_exact_as_torch):
    inputs = *draw(device, (81, 40), (40, 50), (50,)), "gelu"
    as_exact_as_torch(matmul, reference, *inputs, wrt=(0, 1, 2))


def test_the_shipped_kernel_passes(device, as_exact_as_torch, small):
    small_problem(matmul, device, as_exact_as_torch)


@pytest.mark.parametrize("change", MUTANTS)
def test_a_broken_kernel_is_caught(change, mutant, device, as_exact_as_torch, monkeypatch):
    if not INTERPRET:
        pytest.skip("a broken kernel may bring down a GPU")
    broken = mutant("matmul", *MUTANTS[change])
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        monkeypatch.setitem(broken._product.configs[0].kwargs, name, 16)
    with pytest.raises((AssertionError, IndexError)):
        small_problem(broken.matmul, device, as_exact_as_torch)


@pytest.mark.parametrize("entry", module.benchmarks(), ids=lambda entry: entry["name"])
def test_benchmarks_run(entry, device):
    size = {"m": 33, "n": 20, "k": 17}
    inputs = entry["inputs"](size, torch.float32, device)
    wanted = entry["reference"](*inputs)
    for function in (entry["ours"], *entry["peers"].values()):
        torch.testing.assert_close(function(*inputs), wanted, atol=1e-4, rtol=1e-4)
    assert entry["flops"](size) == 2 * 33 * 20 * 17 and entry["bytes"](size, 2) == 2 * (33 * 17 + 17 * 20 + 33 * 20)


def test_a_search_copies_what_is_added_to_and_nothing_else(device):
    """A search runs the kernel many times. Where it adds, every run starts from the same C; else C is not cloned."""
    c = torch.ones(3, device=device)
    for adds in (False, True):
        arguments = {"C": c, "ADD": adds}
        for _ in range(3):
            module._product.pre_hook(arguments)
            assert bool(module._before) == adds
            c += 1
            module._product.post_hook(arguments, exception=None)
    assert torch.equal(c, torch.full((3,), 4.0, device=device)) and not module._before
