"""Properties that a layer must have, checked on the layer itself.

Each contract returns a `Finding`: true or false, with a sentence that says what was found. It serves as a test
(`assert causal(f, x)`) and as a notebook cell. `f` maps a token tensor (b, n, d), or token ids (b, n), to (b, m, c).
Modules are checked in eval mode, without leaving them there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """The outcome of a contract: `bool(finding)`, and `str(finding)` for what was seen."""

    ok: bool
    message: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{'yes' if self.ok else 'NO'}: {self.message}"


@contextlib.contextmanager
def _calm(*things):
    """Eval mode for the modules among `things`, and the global random state as it was afterwards."""
    modules = {m: m.training for thing in things if isinstance(thing, nn.Module) for m in thing.modules()}
    state = torch.get_rng_state()
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in modules.items():
            module.training = mode
        torch.set_rng_state(state)


def _other(x: Tensor, generator: torch.Generator, largest: int = 1) -> Tensor:
    """A tensor of the same shape in which every entry differs: by 1 to 2 up or down, or an id up to `largest`."""
    if x.is_floating_point():
        step = 4 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 2  # (-2, 2)
        return x + torch.where(step < 0, step / 2 - 1, step / 2 + 1).to(x)
    shift = torch.randint(1, largest + 1, x.shape, generator=generator).to(x)
    return (x + shift) % (largest + 1)


def _largest(x: Tensor) -> int:
    """The largest token id in sight, at least 1: replacements stay inside the vocabulary."""
    return 1 if x.is_floating_point() else max(1, int(x.max()))


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference in double precision; equal infinities differ by nothing."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    return torch.where(a == b, 0.0, (a.to(wide) - b.to(wide)).abs())


def influence(f: Callable[[Tensor], Tensor], x: Tensor, *, seed: int = 0) -> Tensor:
    """How much each output token changes when one input token is replaced: (m, n), zero where it cannot.

    Token j of every sequence is replaced by random other values, four times, and the largest change in each output
    token is recorded. Unlike a derivative this also sees routing, sorting and rounding.
    """
    generator, largest = torch.Generator().manual_seed(seed), _largest(x)
    with _calm(f), torch.no_grad():
        before = f(x)
        columns = []
        for j in range(x.shape[1]):
            effects = []
            for _ in range(4):  # a router may overlook one replacement
                changed = x.clone()
                changed[:, j] = _other(x[:, j], generator, largest)
                gap = _gap(f(changed), before).nan_to_num(nan=torch.inf).float()
                effects.append(gap.flatten(2).amax((0, 2)) if gap.ndim > 2 else gap.amax(0))
            columns.append(torch.stack(effects).amax(0))
    return torch.stack(columns, 1).cpu()  # (m, n)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Largest absolute derivative of each output token by each input token: (m, n), for float `x` (b, n, d). Exact
    zeros stay exact.
    """
    if not x.is_floating_point():
        raise ValueError(f"a Jacobian needs float inputs, got {x.dtype}; `influence` works for token ids")
    with _calm(f):
        x = x.detach().clone().requires_grad_()
        y = f(x)
        rows = []
        for i in range(y.shape[1]):
            row = torch.zeros(x.shape[1])
            for c in range(y.shape[2]):
                (grad,) = torch.autograd.grad(y[:, i, c].sum(), x, retain_graph=True, allow_unused=True)
                if grad is not None:
                    row = torch.maximum(row, grad.abs().amax((0, 2)).float().cpu())
            rows.append(row)
    return torch.stack(rows)  # (m, n)


def _pattern(name: str, effect: Tensor, allowed: Tensor, atol: float, needed: Tensor | None = None) -> Finding:
    """Compare an influence matrix with where influence is allowed, and with where it is needed."""
    leak = effect.masked_fill(allowed, 0)
    if leak.max() > atol:
        i, j = divmod(int(leak.argmax()), leak.shape[1])
        count = int((leak > atol).sum())
        return Finding(
            False,
            f"not {name}: output {i} changes by \u27e8{leak.max():.2g}\u27e9 when input {j} does ({count} such pairs)",
        )
    if needed is not None and (missing := needed & (effect <= atol)).any():
        i, j = divmod(int(missing.float().argmax()), missing.shape[1])
        return Finding(
            False, f"not {name}: output {i} does not depend on input {j}, and should ({int(missing.sum())} such pairs)"
        )
    return Finding(True, f"{name}: all {effect.numel()} pairs of output and input agree")


def causal(f: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-5) -> Finding:
    """No output token depends on a later input token, and every output depends on its own input or an earlier one."""
    effect = influence(f, x)
    if effect.shape[0] != effect.shape[1]:
        return Finding(False, f"not causal: {effect.shape[1]} input tokens give {effect.shape[0]} output tokens")
    allowed = torch.ones_like(effect, dtype=torch.bool).tril()
    found = _pattern("causal", effect, allowed, atol)
    if found and (idle := (effect.amax(1) <= atol)).any():
        return Finding(False, f"not causal: output {int(idle.float().argmax())} depends on no input at all")
    return found


