"""kernels/packing.py: rows are moved, not computed, so everything is compared for equality."""

import pytest
import torch

import kernels.packing
from kernels.packing import _offsets, offsets_of, pack, reference, unpack, unpack_reference

SHAPES = [(1, 1, 1), (3, 7, 5), (2, 65, 63), (2, 130, 65), (4, 9), (2, 5, 3, 2), (70, 3, 2)]
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32]


def batch(shape, device, dtype=torch.float32, fill=0.6):
    x = (torch.randn(shape, device=device) * 100).to(dtype)
    return x, torch.rand(shape[:2], device=device) < fill


def prefix(lengths, n, device):
    return torch.arange(n, device=device) < torch.tensor(lengths, device=device)[:, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack(shape, device):
    x, mask = batch(shape, device)
    for got, want in zip(pack(x, mask), reference(x, mask), strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack(shape, device):
    packed, offsets = reference(*batch(shape, device))
    for length in (shape[1], shape[1] + 3):
        assert torch.equal(unpack(packed, offsets, length), unpack_reference(packed, offsets, length))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_arrives_bit_by_bit(dtype, device):
    x, mask = batch((2, 66, 9), device, dtype)
    packed, offsets = pack(x, mask)
    assert torch.equal(packed, x[mask])
    assert torch.equal(unpack(packed, offsets, 66), unpack_reference(packed, offsets, 66))


@pytest.mark.parametrize("lengths", [[3, 0, 7], [0, 0, 0], [7, 7, 7], [0, 5, 0]], ids=str)
def test_there_and_back(lengths, device):
    mask = prefix(lengths, 7, device)
    x = torch.randn(3, 7, 4, device=device)
    packed, offsets = pack(x, mask)
    assert torch.equal(unpack(packed, offsets, 7), x.masked_fill(~mask[..., None], 0.0))


@pytest.mark.parametrize("b", [1, 2, 63, 4097])
def test_prefix_sums(b, device):
    mask = torch.rand(b, 3, device=device) < 0.5
    if b > 100:  # one program per sequence: in the interpreter only the scan over many lengths is of interest
        offsets = torch.full((b + 1,), -1, dtype=torch.int32, device=device)
        _offsets[(1,)](mask.sum(1).int(), offsets, b, BLOCK=1024)
    else:
        offsets = offsets_of(mask)
    assert torch.equal(offsets, reference(mask[..., None], mask)[1])


@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0, 0]], ids=str)
def test_each_is_the_backward_of_the_other(lengths, device):
    mask = prefix(lengths, 6, device)
    x = torch.randn(3, 6, 4, device=device, requires_grad=True)
    packed, offsets = pack(x, mask)
    rows = torch.randn_like(packed)
    back = torch.autograd.grad(packed, x, rows)[0]
    assert torch.equal(back, unpack(rows, offsets, 6))
    leaf = rows.clone().requires_grad_()
    grad = torch.randn(3, 6, 4, device=device)
    assert torch.equal(torch.autograd.grad(unpack(leaf, offsets, 6), leaf, grad)[0], pack(grad, mask)[0])


def test_gradcheck_twice(device, gradcheck):
    x, mask = batch((2, 3, 2), device, torch.float64)
    once = {"check_undefined_grad": False}
    assert gradcheck(lambda x: pack(x, mask)[0], x.requires_grad_(), **once)
    packed, offsets = reference(x.detach(), mask)
    assert gradcheck(lambda p: unpack(p, offsets, 5), packed.requires_grad_(), **once)
    assert torch.autograd.gradgradcheck(lambda x: pack(x, mask)[0] ** 2, (x,))


def test_non_contiguous_inputs(device):
    x, mask = torch.randn(5, 9, 3, device=device).transpose(0, 1), torch.rand(5, 9, device=device).t() < 0.5
    packed, offsets = pack(x, mask)
    assert torch.equal(packed, x[mask])
    across = torch.randn(3, len(packed), device=device).t()
    assert torch.equal(unpack(across, offsets, 5), unpack_reference(across, offsets, 5))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
    packed, offsets = pack(x, mask)
    assert packed.shape == (shape[0] * shape[1], shape[2])
    assert offsets.tolist() == [shape[1] * i for i in range(shape[0] + 1)]
    assert unpack(packed, offsets, 4).shape == (shape[0], 4, shape[2])
    assert torch.autograd.grad(packed.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    "message, call",
    [
        ("int64", lambda x, o: pack(x, torch.ones(2, 4, dtype=torch.long, device=x.device))),
        (r"\(2, 4\); got \(2, 3\)", lambda x, o: pack(x, torch.ones(2, 3, dtype=torch.bool, device=x.device))),
        ("list", lambda x, o: pack(x, [True])),
        ("complex64", lambda x, o: pack(x.to(torch.complex64), torch.ones(2, 4, dtype=torch.bool, device=x.device))),
        ("int64", lambda x, o: unpack(x[0], o.long(), 4)),
    ],
    ids=["type of mask", "shape of mask", "a list", "type of x", "type of offsets"],
)
def test_errors(message, call, device):
    x = torch.randn(2, 4, 3, device=device)
    with pytest.raises(ValueError, match=message):
        call(x, torch.tensor([0, 1, 4], dtype=torch.int32, device=device))


def test_errors_in_the_values_of_offsets(device):
    if device.type != "cpu":
        pytest.skip("on a GPU nobody looks at the values")
    packed = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"0 to 4 rows; got \[0, 1, 3\]"):
        unpack(packed, torch.tensor([0, 1, 3], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="a sequence of 3 does not fit into length 2"):
        unpack(packed, torch.tensor([0, 1, 4], dtype=torch.int32), 2)


MUTANTS = {
    "inclusive prefix sum": ("tl.cumsum(real, 0) - real  #", "tl.cumsum(real, 0)  #"),
    "offsets shifted by one": ("tl.store(offsets + 1 + i,", "tl.store(offsets + i,"),
    "the next block of a sequence starts over": ("        row += tl.sum(real)\n", ""),
    "the carry between blocks of lengths is lost": ("        before += tl.sum(x)\n", ""),
    "padding is not zeroed": ("tl.where(real > 0, place, -1)", "place"),
    "rows come from the wrong sequence": ("token = sequence.to(tl.int64) * n + i", "token = sequence.to(tl.int64) + i"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, mutant, device, monkeypatch):
    broken = mutant("packing", *MUTANTS[name])

    def right(module):
        monkeypatch.setattr(module, "block_of", lambda n: 4)  # several blocks although the problem is tiny
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(9, 7, 2, generator=generator).to(device)
        mask = (torch.rand(9, 7, generator=generator) < 0.6).to(device)
        packed, offsets = module.pack(x, mask)
        want, places = reference(x, mask)
        back = module.unpack(want, places, 7)
        return torch.equal(packed, want) and torch.equal(offsets, places) and torch.equal(
            back, unpack_reference(want, places, 7))  # fmt: skip

    assert right(kernels.packing)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        assert right(broken), name
