"""kernels/decode_attention.py: one query against a contiguous and a paged cache, in any number of parts."""

import pytest
import torch
import torch.nn.functional as F

from kernels import decode_attention as module
from kernels.decode_attention import decode_attention, gather_pages, parts_for, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cache(b, h, kv, m, e, device, dtype=torch.float32):
    q = torch.randn(b, h, e, device=device, dtype=dtype)
    return q, *torch.randn(2, b, kv, m, e, device=device, dtype=dtype).unbind(0)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def paged(k, v, page, lengths=None, seed=0):
    """The same caches in shuffled pages, with two pages that nobody owns, and their table; -1 behind the lengths."""
    b, kv, m, e = k.shape
    each = -(-m // page)
    order = torch.randperm(b * each + 2, generator=torch.Generator().manual_seed(seed))[: b * each].to(k.device)
    pages = []
    for x in (k, v):
        x = F.pad(x, (0, 0, 0, each * page - m)).unflatten(2, (each, page)).transpose(1, 2).flatten(0, 1)
        filled = torch.full((b * each + 2, kv, page, e), torch.nan, dtype=x.dtype, device=x.device)
        filled[order] = x
        pages.append(filled)
    table = order.int().view(b, each)
    if lengths is not None:
        table = torch.where(torch.arange(each, device=k.device) * page < lengths[:, None], table, -1).int()
    return *pages, table


def close(a, b, atol=1e-5):
    return bool(torch.allclose(a, b, atol=atol))


@pytest.mark.parametrize("m, parts", [(1, 1), (7, 3), (63, 1), (65, 2), (130, 5), (300, None)])
def test_equals_attention(m, parts, device):
    q, k, v = cache(2, 2, 2, m, 16, device)
    want = F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]
    assert close(decode_attention(q, k, v, parts=parts), want) and close(reference(q, k, v), want)


@pytest.mark.parametrize("h, kv, e", [(4, 2, 20), (6, 1, 32), (1, 1, 1), (2, 2, 130), (20, 1, 16)])
def test_grouped_heads_and_odd_widths(h, kv, e, device):
    given = cache(2, h, kv, 65, e, device)
    lengths = ints([65, 33], device)
    assert close(decode_attention(*given, lengths, parts=2), reference(*given, lengths))


@pytest.mark.parametrize("parts", [1, 2, 4, 9, 128])
def test_the_number_of_parts_changes_nothing(parts, device):
    given = cache(2, 2, 1, 130, 16, device)
    lengths = ints([3, 130], device)
    assert close(decode_attention(*given, lengths, parts=parts), reference(*given, lengths), 2e-6)


def test_lengths_hide_what_lies_behind_them(device):
    q, k, v = cache(3, 2, 2, 70, 16, device)
    lengths = ints([0, 1, 64], device)
    want = reference(q, k, v, lengths)
    for i, n in enumerate(lengths.tolist()):
        k[i, :, n:], v[i, :, n:] = torch.nan, torch.nan
    got = decode_attention(q, k, v, lengths, parts=3)
    assert close(got, want) and not got[0].any()


@pytest.mark.parametrize("page", [1, 5, 16, 64, 100])
def test_pages_equal_the_contiguous_cache(page, device):
    q, k, v = cache(3, 4, 2, 70, 16, device)
    lengths = ints([70, 1, 37], device)
    k_pages, v_pages, table = paged(k, v, page, lengths)
    assert close(decode_attention(q, k_pages, v_pages, lengths, table, parts=2), reference(q, k, v, lengths))
    _, _, whole = paged(k, v, page)
    assert torch.equal(gather_pages(k_pages, whole)[:, :, :70], k)


def test_pages_without_lengths_and_a_shared_page(device):
    q, k, v = cache(2, 2, 2, 32, 16, device)
    k_pages, v_pages, table = paged(k, v, 16)
    assert close(decode_attention(q, k_pages, v_pages, table=table), reference(q, k, v))
    table[1, 0] = table[0, 0]  # both begin with the same prompt: one page serves both
    k[1, :, :16], v[1, :, :16] = k[0, :, :16], v[0, :, :16]
    assert close(decode_attention(q, k_pages, v_pages, table=table), reference(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_exact_as_torch(dtype, device, as_exact_as_torch):
    q, k, v = cache(2, 4, 2, 130, 32, device, dtype)
    lengths = ints([130, 41], device)
    as_exact_as_torch(lambda q, k, v: decode_attention(q, k, v, lengths, parts=3),
                      lambda q, k, v: reference(q, k, v, lengths), q, k, v)  # fmt: skip


def test_float64_and_large_scores(device):
    if device.type != "cpu":
        pytest.skip("float64 runs in the interpreter")
    q, k, v = cache(2, 2, 1, 65, 8, device, torch.float64)
    assert close(decode_attention(90 * q, k, v, parts=3), reference(90 * q, k, v), 1e-12)


def test_non_contiguous_caches_and_scale(device):
    q, k, v = cache(2, 2, 2, 40, 16, device)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]  # stored (b, m, h_kv, e)
    want = reference(q, k, v, scale=0.2)
    assert close(decode_attention(q, *tokens_first, scale=0.2), want)
    across = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v)]  # the last stride is not 1: copied
    assert close(decode_attention(q, *across, scale=0.2), want)
    assert close(decode_attention(q[:, :, :8], k[..., :8], v[..., 8:]), reference(q[:, :, :8], k[..., :8], v[..., 8:]))


