"""vector_add: equal to torch bit for bit where torch rounds, at every odd size, layout and dtype."""

import pytest
import torch

from kernels import INTERPRET
from kernels import vector_add as module
from kernels.vector_add import reference, vector_add

SIZES = [1, 7, 63, 65, 130, 65536, 65537, 200_003] + ([] if INTERPRET else [2**26 + 1])


def pair(*shape, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(2, *shape, generator=g).to(device, dtype)).unbind(0)


@pytest.mark.parametrize("size", SIZES)
def test_equals_torch_at_odd_sizes(size, device):
    x, y = pair(size, device=device)
    assert torch.equal(vector_add(x, y), x + y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_rounds_once(dtype, device, as_exact_as_torch):
    x, y = pair(3, 333, device=device, dtype=dtype)
    assert vector_add(x, y).dtype == dtype
    if dtype != torch.float64:
        as_exact_as_torch(vector_add, reference, x, y, wrt=(0, 1))


def test_gradcheck(gradcheck, device):
    x, y = (t.requires_grad_() for t in pair(2, 5, device=device, dtype=torch.float64))
    assert gradcheck(vector_add, x, y)


def test_what_is_not_contiguous_is_understood(device):
    x, y = pair(12, 35, device=device)
    assert torch.equal(vector_add(x.T, y.T), x.T + y.T)
    assert torch.equal(vector_add(x[::3, 1::2], y[::3, 1::2]), (x + y)[::3, 1::2])
    assert torch.equal(vector_add(x[:1].expand(12, 35), y), x[:1] + y)


def test_nothing_to_add(device):
    x = torch.empty(0, 3, device=device, requires_grad=True)
    out = vector_add(x, x)
    assert out.shape == (0, 3)
    out.sum().backward()
    assert x.grad.shape == (0, 3)


def test_nothing_is_kept_for_the_backward_pass(device):
    x, y = (t.requires_grad_() for t in pair(9, device=device))
    assert vector_add(x, y).grad_fn.saved_tensors == ()


def test_errors_name_the_values(device):
    x, y = pair(3, 4, device=device)
    with pytest.raises(ValueError, match=r"\(3, 4\) and y \(4, 3\)"):
        vector_add(x, y.T)
    with pytest.raises(ValueError, match="int64"):
        vector_add(x.long(), y.long())
    with pytest.raises(ValueError, match="float16"):
        vector_add(x, y.half())
    with pytest.raises(ValueError, match="must be a tensor, it is a float"):
        vector_add(x, 1.0)
    with pytest.raises(ValueError, match="meta"):
        vector_add(x.to("meta"), y.to("meta"))


MUTANTS = {
    "no mask at the store": ("element_ty), mask=mask)", "element_ty))"),
    "a mask one element too long": ("at < size - start", "at <= size - start"),
    "a mask one element too short": ("at < size - start", "at < size - start - 1"),
    "every program at the same place": ("tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0).to(tl.int64) * 0"),
    "a program too few": ('triton.cdiv(size, meta["BLOCK"])', 'max(1, size // meta["BLOCK"])'),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.skipif(not INTERPRET, reason="an access outside a tensor is undefined on a GPU")
def test_a_broken_kernel_is_found(name, mutant, device):
    broken = mutant("vector_add", *MUTANTS[name])

    def good(kernel):
        x, y = pair(65537, device=device)
        try:
            return torch.equal(kernel(x, y), x + y)
        except IndexError:  # raised by the guard around memory
            return False

    assert good(module.vector_add)
    assert not good(broken.vector_add)