def keeps_to_the_past(f: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-5) -> Finding:
    """A quick form of `causal` for constructors, three passes: later tokens are replaced, earlier outputs compared.

    On the meta device, and where f does not run on tokens like x, nothing can be asked, and nothing is said against f.
    """
    n, generator = x.shape[1], torch.Generator().manual_seed(0)
    with _calm(f), torch.no_grad():
        try:
            before = f(x)
        except Exception as error:  # whatever it needs, it is not the question here
            return Finding(True, f"not asked: it does not run on {tuple(x.shape)} ({type(error).__name__})")
        if before.is_meta or before.shape[:2] != x.shape[:2]:
            return Finding(True, "not asked: it gives no numbers for each token")
        for i in (n - 1, n // 2):  # the last token alone, and the second half
            later = torch.cat([x[:, :i], _other(x[:, i:].cpu(), generator, _largest(x)).to(x)], 1)
            leak = _gap(f(later)[:, :i], before[:, :i]).max().item() if i else 0.0
            if leak > atol * max(1.0, before.abs().max().item()):
                said = f"outputs before {i} change by \u27e8{leak:.2g}\u27e9 with later inputs"
                return Finding(False, f"not causal: {said}")
    return Finding(True, "causal: earlier outputs do not change with later inputs")


def local(f: Callable[[Tensor], Tensor], x: Tensor, window: int, *, atol: float = 1e-5) -> Finding:
    """Output i depends on input j exactly when |i - j| <= `window`."""
    effect = influence(f, x)
    i, j = torch.meshgrid(torch.arange(effect.shape[0]), torch.arange(effect.shape[1]), indexing="ij")
    near = (i - j).abs() <= window
    return _pattern(f"local within {window}", effect, near, atol, needed=near)


def block_structured(f: Callable[[Tensor], Tensor], x: Tensor, blocks: Tensor, *, atol: float = 1e-5) -> Finding:
    """Output i depends on input j exactly when `blocks[i] == blocks[j]`; `blocks` (n,) numbers each token's block."""
    effect = influence(f, x)
    if blocks.shape != (effect.shape[1],) or effect.shape[0] != effect.shape[1]:
        raise ValueError(
            f"blocks must have shape ({effect.shape[1]},) and outputs as many tokens; got {tuple(blocks.shape)} and "
            f"{effect.shape[0]}"
        )
    same = (blocks[:, None] == blocks[None]).cpu()
    return _pattern("block-structured", effect, same, atol, needed=same)


def structured(f: Callable[[Tensor], Tensor], x: Tensor, allowed: Tensor, *, atol: float = 1e-5) -> Finding:
    """Output i depends on input j exactly where `allowed` (m, n) is True."""
    effect = influence(f, x)
    if allowed.shape != effect.shape:
        raise ValueError(f"allowed must have shape {tuple(effect.shape)}, got {tuple(allowed.shape)}")
    allowed = allowed.cpu()
    return _pattern("of the given structure", effect, allowed, atol, needed=allowed)


def permutation_equivariant(f: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-5, seed: int = 0) -> Finding:
    """Permuting the input tokens permutes the output tokens in the same way: f(P x) = P f(x)."""
    order = _derangement(x.shape[1], seed)
    with _calm(f), torch.no_grad():
        return _close("permutation-equivariant", f(x[:, order]), f(x)[:, order], atol)


def permutation_invariant(f: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-5, seed: int = 0) -> Finding:
    """Permuting the input tokens leaves the output as it is: f(P x) = f(x)."""
    order = _derangement(x.shape[1], seed)
    with _calm(f), torch.no_grad():
        return _close("permutation-invariant", f(x[:, order]), f(x), atol)


def _derangement(n: int, seed: int) -> Tensor:
    if n < 2:
        raise ValueError(f"a permutation needs at least 2 tokens, got {n}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order if not torch.equal(order, torch.arange(n)) else order.roll(1)


def padding_invariant(
    f: Callable[[Tensor, Tensor], Tensor], x: Tensor, real: Tensor, *, atol: float = 1e-5, seed: int = 0
) -> Finding:
    """Outputs at real tokens depend neither on what the padding contains nor on how much of it there is.

    f(x, real) takes the tokens and the mask `real` (b, n), True at real tokens; padding is at the end.
    """
    if real.all() or not real.any(1).all():
        raise ValueError("every sequence needs a real token and at least one needs padding")
    generator = torch.Generator().manual_seed(seed)
    mask = real if x.ndim == 2 else real.unsqueeze(-1)
    filled = torch.where(mask, x, _other(x, generator, _largest(x)))
    longer = torch.cat([x, _other(x[:, :2], generator, _largest(x))], 1)
    with _calm(f), torch.no_grad():
        before = f(x, real)
        found = _close("padding-invariant", f(filled, real)[real], before[real], atol)
        if found:
            more = torch.cat([real, torch.zeros_like(real[:, :2])], 1)
            found = _close(
                "padding-invariant (two more padding tokens)",
                f(longer, more)[:, : x.shape[1]][real],
                before[real],
                atol,
            )
    return Finding(True, "padding-invariant: outputs at real tokens stay the same") if found else found


def gradients_reach(module: nn.Module, *inputs) -> Finding:
    """One backward pass gives every parameter a gradient that is finite and not all zero."""
    generator = torch.Generator().manual_seed(0)
    with _calm(module), torch.enable_grad():
        module.zero_grad(set_to_none=True)
        outputs = [t for t in _tensors(module(*inputs)) if t.requires_grad]
        if not outputs:
            return Finding(False, "no output carries a gradient")
        sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs).backward()
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    silent = [name for name, p in named if p.grad is None or not p.grad.any()]
    broken = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    module.zero_grad(set_to_none=True)
    if silent or broken:
        said = [f"no gradient reaches {', '.join(silent)}"] * bool(silent) + [
            f"not finite for {', '.join(broken)}"
        ] * bool(broken)
        return Finding(False, "; ".join(said))
    return Finding(True, f"a finite gradient reaches all {len(named)} parameters")


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for v in value for t in _tensors(v)] if hasattr(value, "__iter__") and not isinstance(value, str) else []


