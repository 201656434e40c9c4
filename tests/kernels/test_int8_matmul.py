"""int8_matmul: codes, products, gradients and the bound on the error; and broken copies that must be caught."""

import pytest
import torch
from torch import nn

import kernels.int8_matmul as shipped
from kernels import INTERPRET
from kernels.int8_matmul import (
    Int8Linear,
    int8_matmul,
    int8_matmul_dynamic,
    quantize,
    reference,
    reference_dynamic,
    reference_quantize,
)

SIZES = [(1, 1, 1), (7, 63, 65), (65, 130, 7), (3, 16, 200)]


def draw(device, *shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def shrink(module, monkeypatch):
    """Tiles of 16, so that a small product has many (interpreter only; on a GPU they are tuned)."""
    if not INTERPRET:
        pytest.skip("on a GPU the tiles are tuned")
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        monkeypatch.setitem(module._product.configs[0].kwargs, name, 16)


def codes_are_right(weight, codes, scale):
    """Nearest whole numbers of the largest size 127, to within the rounding of the scale."""
    ratio = weight.double() / scale.double()[:, None]
    assert ((codes.double() - ratio).abs() <= 0.5 + 1e-4).all()
    assert codes.abs().amax(1).eq(127).logical_or(weight.abs().amax(1) == 0).all()
    torch.testing.assert_close(scale, reference_quantize(weight)[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("n, k", [(1, 1), (17, 130), (40, 1100), (5, 0), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_quantize(n, k, dtype, device):
    (weight,) = draw(device, (n, k), dtype=dtype)
    codes, scale = quantize(weight)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and codes.shape == (n, k) and scale.shape == (n,)
    if k:
        codes_are_right(weight, codes, scale)
    else:
        assert (scale == 1).all()


def test_quantize_zeros_and_strides(device):
    (weight,) = draw(device, (12, 20))
    weight = weight.t()[::2]
    weight[3] = 0
    codes, scale = quantize(weight)
    codes_are_right(weight, codes, scale)
    assert scale[3] == 1 and (codes[3] == 0).all() and not codes.requires_grad


def quantized(multiply, weight):
    """The function of x alone."""
    codes, scale = quantize(weight)
    return lambda x: multiply(x, codes, scale)


@pytest.mark.parametrize("m, n, k", SIZES)
def test_product_and_gradient(m, n, k, device, as_exact_as_torch):
    x, weight = draw(device, (m, k), (n, k))
    as_exact_as_torch(quantized(int8_matmul, weight), quantized(reference, weight), x, wrt=(0,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device, as_exact_as_torch):
    x, weight = draw(device, (20, 200), (35, 200), dtype=dtype)
    as_exact_as_torch(quantized(int8_matmul, weight), quantized(reference, weight), x, wrt=(0,))


def test_many_tiles(device, as_exact_as_torch, monkeypatch):
    shrink(shipped, monkeypatch)
    x, weight = draw(device, (35, 40), (50, 40))
    as_exact_as_torch(quantized(int8_matmul, weight), quantized(reference, weight), x, wrt=(0,))


def test_gradcheck(gradcheck):
    x, weight = draw("cpu", (3, 5), (4, 5), dtype=torch.float64)
    assert gradcheck(quantized(int8_matmul, weight), x.requires_grad_())


@pytest.mark.parametrize("seed", range(3))
def test_bound_on_the_error(seed, device):
    """|error| <= half a step times the sum of |x|: no assumption about x or the weight."""
    x, weight = draw(device, (17, 60), (33, 60), dtype=torch.float64, seed=seed)
    weight *= torch.rand(33, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device) ** 3
    codes, scale = quantize(weight)
    error = (int8_matmul(x, codes, scale) - x @ weight.t()).abs()
    bound = x.abs().sum(1)[:, None] * scale / 2 + 1e-6
    assert (error <= bound).all() and (error > bound / 50).any()
    one_scale = weight.abs().max() / 127  # and one step for all rows breaks it
    coarse = (x @ ((weight / one_scale).round() * one_scale).t() - x @ weight.t()).abs()
    assert not (coarse <= bound).all()


@pytest.mark.parametrize("m, n, k", SIZES)
def test_whole_numbers_are_multiplied_exactly(m, n, k, device):
    """With x of whole numbers up to 127 the dynamic product has no error but that of the scales."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (m, k), generator=generator)
    x[:, 0] = 127
    found = int8_matmul_dynamic(x.double().to(device), codes.to(device), torch.ones(n, device=device))
    assert found.cpu().equal((x @ codes.long().t()).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dynamic(dtype, device):
    x, weight = draw(device, (2, 9, 65), (40, 65), dtype=dtype)
    codes, scale = quantize(weight)
    found, wanted = int8_matmul_dynamic(x, codes, scale), reference_dynamic(x, codes, scale)
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=1e-4)


def test_bound_on_the_error_of_both(device):
    x, weight = draw(device, (17, 60), (33, 60), dtype=torch.float64)
    codes, scale = quantize(weight)
    step = x.abs().amax(1, keepdim=True) / 127
    bound = x.abs().sum(1)[:, None] * scale / 2 + step / 2 * (codes.double().abs().sum(1) * scale) + 1e-5
    error = (int8_matmul_dynamic(x, codes, scale) - x @ weight.t()).abs()
    assert (error <= bound).all()
    assert error.square().mean() > (int8_matmul(x, codes, scale) - x @ weight.t()).square().mean()


def test_leading_dimensions_and_any_strides(device):
    x, weight = draw(device, (6, 4, 40), (40, 24))
    codes, scale = quantize(weight.t())
    codes, scale = codes.t().contiguous().t(), scale.repeat_interleave(2)[::2]
    x = x.transpose(0, 1)[..., ::2].detach().requires_grad_()
    codes = codes[:, ::2]
    found, wanted = int8_matmul(x, codes, scale), reference(x, codes, scale)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), x))
    assert int8_matmul_dynamic(x, codes, scale).shape == (4, 6, 24)


@pytest.mark.parametrize("m, n, k", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(m, n, k, device):
    x, weight = draw(device, (2, m, k), (n, k))
    codes, scale = quantize(weight)
    for multiply in (int8_matmul, int8_matmul_dynamic):
        found = multiply(x, codes, scale)
        assert found.shape == (2, m, n) and (found == 0).all()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(int8_matmul(x, codes, scale).sum(), x)
    assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize("multiply, allowed", [(int8_matmul, 0.02), (int8_matmul_dynamic, 0.03)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer(multiply, allowed, bias, device):
    torch.manual_seed(0)
    layer = nn.Linear(64, 40, bias=bias).to(device)
    small = Int8Linear(layer, multiply)
    (x,) = draw(device, (5, 7, 64))
    found, wanted = small(x), layer(x)
    assert ((found - wanted).norm() / wanted.norm()).item() < allowed
    assert not list(small.parameters()) and small.weight_int8.dtype == torch.int8
    other = Int8Linear(nn.Linear(64, 40, bias=bias).to(device), multiply)
    other.load_state_dict(small.state_dict())
    assert other(x).equal(found)


@pytest.mark.parametrize(
    "x, codes, scale, message",
    [
        (torch.zeros(3, 4), torch.zeros(5, 6, dtype=torch.int8), torch.ones(5), r"x \(3, 4\) and weight_int8 \(5, 6\)"),
        (torch.zeros(3, 6), torch.zeros(5, 6, dtype=torch.int8), torch.ones(6), r"scale is \(6,\); 5 output channels"),
        (torch.zeros(3, 6), torch.zeros(5, 6), torch.ones(5), "weight_int8 is float32; it must be int8"),
        (torch.zeros(3, 6), torch.zeros(5, 6, dtype=torch.int8), torch.ones(5).half(), "scale is float16"),
        (torch.zeros(3, 6).int(), torch.zeros(5, 6, dtype=torch.int8), torch.ones(5), "x is int32"),
    ],
)
def test_bad_arguments(x, codes, scale, message, device):
    for multiply in (int8_matmul, int8_matmul_dynamic):
        with pytest.raises(ValueError, match=message):
            multiply(x.to(device), codes.to(device), scale.to(device))


def test_bad_weight(device):
    with pytest.raises(ValueError, match=r"it is \(2, 3, 4\)"):
        quantize(torch.zeros(2, 3, 4, device=device))


MUTANTS = {
    "codes are cut off, not rounded": ("tl.floor(w / scale[:, None] + 0.5)", "tl.floor(w / scale[:, None])"),
    "the largest entry, not the largest size": ("tl.max(tl.abs(tl.load(", "tl.max((tl.load("),
    "no scale": ("y *= tl.load(SCALE + column, mask=column < n, other=0.0)", "y *= tl.load(SCALE + column * 0)"),
    "no mask along k": ("tl.load(x, mask=inner[None, :] < k - start, other=0)", "tl.load(x)"),
    "the gradient without the scale": ("(_rows(dy) * scale).to(dy.dtype)", "_rows(dy)"),
    "the step of another row": ("STEP + row, mask=row < m", "STEP + row * 0, mask=row < m"),
    "sums in half precision": ("y = total.to(ACC)", "y = total.to(tl.float16).to(ACC)"),
}


def small_problem(module, device):
    x, weight = draw(device, (20, 40), (35, 40))
    weight = weight - 1.0  # mostly negative
    x.requires_grad_()
    codes, scale = module.quantize(weight)
    codes_are_right(weight, codes, scale)
    found, wanted = module.int8_matmul(x, codes, scale), reference(x, codes, scale)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), x))
    found = module.int8_matmul_dynamic(x.detach(), codes, scale)
    torch.testing.assert_close(found, reference_dynamic(x.detach(), codes, scale), atol=1e-4, rtol=1e-4)


def test_the_shipped_kernel_passes(device, monkeypatch):
    shrink(shipped, monkeypatch)
    small_problem(shipped, device)


@pytest.mark.parametrize("change", MUTANTS)
def test_a_broken_kernel_is_caught(change, mutant, device, monkeypatch):
    broken = mutant("int8_matmul", *MUTANTS[change])
    shrink(broken, monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        small_problem(broken, device)


@pytest.mark.parametrize("entry", shipped.benchmarks(), ids=lambda entry: entry["name"])
def test_benchmarks_run(entry, device):
    inputs = entry["inputs"]({"m": 5, "n": 70, "k": 40}, torch.float32, device)
    torch.testing.assert_close(entry["ours"](*inputs), entry["reference"](*inputs), atol=1e-4, rtol=1e-4)
    assert entry["bytes"]({"m": 1, "n": 2, "k": 3}, 2) == 2 * (3 + 2) + 2 * (3 + 4)
