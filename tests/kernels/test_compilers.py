"""torch.compile without graph breaks, export, fake tensors, autocast and torch.func, over all calls of all kernels."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import DEVICE, INTERPRET, bench
from kernels._measure import evaluate
from kernels.cross_entropy import cross_entropy
from kernels.decode_attention import decode_attention
from kernels.dropout import Dropout
from kernels.flash_attention import flash_attention
from kernels.int8_matmul import Int8Linear
from kernels.layer_norm import LayerNorm, layer_norm
from kernels.linear_attention import linear_attention, normalized_linear_attention, retention_decay
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.matmul import Linear, matmul
from kernels.packing import pack, unpack
from kernels.rms_norm import RMSNorm, rms_norm
from kernels.rotary import rotary
from kernels.scan import linear_scan
from kernels.selective_scan import selective_scan
from kernels.varlen_attention import varlen_attention


def make(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def positive(*shape):
    return make(*shape).abs().clamp(0.05, 0.95)


def whole(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def entry_call(name):
    entry = next(e for e in bench.entries() if e["name"] == name)
    size = entry.get("tiny") or bench.tiny(entry["sizes"][0])
    torch.manual_seed(0)
    return entry["ours"], entry["inputs"](size, torch.float32, DEVICE), entry["differentiate"]


QKV = (make(1, 4, 6, 8), make(1, 2, 9, 8), make(1, 2, 9, 5))
OPTIONS = {  # what the benchmarks do not use: function, inputs, positions to differentiate by
    "flash, window, table, mask, lse": (
        lambda q, k, v, bias, mask: flash_attention(q, k, v, True, 4, bias, return_lse=True, mask=mask),
        (*QKV, make(4, 6, 9), make(1, 1, 6, 9) > -1), (0, 1, 2, 3),
    ),
    "flash, slopes": (lambda q, k, v, s: flash_attention(q, k, v, bias=s), (*QKV, positive(4)), (0, 1, 2, 3)),
    "layer norm, nothing to learn": (layer_norm, (make(5, 8),), (0,)),
    "rms norm, wide weight": (rms_norm, (make(5, 8), make(8)), (0, 1)),
    "rotary, learned": (rotary, (make(2, 4, 8), make(4, 4), make(4, 4)), (0, 1, 2)),
    "cross-entropy, ignored": (cross_entropy, (make(2, 3, 7), whole(1, 2, -100, 3, 0, 6).view(2, 3)), (0,)),
    "matmul, relu": (lambda a, b: matmul(a, b, activation="relu"), (make(2, 3, 5), make(5, 4)), (0, 1)),
    "linear attention, state": (
        lambda q, k, v, s: linear_attention(q, k, v, retention_decay(2, q.device), state=s, return_state=True),
        (make(1, 2, 70, 8), make(1, 2, 70, 8), make(1, 2, 70, 6), make(1, 2, 8, 6)), (0, 1, 2, 3),
    ),
    "normalized linear attention": (
        normalized_linear_attention, (positive(1, 2, 5, 8), positive(1, 2, 5, 8), make(1, 2, 5, 6)), (0, 1, 2),
    ),
    "scan, state": (
        lambda a, x, s: linear_scan(a, x, s, True), (positive(2, 5, 3), make(2, 5, 3), make(2, 3)), (0, 1, 2),
    ),
    "selective scan, state": (
        lambda *given: selective_scan(*given, return_state=True),
        (make(1, 5, 4), positive(1, 5, 4), -positive(4, 3), make(1, 5, 3), make(1, 5, 3), make(4), make(1, 4, 3)),
        range(7),
    ),
    "varlen, causal": (
        lambda q, k, v, o: varlen_attention(q, k, v, o, 5, True),
        (make(9, 4, 8), make(9, 2, 8), make(9, 2, 8), whole(0, 4, 9)), (0, 1, 2),
    ),
    "decode, paged": (
        decode_attention,
        (make(2, 4, 8), make(5, 2, 4, 8), make(5, 2, 4, 8), whole(3, 7), whole(0, 1, 2, 3).view(2, 2)), (),
    ),
}  # fmt: skip
CALLS = {name: partial(entry_call, name) for name in sorted({e["name"] for e in bench.entries()} - {"pack"})}
CALLS |= {name: (lambda call=call: call) for name, call in OPTIONS.items()}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_a_graph_break(name):
    """Forward and backward in one graph each, the same bits as without the compiler."""
    function, inputs, wrt = CALLS[name]()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, eager = evaluate(compiled, inputs, wrt), evaluate(function, inputs, wrt)
    assert len(ours) == len(eager)
    for got, want in zip(ours, eager, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
        assert torch.equal(got, want) or (got - want).abs().max() < 1e-5 * (1 + want.abs().max())


def test_pack_is_compiled_where_sizes_may_depend_on_numbers():
    """How many tokens are real is a number, so torch must be told that such a size is welcome; then nothing breaks."""
    x, mask = make(3, 5, 4), make(3, 5) > 0
    both = lambda x, mask: unpack(*pack(x, mask), 5)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        out = torch.compile(both, fullgraph=True, backend="eager")(x, mask)
    assert torch.equal(out, both(x, mask))


class Block(torch.nn.Module):
    """Most kernels in one model: what export and autocast meet."""

    def __init__(self, width=16, words=11):
        super().__init__()
        self.norm, self.last = LayerNorm(width), RMSNorm(width)
        self.qkv, self.up, self.drop = Linear(width, 3 * width), Linear(width, width, activation="gelu"), Dropout(0.0)
        self.words = torch.nn.Parameter(make(words, width))

    def forward(self, x, targets):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + flash_attention(q, k, v, causal=True).transpose(1, 2).flatten(-2)
        x, _ = self.last(self.drop(self.up(x)), x)
        return linear_cross_entropy(x, self.words, targets)


@pytest.fixture
def block():
    return Block().to(DEVICE), (make(2, 7, 16), whole(*range(7), *range(7), dtype=torch.int64).view(2, 7))


def test_exported(block):
    model, inputs = block
    program = torch.export.export(model, inputs, strict=False)
    names = {str(node.target) for node in program.graph.nodes}
    assert {
        f"tfkit.{name}_compute.default" for name in ("layer_norm", "rms_norm", "matmul", "flash_attention")
    } <= names
    assert torch.allclose(program.module()(*inputs), model(*inputs))


def test_fake_tensors_have_the_shapes_and_gradients_of_real_ones(block):
    model, (x, targets) = block
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(x).requires_grad_()
    with mode:
        loss = torch.func.functional_call(
            model, {n: mode.from_tensor(p) for n, p in model.named_parameters()}, (fake, mode.from_tensor(targets))
        )
        (grad,) = torch.autograd.grad(loss, fake)
    assert loss.shape == () and grad.shape == x.shape and grad.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(block, dtype):
    """Products in 16 bits, parameters and their gradients in float32, near what float32 gives."""
    model, inputs = block
    exact = model(*inputs)
    with torch.autocast(DEVICE, dtype):
        assert model.qkv(inputs[0]).dtype == dtype
        assert linear_attention(*(make(1, 2, 4, 8),) * 3).dtype == decode_attention(make(1, 2, 8), *QKV[1:2] * 2).dtype
        loss = model(*inputs)
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_norms_take_weights_of_another_type():
    x, weight = make(3, 8).bfloat16().requires_grad_(), make(8).requires_grad_()
    for norm in (layer_norm, rms_norm):
        y = norm(x, weight)
        gx, gw = torch.autograd.grad(y.float().sum(), (x, weight))
        assert (y.dtype, gx.dtype, gw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert torch.allclose(y.float(), norm(x.detach().float(), weight), atol=0.05)


def test_a_layer_of_8_bits_keeps_its_scale_when_the_model_changes_type():
    layer = Int8Linear(torch.nn.Linear(8, 4, device=DEVICE))
    exact, x = layer(make(3, 8)), make(3, 8)
    half = layer.bfloat16()
    assert half.scale.dtype == torch.float32 and half.bias.dtype == torch.bfloat16
    assert half.weight_int8.dtype == torch.int8 and torch.allclose(half(x.bfloat16()).float(), exact, atol=0.05)


def test_torch_func():
    """grad works; vmap refuses with torch's own reason, since a kernel has no rule for one more axis."""
    x, weight = make(3, 8), make(8)
    function = lambda weight: rms_norm(x, weight).square().sum()
    weight_ = weight.clone().requires_grad_()
    assert torch.equal(torch.func.grad(function)(weight), torch.autograd.grad(function(weight_), weight_)[0])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(rms_norm, (0, None))(make(2, 3, 8), weight)