@pytest.mark.parametrize("b, h, m, e", [(0, 2, 5, 4), (2, 2, 0, 4), (2, 0, 5, 4)])
def test_empty(b, h, m, e, device):
    out = decode_attention(*cache(b, h, max(h, 1), m, e, device))
    assert out.shape == (b, h, e) and not out.any()


def test_parts_fill_the_machine_and_no_more(device):
    assert parts_for(10**6, 10**6, device) == 1
    assert parts_for(1, 100, device) == 1
    assert 1 < parts_for(1, 10**6, device) <= 128


def test_no_gradient_is_promised(device):
    q, k, v = cache(1, 2, 2, 5, 4, device)
    with pytest.raises(RuntimeError, match="no backward"):
        decode_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert decode_attention(q, k, v).shape == q.shape


@pytest.mark.parametrize(
    "message, change",
    [
        (r"\(2, 3, 5, 4\)", lambda q, k, v: (q, k, k[:, :, :4])),
        ("3 key heads do not divide 4", lambda q, k, v: (torch.randn(2, 4, 4).to(q), k, v)),
        ("not 300", lambda q, k, v: (torch.randn(2, 3, 300).to(q), *torch.randn(2, 2, 3, 5, 300).to(q))),
        ("torch.int64", lambda q, k, v: (q, k, v, torch.tensor([1, 2], device=q.device))),
        (r"shape \(3,\)", lambda q, k, v: (q, k, v, ints([1, 2, 3], q.device))),
        (r"\(b, max_pages\)", lambda q, k, v: (q, k, v, None, ints([1, 2], q.device))),
        ("not 0", lambda q, k, v: (q, k, v, None, None, None, 0)),
        ("float16", lambda q, k, v: (q, k, v.half())),
    ],
    ids=["shapes", "heads", "width", "type of lengths", "number of lengths", "table", "parts", "mixed types"],
)
def test_errors(message, change, device):
    with pytest.raises(ValueError, match=message):
        decode_attention(*change(*cache(2, 3, 3, 5, 4, device)))


def test_errors_in_the_values(device):
    if device.type != "cpu":
        pytest.skip("on a GPU nobody looks at the values")
    q, k, v = cache(2, 2, 2, 5, 4, device)
    with pytest.raises(ValueError, match=r"between 0 and 5; got \[1, 6\]"):
        decode_attention(q, k, v, ints([1, 6], device))
    with pytest.raises(ValueError, match="pages 0 to 1; the table names 0 to 7"):
        decode_attention(q, k, v, None, ints([[0, 7], [1, 1]], device))


MUTANTS = {
    "every part counts the same": ("share / tl.where(total > 0, total, 1.0)", "(part < parts) / (0.0 + parts)"),
    "weights of base e": ("share = tl.exp2(sums -", "share = tl.exp(sums -"),
    "the page is ignored": ("at_k = page * stride_b", "at_k = sequence * stride_b"),
    "the page of the values is ignored": ("at_v = page * v_b", "at_v = sequence * v_b"),
    "the row inside the page is ignored": ("head * stride_h + key % PAGE * stride_m", "head * stride_h + key * 0"),
    "one key too many": ("tl.load(lengths + sequence), m)", "tl.load(lengths + sequence) + 1, m)"),
    "one key too few": ("tl.minimum(part * span + span, length)", "tl.minimum(part * span + span - 1, length)"),
    "the sums are not rescaled": ("acc = acc * shrink[:, None] +", "acc = acc +"),
    "a part without its sum": ("top + tl.log2(safe)", "top"),
    "query heads of the next group": ("head * GROUP + row", "head + row"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, mutant, device):
    broken = mutant("decode_attention", *MUTANTS[name]).decode_attention
    q, k, v = cache(2, 4, 2, 200, 16, device)
    k *= torch.linspace(0.1, 2, 200, device=device)[:, None]  # larger scores later: the running maximum moves
    lengths = ints([200, 70], device)
    k_pages, v_pages, table = paged(k, v, 20)
    want = reference(q, k, v, lengths)
    assert close(decode_attention(q, k_pages, v_pages, lengths, table, parts=2), want)
    try:
        assert not close(broken(q, k_pages, v_pages, lengths, table, parts=2), want), name
    except IndexError as error:
        assert "outside every tensor" in str(error)


def test_the_batch_lies_on_the_long_axis_of_the_grid(device, monkeypatch):
    """The second and third axis of a grid end at 65,535, and a batch may be longer."""
    grids, kernel = [], module._parts

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_parts", Recorder())
    q, k, v = torch.randn(3, 4, 8, device=device), *torch.randn(2, 3, 2, 10, 8, device=device)
    torch.testing.assert_close(decode_attention(q, k, v, parts=2), reference(q, k, v))
    assert grids == [(2 * 2 * 3,)]
