"""What kernels over rows share: a tensor seen as rows, and how many rows and columns one program takes."""

import torch

from ._runtime import DEVICE, INTERPRET, empty, jit, limits, tl, triton, wide

TILE = 1 << 14 if INTERPRET else 1 << 11  # elements that a program takes at least, where rows are short


def as_rows(x):
    """(..., n) as (rows, n) with neighbors in memory along a row: a view where possible, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.shape[1] == 1 or flat.stride(1) == 1 else flat.contiguous()


def tile(n, rows, each=32):
    """Constants of a program that holds whole rows of n elements: ROWS, BLOCK (powers of two) and num_warps.

    A long row has a program to itself; of short rows a program takes several, so that it has enough to load at once.
    each: how many elements of the tile a thread holds, as far as 4 to 16 warps allow.
    """
    block = triton.next_power_of_2(n)
    height = max(1, min(TILE // block, triton.next_power_of_2(rows)))
    return {"ROWS": height, "BLOCK": block, "num_warps": min(16, max(4, height * block // each // 32))}


def stages(like, elements, read=2):
    """How many turns ahead a loop over tiles loads: 3 if that leaves shared memory for two programs, else 1.

    The compiler turns it into asynchronous copies into shared memory: `read` tiles of `elements` numbers for each turn
    that is on its way, and loads no longer wait for arithmetic.
    """
    return 3 if 2 * 3 * read * elements * like.element_size() <= limits(like.device.index)[0] else 1


def programs(device, tiles, num_warps):
    """How many programs share the tiles when each keeps partial sums: 16 warps for every multiprocessor of the GPU."""
    many = 3 if INTERPRET else limits(device.index)[1] * (16 // num_warps)
    return max(1, min(many, tiles))


def partial_sums(parameter, count, like):
    """Room for one row of sums per program, or None where there is nothing to differentiate."""
    return None if parameter is None else empty((count, parameter.numel()), like=like)


def shapes_forward(x, residual, numbers):
    """What a norm returns, for compilers: y, some numbers of each row, and x + residual where there is one."""
    rows = x.numel() // x.shape[-1]
    each = [x.new_empty(rows, dtype=wide(x.dtype)) for _ in range(numbers)]
    return [x.new_empty(x.shape), *each, *([] if residual is None else [x.new_empty(x.shape)])]


def shapes_backward(s, *parameters):
    """What its backward pass returns: the gradients of x and of the parameters that are there."""
    return [s.new_empty(s.shape), *(p.new_empty(p.shape) for p in parameters if p is not None)]


def one_type(x, residual):
    """Under autocast, where a residual stays in float32, both in the wider type, as torch adds them."""
    if residual is None or x.dtype == residual.dtype or DEVICE == "meta" or not torch.is_autocast_enabled(DEVICE):
        return x, residual
    to = torch.promote_types(x.dtype, residual.dtype)
    return x.to(to), residual.to(to)


def check_shapes(function, x, residual, **parameters):
    """Raise ValueError where shapes do not fit: parameters (n,), the residual exactly as x."""
    if x.dim() == 0:
        raise ValueError(f"{function}: x must have a dimension to normalize, and has shape ()")
    for name, p in parameters.items():
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{function}: {name} has shape {tuple(p.shape)}, and rows of x have {x.shape[-1]} entries")
        if p is not None and p.device != x.device:
            raise ValueError(f"{function}: {name} is on {p.device} and x on {x.device}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{function}: residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}")


@jit
def load_sum(X, R, S, x_at, r_at, s_at, mask, store, ACC: tl.constexpr):
    """x, or x + residual, which is rounded and stored first: backward must see the numbers that were normalized."""
    x = tl.load(X + x_at, mask=mask, other=0.0)
    if R is not None:
        total = (x.to(ACC) + tl.load(R + r_at, mask=mask, other=0.0).to(ACC)).to(S.dtype.element_ty)
        tl.store(S + s_at, total, mask=store)
        x = total
    return x.to(ACC)


@jit
def scale(x, W, B, column, mask, ACC: tl.constexpr):
    """x * weight + bias, where there are any."""
    if W is not None:
        x = x * tl.load(W + column, mask=mask, other=0.0).to(ACC)
    if B is not None:
        x = x + tl.load(B + column, mask=mask, other=0.0).to(ACC)
    return x