@pytest.mark.skipif(not INTERPRET, reason="a second GPU stands in for itself")
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """With tensors on the second GPU while the first is current, the launch happens inside the second one's context."""
    from contextlib import contextmanager

    from kernels._runtime import operator

    entered, seen = [], []

    @contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.pop()

    class Elsewhere:
        device = torch.device("cuda", 1)

    @operator("(Tensor x) -> Tensor", lambda x: x)
    def where(x):
        seen.append(list(entered))

    monkeypatch.setattr("kernels._runtime.traced", lambda x: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    where(Elsewhere())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    where(Elsewhere())
    assert seen == [[torch.device("cuda", 1)], []]


OPERATORS = {  # the arguments of an operator
    "rotary_compute": (make(2, 4, 8), make(4, 4), make(4, 4), False, True),
    "flash_attention_compute": (*QKV, None, positive(4), None, 0.3, 2**30, 2**30),
    "linear_attention_compute": (make(1, 2, 70, 8), make(1, 2, 70, 8), make(1, 2, 70, 6), None, None, 1.0, True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_torch_s_rules(name):
    """torch's own check: the schema, fake shapes and strides, and no result that is a view of an argument."""
    op = getattr(torch.ops.tfkit, name).default
    torch.library.opcheck(op, OPERATORS[name], test_utils=("test_schema", "test_faketensor"))