def copy_weights(
    source: nn.Module, target: nn.Module, rename: Callable[[str], str] | dict[str, str] | None = None
) -> None:
    """Copy every parameter and buffer of `source` into `target`; `rename` maps names of `source` to names of `target`.

    Raises ValueError that lists what has no partner or another shape; then nothing was copied.
    """
    if rename is None:
        rename = lambda name: name
    elif isinstance(rename, dict):
        table = rename
        rename = lambda name: table.get(name, name)
    state, wanted = source.state_dict(), target.state_dict()
    moved = {rename(name): t for name, t in state.items()}
    problems = ["two names become one"] * (len(moved) < len(state))
    problems += [f"{k} has no source" for k in wanted if k not in moved] + [
        f"{k} has no target" for k in moved if k not in wanted
    ]
    problems += [
        f"{k}: {tuple(moved[k].shape)} into {tuple(t.shape)}"
        for k, t in wanted.items()
        if k in moved and moved[k].shape != t.shape
    ]
    if problems:
        raise ValueError("weights do not match: " + "; ".join(problems))
    target.load_state_dict(moved)


def agree(f: Callable, g: Callable, *inputs, atol: float = 1e-5) -> Finding:
    """Both give the same output for the same inputs; with `copy_weights` before it, a parity check."""
    with _calm(f, g), torch.no_grad():
        return _close("in agreement", f(*inputs), g(*inputs), atol)


def reduces_to(special: Callable, general: Callable, *inputs, atol: float = 1e-5) -> Finding:
    """In a special case one layer is exactly another, for the outputs and for the gradients by the float inputs."""
    is_float = lambda x: isinstance(x, Tensor) and x.is_floating_point()
    floats = [x.detach().clone().requires_grad_() if is_float(x) else x for x in inputs]
    leaves = [x for x in floats if is_float(x)]
    results = []
    with _calm(special, general), torch.enable_grad():
        for layer in (special, general):
            y = layer(*floats)
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
            grads = (
                torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) if leaves and y.requires_grad else ()
            )
            grads = grads or [None] * len(leaves)
            results.append((y, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]))
    (y, grads), (z, others) = results
    found = _close("equal", y.detach(), z.detach(), atol)
    for a, b in zip(grads, others, strict=True):
        if found:
            found = _close("equal in its gradient", a, b, atol * max(1.0, b.abs().max().item()))
    return found


def decodes_in_parallel(
    parallel: Callable[[Tensor], Tensor], step: Callable, x: Tensor, *, atol: float = 1e-5
) -> Finding:
    """Feeding tokens one by one gives the same outputs as all at once.

    parallel(x) -> (b, n, c);  step(x[:, t:t+1], state) -> ((b, 1, c), state), with state None at the start.
    """
    with _calm(parallel, step), torch.no_grad():
        whole, state, pieces = parallel(x), None, []
        for t in range(x.shape[1]):
            piece, state = step(x[:, t : t + 1], state)
            pieces.append(piece)
        return _close("the same one token at a time", torch.cat(pieces, 1), whole, atol)


def _close(name: str, a: Tensor, b: Tensor, atol: float) -> Finding:
    if a.shape != b.shape:
        return Finding(False, f"not {name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    difference = _gap(a, b)
    worst = difference.max().item() if difference.numel() else 0.0
    if not worst <= atol:
        where = [int(i) for i in torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), a.shape)]
        return Finding(False, f"not {name}: largest difference \u27e8{worst:.2g}\u27e9 at {where}, allowed {atol:g}")
    return Finding(True, f"{name} to {atol:g}")
