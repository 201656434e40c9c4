"""What must hold for the example of every paper: `examples[id]()` gives a small (module or callable, inputs)."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import tfkit.zoo
from tfkit.contracts import causal, gradients_reach
from tfkit.past import remember
from tfkit.zoo.attention import MultiHeadAttention, Reader, padding_mask, watch
from tfkit.zoo.transformer import generate, language_model

ZOO = tfkit.zoo.__path__


def all_examples():
    for found in pkgutil.iter_modules(tfkit.zoo.__path__):
        module = importlib.import_module(f"tfkit.zoo.{found.name}")
        for id, make in getattr(module, "examples", {}).items():
            yield pytest.param(make, id=f"{found.name}-{id}")


def leaves(value):
    """Everything in an output that can be compared, in order."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def same(a, b) -> bool:
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x is y or bool(x == y) for x, y in zip(a, b, strict=True)
    )


def finite(value) -> bool:
    return all(
        bool(torch.isfinite(x).all())
        if isinstance(x, Tensor)
        else math.isfinite(x)
        if isinstance(x, (int, float))
        else True
        for x in leaves(value)
    )


def finite_and_repeatable(f, inputs) -> None:
    before = copy.deepcopy(inputs)
    with torch.no_grad():
        first = f(*inputs)
        again = f(*inputs)
    assert first is not None, "it returns nothing"
    assert finite(first), "the output has nan or inf"
    assert same(first, again), "the same input gives another output: give what is random a generator or a seed"
    assert same(inputs, before), "it changes its inputs in place"


def state_dict_carries_everything(model: nn.Module, other: nn.Module, inputs) -> None:
    """`other` is a second model of the same kind; with the state of the first it must do the same."""
    with torch.no_grad():
        for t in other.state_dict().values():
            if t.is_floating_point():
                t.add_(1.0)  # so that a constructor that always draws the same weights proves nothing
        other.eval().load_state_dict(model.state_dict(), strict=True)
        assert same(model(*inputs), other(*inputs)), "a new model with the same state dict gives another output"


@pytest.mark.parametrize("make", list(all_examples()))
def test_contracts(make):
    f, inputs = make()
    assert isinstance(inputs, tuple), "an example is (module or callable, tuple of inputs)"
    if isinstance(f, nn.Module):
        f.eval()
    finite_and_repeatable(f, inputs)
    if isinstance(f, nn.Module):
        if any(p.requires_grad for p in f.parameters()):
            found = gradients_reach(f, *inputs)
            assert found, str(found)
        state_dict_carries_everything(f, make()[0], inputs)


# What an engineer takes for granted in training, saving and writing. A chapter declares what one of its layers cannot
# do by nature beside its examples, `exceptions = {"paper_id": {"remember": "the reason"}}`; the layer must then raise
# a clear error.


@functools.cache
def modules():
    return {found.name: importlib.import_module(f"tfkit.zoo.{found.name}") for found in pkgutil.iter_modules(ZOO)}


def exception(where: str, contract: str) -> str | None:
    module, _, id = where.partition("-")
    return getattr(modules()[module], "exceptions", {}).get(id, {}).get(contract)


def held(contract: str):
    """Runs a contract over every example that is a module; `contract(f, inputs, reason)` asserts."""

    def decorate(check):
        cases = [pytest.param(case.values[0], case.id, id=case.id) for case in all_examples()]

        @pytest.mark.parametrize("make, where", cases)
        def test(make, where):
            torch.manual_seed(0)
            f, inputs = make()
            if not isinstance(f, nn.Module):
                pytest.skip("a function, not a layer")
            run = functools.partial(check, f.eval(), inputs)
            if "make" in inspect.signature(check).parameters:
                run = functools.partial(run, make)
            if exception(where, contract) is None:
                return run()
            with pytest.raises(
                (ValueError, NotImplementedError, RuntimeError)
            ) as error:  # RuntimeError: torch itself refuses
                run()
            assert len(str(error.value)) > 10, "the error does not say why"

        test.__name__ = check.__name__
        test.__doc__ = check.__doc__
        return test

    return decorate


def floats(value):
    """The float tensors of an output."""
    return [t for t in leaves(value) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def tokens_of(f, inputs):
    """The place among the inputs of a text that gives an output per token, and its length; (None, 0) without one."""
    with torch.no_grad():
        y = f(*inputs)
    if isinstance(y, Tensor) and y.ndim == 3:
        for i, x in enumerate(inputs):
            token_tensor = isinstance(x, Tensor) and x.ndim == (3 if x.is_floating_point() else 2)
            if token_tensor and x.shape[:2] == y.shape[:2]:
                return i, x.shape[1]
    return None, 0


def in_pieces(f, inputs, i, sizes) -> Tensor:
    """The outputs of the text inputs[i], fed in pieces; what else has a value per token is cut with it."""
    takes_start = "start" in inspect.signature(f.forward).parameters
    cut = [isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == inputs[i].shape[:2] for x in inputs]
    if hasattr(f, "decode"):
        memory = f.encode(*inputs[:i])
        call = lambda piece, at: f.decode(piece[i], memory, start=at)
    else:
        call = lambda piece, at: f(*piece, **({"start": at} if takes_start else {}))
    found, at = [], 0
    for size in sizes:
        found.append(call([x[:, at : at + size] if c else x for x, c in zip(inputs, cut, strict=True)], at))
        at += size
    return torch.cat(found, 1)


def remembers(f, inputs) -> None:
    i, n = tokens_of(f, inputs)
    if i is None or n < 5:
        pytest.skip("no output for each token of a text")
    sees_ahead = not causal(lambda x: f(*inputs[:i], x, *inputs[i + 1 :]), inputs[i])
    if sees_ahead:
        with pytest.raises(ValueError, match="cannot be fed in pieces"), remember(f):
            pass
        return
    f = copy.deepcopy(f).double()  # an identity, so that no layer's rounding counts
    inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        whole = f(*inputs)
        with remember(f) as past:
            pieces = in_pieces(f, inputs, i, (1, 3, n - 4))
            kept = past.numbers()
        with remember(f) as past:
            one_by_one = in_pieces(f, inputs, i, (1,) * n)
            assert past.numbers() == kept, "what is kept depends on how the text was cut"
        with remember(f) as past:
            in_pieces(f, inputs, i, (1, n // 2 - 1))
            assert kept <= 2 * (n + 1) // (n // 2) * past.numbers() + 8, "it keeps more than in proportion to the text"
    scale = float(whole.abs().max())
    torch.testing.assert_close(pieces, whole, atol=1e-8 * scale, rtol=0)
    torch.testing.assert_close(one_by_one, whole, atol=1e-8 * scale, rtol=0)


@held("remember")
def test_a_text_may_come_in_pieces(f, inputs):
    """Inside `remember` pieces give the whole; a layer that sees later tokens refuses."""
    remembers(f, inputs)


# Every mixer of `mechanisms`, and all that the lab finds, in a language model: writing goes on from what layers keep.

TEXTS, TOKENS, WIDTH, BLOCKS = 2, 128, 64, 2
KEEPS = {  # how many numbers a text of n tokens leaves, where it is not as many as keys and values, or more
    "constant": """Generative GenerativeWithContext CausalWindow causal_feature_attention causal_log_feature_attention
    AFT AtlasMemory GatedDelta S4D LegendreMemoryUnit RunningMean ShortConvolution MambaMixer segment_memory
    Mamba2Mixer GatedLinearAttention state_spaces-Mamba-2 state_spaces-gated_linear_attention
    compressed_memory linear_attention-linear linear_attention-Performer linear_attention-cosFormer
    linear_attention-Taylor,_16_heads linear_attention-AFT-simple linear_attention-AFT-local
    sparse_attention-causal_window memory-segment_memory memory-compressed_memory memory-delta_rule memory-omega_rule
    memory-ATLAS memory-gated_delta_rule attention_variants-generative state_spaces-S4D state_spaces-LMU
    state_spaces-Mamba""".split(),
    "fewer": ["Combiner", "sparse_attention-Combiner", "patch_mixer", "sequence_compression-latent_patches_(BLT)",
              "attention_variants-no_pairs", "attention_variants-grouped-query", "attention_variants-multi-query",
              "memory-relative_attention", "XLAttention", "Avey", "state_spaces-Avey"],
}  # fmt: skip


def mechanisms():
    """Name to a function that makes (layer, inputs)."""
    return {f"{name}-{label}".replace(" ", "_"): make for name, module in modules().items()
            for label, make in getattr(module, "mechanisms", {}).items()}  # fmt: skip


def written(model, ids, steps):
    """What `generate` says, by reading all tokens again for each."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def writes_on(name, make) -> bool:
    """Whether `make()` is a mixer of a language model; then asserts that it writes from its state as from the text."""
    torch.manual_seed(0)
    ids = torch.randint(20, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), checks_of_shapes_off():
        try:
            model = language_model(20, WIDTH, BLOCKS, mixer=make).eval()
        except ValueError as error:
            assert "later tokens" in str(error), f"{name}: {error}"
            return False
        try:
            model(ids[:, :5]), model(ids)
            able = not any(getattr(part, "no_past", None) for part in model.modules())
        except Exception:
            able = False
        if not able:
            with pytest.raises(ValueError) as error:
                generate(model, ids[:1, :3], 2)
            assert len(str(error.value)) > 10, f"{name}: the error does not say why"
            return False
        assert torch.equal(generate(model, ids[:, :5], 9), written(model, ids[:, :5], 9)), f"{name} writes otherwise"
        with remember(model) as past:
            model(ids[:, : TOKENS // 2])
            half = past.numbers()
            model(ids[:, TOKENS // 2 :], start=TOKENS // 2)
            whole = past.numbers()
    kind = next((kind for kind, named in KEEPS.items() if name in named), "keys and values")
    most, all_keys = (
        {"constant": 1, "fewer": 2.001, "keys and values": 2.001}[kind],
        2 * TEXTS * BLOCKS * WIDTH * TOKENS,
    )
    assert whole <= most * half, f"{name}: {half} numbers, and {whole} for twice the text"
    small = whole < all_keys or kind == "constant"
    assert small == (kind != "keys and values" or whole == 0), (
        f"{name} keeps {whole} numbers, keys and values are {all_keys}"
    )
    return True


@pytest.mark.parametrize("name", mechanisms())
def test_every_mechanism_writes_on_from_what_it_keeps(name):
    """`generate` equals recomputation, and the state is as small as promised; or `remember` says why not."""
    make = mechanisms()[name]
    _, inputs = make()
    if len(inputs) != 1 or inputs[0].shape[1:] != (TOKENS, WIDTH) or not writes_on(name, lambda: make()[0]):
        pytest.skip("no mixer of a language model")


@pytest.mark.parametrize("slot, least", [("mixer", 25), ("attend", 10)])
def test_every_part_of_the_lab_writes_on_from_what_it_keeps(slot, least):
    """Parts that take an attend function get a causal one; an attend function stands in `MultiHeadAttention`."""
    lab, wrote = modules()["lab"], 0
    names = lab.house_names(lab.Sizes(WIDTH, 4), TOKENS)
    for label, part in lab.parts(slot).items():
        words = part.expression(names, "attention.causal_attention" if part.inner else "")
        if "mechanisms" not in words:
            make = functools.partial(lab.evaluate, words)
            mixer = make if slot == "mixer" else lambda make=make: MultiHeadAttention(WIDTH, 4, attend=make())
            wrote += writes_on(label.replace(" ", "_"), mixer)
    assert wrote >= least


def compared(f, inputs, change):
    """Outputs and gradients of the weights, in float32 and after `change(f, inputs)` gives how to call it."""
    found = []
    for narrow in (False, True):
        model = copy.deepcopy(f)
        call, model = change(model, inputs) if narrow else (lambda m=model: m(*inputs), model)
        outputs = floats(call())
        for p in model.parameters():
            p.grad = None
        generator = torch.Generator().manual_seed(0)
        real = [(torch.view_as_real(y) if y.is_complex() else y).float() for y in outputs]
        total = sum(y.mul(torch.randn(y.shape, generator=generator)).sum() for y in real)
        if total.requires_grad:
            total.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(([y.detach() for y in outputs], [g.float().flatten() for g in grads]))
    return found


def near(a: list[Tensor], b: list[Tensor], bound: float, what: str) -> None:
    assert len(a) == len(b), f"another number of {what}s"
    for x, _ in zip(a, b, strict=True):
        assert torch.isfinite(x).all(), f"{what} not finite"
    if a:
        x, y = (torch.cat([torch.view_as_real(t).flatten() if t.is_complex() else t.flatten() for t in ts]).double()
                for ts in (a, b))  # fmt: skip
        gap = float((x - y).norm() / y.norm().clamp(min=1e-12))
        assert gap < bound, f"relative error of the {what}: {gap:.3f}, allowed {bound}"


def rounded(f, inputs):
    """Weights and inputs that bfloat16 holds exactly, so that only the computation differs."""
    with torch.no_grad():
        for t in [*f.parameters(), *f.buffers()]:
            if t.is_floating_point():
                t.copy_(t.bfloat16())
    return tuple(x.bfloat16().float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def as_weights(model, inputs):
    model = model.bfloat16()
    narrow = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    return lambda: model(*narrow), model


def as_autocast(model, inputs):
    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)

    return call, model


def stays_near(f, inputs, change) -> None:
    inputs = rounded(f, inputs)
    (wide, wide_grads), (narrow, narrow_grads) = compared(f, inputs, change)
    near(narrow, wide, 0.05, "output")
    near(narrow_grads, wide_grads, 0.15, "gradient")


@held("bf16")
def test_bfloat16_weights_stay_near_float32(f, inputs):
    stays_near(f, inputs, as_weights)


@held("autocast")
def test_bfloat16_autocast_stays_near_float32(f, inputs):
    stays_near(f, inputs, as_autocast)


@held("padding")
def test_padding_leaks_nothing(f, inputs):
    """What stands in padded tokens, left or right, changes no real output; a text of padding alone makes no NaN."""
    i, n = tokens_of(f, inputs)
    names = inspect.signature(f.forward).parameters
    given = next((name for name in ("mask", "real") if name in names), None)
    if i is None or n < 5 or given is None or len(inputs) > 1 or hasattr(f, "decode"):
        pytest.skip("it takes no padding mask, or gives no output per token")
    x = inputs[0]
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    real[0, :2], real[-1, n - 2 :] = False, False
    generator = torch.Generator().manual_seed(1)
    if x.is_floating_point():
        other = x + 3 * torch.randn(x.shape, generator=generator) * ~real[..., None]
    else:
        other = torch.where(real, x, (x + 1) % (int(x.max()) + 1))
    call = lambda x, real: f(x, **{given: padding_mask(real) if given == "mask" else real})
    with torch.no_grad():
        before, after = call(x, real), call(other, real)
    gap = float((before - after)[real].abs().max())
    assert gap < 1e-5 * max(1.0, float(before.abs().max())), f"padding leaks: {gap:.2g}"
    real[0] = False
    y = call(x, real)
    assert torch.isfinite(y).all(), "a text of padding alone makes NaN"
    y.square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in f.parameters()), "NaN in the gradients"


class Counted:
    """An attend function that counts its calls, and is else the same."""

    def __init__(self, attend):
        self.attend, self.calls = attend, 0

    def __call__(self, *given, **named):
        self.calls += 1
        return self.attend(*given, **named)

    def __getattr__(self, name):
        return getattr(self.attend, name)


@held("watch")
def test_watch_sees_every_call_of_attend(f, inputs):
    """Each time a layer asks its attend function, whoever watches it is asked first."""
    layers = {name: m for name, m in f.named_modules() if isinstance(m, Reader)}
    if not layers:
        pytest.skip("no attention layer")
    for layer in layers.values():
        vars(layer)["attend"] = Counted(layer.attend)  # in front of a submodule or a method of this name
    seen = dict.fromkeys(layers, 0)

    def count(name, what):
        seen[name] += 1

    with torch.no_grad(), watch(f, count):
        f(*inputs)
    assert seen == {name: layer.attend.calls for name, layer in layers.items()}


@held("masks")
def test_a_mask_of_three_axes_is_refused(f, inputs):
    """(b, 1, n) and (b, n, n) could be meant for texts or for heads, and numbers are no mask: ValueError."""
    i, n = tokens_of(f, inputs)
    if i is None or "mask" not in inspect.signature(f.forward).parameters or hasattr(f, "decode"):
        pytest.skip("it takes no mask, or gives no output per token")
    b = len(inputs[i])
    with checks_of_shapes_off(), torch.no_grad():
        for shape in ((b, 1, n), (b, n, n)):
            with pytest.raises(ValueError) as error:
                f(*inputs, mask=torch.ones(shape, dtype=torch.bool))
            assert str(shape) in str(error.value), f"{shape} is not in: {error.value}"


@held("pickle")
def test_copies_give_the_same(f, inputs):
    with torch.no_grad():
        y = f(*inputs)
        assert same(copy.deepcopy(f)(*inputs), y), "a deep copy gives another output"
        assert same(pickle.loads(pickle.dumps(f))(*inputs), y), "a pickled copy gives another output"


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@held("default dtype")
def test_another_default_dtype_changes_nothing(f, inputs, make):
    """A float32 layer stays one, and one that is built in float64 is the same in that arithmetic, too."""
    with torch.no_grad():
        y = f(*inputs)
        with default_dtype(torch.float64):
            again = f(*inputs)
            for a, b in zip(leaves(y), leaves(again), strict=True):
                assert not isinstance(a, Tensor) or a.dtype == b.dtype, f"{a.dtype} became {b.dtype}"
            near(floats(again), floats(y), 1e-6, "output")
            wide, _ = make()
            wide = wide.eval()
            kinds = {p.dtype for p in wide.parameters()}
            assert kinds <= {torch.float64, torch.complex128}, f"built with {kinds}"
            wide.load_state_dict(f.state_dict())
            double = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
            found = floats(wide(*double))
            near(found, floats(copy.deepcopy(f).double()(*double)), 1e-5, "output of what is built in float64")
            near(found, floats(y), 1e-3, "output in float64")  # five Newton-Schulz rounds in float32 lose the most


COMPILER = """
import importlib, json, sys, torch
from torch import nn
answers = {}
for where in sys.argv[1:]:
    module, _, id = where.partition("-")
    torch.manual_seed(0)
    f, inputs = importlib.import_module("tfkit.zoo." + module).examples[id]()
    f = f.eval() if isinstance(f, nn.Module) else f
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            y, z = f(*inputs), torch.compile(f, fullgraph=True, backend="eager")(*inputs)
        answers[where] = "" if not isinstance(y, torch.Tensor) or torch.allclose(y, z, atol=1e-5) else "another output"
    except Exception as error:
        answers[where] = (str(error).strip() or type(error).__name__)[:300]
print(json.dumps(answers))
"""


def test_examples_compile_into_one_graph():
    """torch.compile(fullgraph=True) by its cheap back end; one example of each chapter, or all with TFKIT_COMPILE=1.

    In a process of its own, where signatures are not checked: the compiler would have to trace the checks.
    """
    wanted, chapters_seen = [], set()
    for case in all_examples():
        chapter = case.id.partition("-")[0]
        if os.environ.get("TFKIT_COMPILE") or (chapter not in chapters_seen and chapter not in ("lab", "atlas")):
            chapters_seen.add(chapter)
            wanted.append(case.id)
    done = subprocess.run([sys.executable, "-c", COMPILER, *wanted], capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout.splitlines()[-1])
    assert list(answers) == wanted
    excused = {where for where in wanted if exception(where, "compile")}
    found = {where: answer for where, answer in answers.items() if bool(answer) != (where in excused)}
    assert not found, f"expected otherwise (an empty answer means that it compiles): {found}"


@held("func")
def test_func_grad_gives_the_gradients(f, inputs):
    parameters = {name: p for name, p in f.named_parameters() if p.requires_grad}
    if not parameters:
        pytest.skip("no parameters")

    def total(p):
        return sum(
            (y.abs() if y.is_complex() else y).square().sum() for y in floats(torch.func.functional_call(f, p, inputs))
        )

    expected = torch.autograd.grad(total(parameters), list(parameters.values()), allow_unused=True)
    found = torch.func.grad(total)({name: p.detach() for name, p in parameters.items()})
    pairs = [(found[name], g) for name, g in zip(parameters, expected, strict=True) if g is not None]
    near([a for a, _ in pairs], [b for _, b in pairs], 1e-4, "gradient")


@held("empty")
def test_empty_batches_and_texts(f, inputs):
    """No rows, and texts without tokens: an output without NaN, or a ValueError that has their shape."""
    for axis in (0, 1):
        x = inputs[0]
        batched = isinstance(x, Tensor) and x.ndim >= (3 if x.is_floating_point() else 2)
        if not batched or (axis == 1 and x.ndim == 4):
            continue  # no batch, or no tokens, at that place
        size = x.shape[axis]
        cut = [x.narrow(axis, 0, 0) if isinstance(x, Tensor) and x.ndim > axis and x.shape[axis] == size else x
               for x in inputs]  # fmt: skip
        try:
            with torch.no_grad():
                y = f(*cut)
        except ValueError as error:
            assert re.search(r"(?<!\d)0(?!\d)", str(error)), f"0 is not in: {error}"
            continue
        assert all(torch.isfinite(t).all() for t in floats(y)), f"axis {axis} empty: not finite"


@held("sizes")
def test_wrong_sizes_are_refused_with_their_values(f, inputs):
    """A text without a batch raises ValueError with its shape, or gives what it gives in a batch, where a layer works
    on each token alone. Another width raises an error that has the number.
    """
    x = inputs[0]
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3):
        pytest.skip("it takes no tokens (b, n, d)")
    d = x.shape[-1]
    if not any(p.shape and d in p.shape for p in f.parameters()):
        pytest.skip("it has no width")
    with checks_of_shapes_off(), torch.no_grad():
        try:
            alone = f(x[0], *inputs[1:])
            near(floats(alone), floats(f(*inputs)[0]), 1e-5, "output without a batch")
        except ValueError as error:
            assert str(tuple(x[0].shape)) in str(error), f"{tuple(x[0].shape)} is not in: {error}"
        with pytest.raises((ValueError, RuntimeError)) as error:  # a linear layer of torch says it well enough
            f(torch.cat([x, x[..., :1]], -1), *inputs[1:])
        assert re.search(rf"(?<!\d){d + 1}(?!\d)", str(error.value)), f"{d + 1} is not in: {error.value}"


@contextlib.contextmanager
def checks_of_shapes_off():
    """What readers meet: the shapes in signatures are checked in tests alone."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


# Layers with one fault each, to show that the contracts find it.


class Idle(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.unused = nn.Parameter(torch.ones(1))


class Forgetful(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.scale = torch.rand(1)

    def forward(self, x):
        return super().forward(x) * self.scale


X = (torch.ones(2, 3),)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: (nn.Linear(3, 3), [torch.ones(2, 3)]), "tuple of inputs"),
        (lambda: (lambda x: None, X), "returns nothing"),
        (lambda: (lambda x: {"y": x / 0}, X), "nan or inf"),
        (lambda: (lambda x: (x, math.nan), X), "nan or inf"),
        (lambda: (lambda x: x + torch.rand(()), X), "another output"),
        (lambda: (lambda x: x.mul_(0), (torch.ones(2, 3),)), "in place"),
        (lambda: (Idle(), X), "no gradient reaches unused"),
        (lambda: (Forgetful(), X), "same state dict"),
    ],
    ids=["list", "nothing", "inf", "nan", "random", "in_place", "idle_parameter", "lost_state"],
)
def test_a_fault_is_found(make, message):
    with pytest.raises(AssertionError, match=message):
        test_contracts(make)


def test_a_good_example_passes():
    test_contracts(lambda: (nn.Linear(3, 3), X))
    test_contracts(lambda: (lambda tokens: {"count": len(tokens), "text": "ok", "tokens": tokens}, (["a", "b"],)))


def test_shapes_are_checked_when_zoo_functions_are_called():
    attention = pytest.importorskip("tfkit.zoo.attention").attention
    q, k = torch.ones(1, 2, 3), torch.ones(1, 2, 4)
    with pytest.raises(Exception, match="(?s)Type-check error.*'k'|Type-check error.*k"):
        attention(q, k, k)
