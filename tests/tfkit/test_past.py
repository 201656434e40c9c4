"""The protocol by which layers keep what they need of earlier tokens."""

import copy
import math
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn

from tfkit.past import State, looks_back, one_pass, recall, remember, with_past


class Echo(nn.Module):
    """x_t + x_{t-1}, with a learned factor; keeps one token."""

    def __init__(self, width=3):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x):
        state = recall(self)
        before = state["last"] if state else torch.zeros_like(x[:, :1])
        if state is not None and x.shape[1]:
            state["last"] = x[:, -1:]
        return x + self.scale * torch.cat([before, x], 1)[:, : x.shape[1]]


class Sums(nn.Module):
    """Sums of all tokens so far, from stored tokens; `most` of them at most."""

    def __init__(self, most=math.inf):
        super().__init__()
        self.most = most

    def forward(self, x):
        state, n = recall(self), x.shape[1]
        if state is not None:
            x = state.append("tokens", x, dim=1, most=self.most)
        m = x.shape[1]
        back = torch.arange(m)[:, None] - torch.arange(m)
        return (((back >= 0) & (back <= self.most)).float() @ x)[:, m - n :]


def fed(model, x, *sizes):
    with remember(model):
        return torch.cat([model(piece) for piece in x.split(list(sizes), 1)], 1)


X = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("sizes", [(7,), (1, 3, 3), (1,) * 7, (6, 1), (0, 3, 0, 4)])
@pytest.mark.parametrize("make", [Echo, Sums, partial(Sums, 2), lambda: nn.Sequential(Echo(), Sums(1), Echo())])
def test_pieces_give_the_whole(make, sizes, no_grad):
    model = make()
    with torch.set_grad_enabled(not no_grad):
        torch.testing.assert_close(fed(model, X, *sizes), model(X))
        assert torch.equal(model(X), model(X)), "nothing is left over"


def test_a_layer_used_twice_has_two_pasts():
    echo = Echo()
    model = nn.Sequential(echo, nn.Tanh(), echo, echo)
    torch.testing.assert_close(fed(model, X, 2, 1, 4), model(X))
    with remember(model) as past:
        model(X)
        assert past.numbers() == 3 * 2 * 3


def test_gradients_through_pieces_are_those_of_the_whole():
    model, x = nn.Sequential(Echo(), Sums(), Echo()), X.clone().requires_grad_()
    outputs = fed(model, x, 3, 1, 3), model(x)
    grads = [torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) for y in outputs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_append_neither_copies_per_token_nor_shows_what_it_may_not():
    state, rooms = State(), set()
    with torch.no_grad():
        for t in range(300):
            whole = state.append("x", torch.full((2, 1, 3), float(t)), dim=1)
            rooms.add(whole.untyped_storage().data_ptr())
            assert whole.shape == (2, t + 1, 3)
            assert torch.equal(whole[0, :, 0], torch.arange(t + 1.0))
        assert len(rooms) <= 5, "64 tokens of room, doubled when full"
        for t in range(300, 700):
            seen = state.append("x", torch.full((2, 1, 3), float(t)), dim=1, most=4)
            assert state["x"].shape[1] == 4
        assert seen[0, :, 0].tolist() == [695, 696, 697, 698, 699]
        assert state["x"].untyped_storage().nbytes() < 2 * 70 * 3 * 4 + 1, "a window needs little room"
        state["x"] = state["x"] + 1  # a layer may write it anew
        assert state.append("x", torch.zeros(2, 1, 3), dim=1)[0, :, 0].tolist() == [697, 698, 699, 700, 0]


def test_append_with_and_without_gradients_in_turn():
    state, x = State(), torch.randn(2, 9, 3)
    for t, wanted in enumerate((False, True, False, False, True, True, False, False, False)):
        with torch.set_grad_enabled(wanted):
            assert torch.equal(state.append("x", x[:, t : t + 1], dim=1), x[:, : t + 1])


@pytest.mark.parametrize("width", [0, 3, 5])
def test_keys_and_values_are_written_together(width):
    layer, attend = nn.Identity(), lambda q, k, v: None
    attend.looks_back = 4
    k, v, model = torch.randn(2, 2, 9, 3), torch.randn(2, 2, 9, width), nn.Sequential(layer)
    for given in (v, v[:, :1]):  # values of another number of heads have a place of their own
        with torch.no_grad(), remember(model) as past:
            for t in range(9):
                past.asked.clear()
                past.depth = 1
                found = with_past(layer, attend, k[:, :, t : t + 1], given[:, :, t : t + 1])
                assert torch.equal(found[0], k[:, :, max(t - 4, 0) : t + 1])
                assert torch.equal(found[1], given[:, :, max(t - 4, 0) : t + 1])
            assert past.numbers() == 4 * (k[:, :, 0].numel() + given[:, :, 0].numel())


def test_append_refuses_another_batch():
    state = State()
    state.append("k", torch.zeros(2, 4, 1, 3))
    for bad in (torch.zeros(1, 4, 1, 3), torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"\(2, 4, 1, 3\)"):
            state.append("k", bad)


def test_inference_mode_and_plain_mode_may_alternate():
    model = Sums()
    with remember(model), torch.no_grad():
        with torch.inference_mode():
            pieces = [model(X[:, :2])]
        pieces.append(model(X[:, 2:3]))
        with torch.inference_mode():
            pieces.append(model(X[:, 3:]))
    torch.testing.assert_close(torch.cat(pieces, 1), model(X))


def test_select_goes_on_with_other_rows():
    model, rows = nn.Sequential(Echo(), Sums()), torch.tensor([1, 1, 0])
    with torch.no_grad(), remember(model) as past:
        model(X[:, :4])
        past.select(rows)
        torch.testing.assert_close(model(X[rows, 4:]), model_whole(model, X[rows])[:, 4:])


def model_whole(model, x):
    with remember(model):  # nested: a past of its own
        return model(x)


def test_what_two_layers_share_is_counted_once():
    class Keeps(nn.Module):
        def forward(self, x, shared=None):
            recall(self)["x"] = x
            recall(self)["count"] = 4
            return x

    with remember(nn.Sequential(Keeps(), Keeps())) as past:
        past.model(X)
        assert past.numbers() == X.numel() + 2
        past.select(torch.tensor([0]))
        assert past.numbers() == X.numel() // 2 + 2


def test_no_module_changes_and_copies_remember_nothing():
    model = nn.Sequential(Echo(), Echo())
    names = [set(vars(m)) for m in model.modules()]
    with remember(model):
        model(X)
        assert [set(vars(m)) for m in model.modules()] == names
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(X), twin(X)), "a copy is not being remembered"
    torch.testing.assert_close(twin(X), model(X))
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_each_thread_has_its_own_past():
    model, errors, start = Echo(), [], threading.Barrier(4)
    x = torch.randn(40, 2, 6, 3)

    def work(part):
        try:
            start.wait()
            for one in part:
                torch.testing.assert_close(fed(model, one, 1, 2, 3), model(one))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in x.chunk(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_error_in_a_pass_closes_it():
    class Fails(nn.Module):
        def forward(self, x):
            if x.shape[1] == 2:
                raise KeyError
            return x

    model = nn.Sequential(Echo(), Fails())
    with remember(model):
        model(X[:, :1])
        with pytest.raises(KeyError):
            model(X[:, :2])
        with pytest.raises(ValueError, match="Echo was called outside a pass through the remembered Sequential"):
            model[0](X)
    assert torch.equal(model(X), model(X))


def test_a_method_may_be_the_pass_and_parts_may_read_whole_texts():
    class Both(nn.Module):
        reads_whole = ("encoder",)

        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Echo(), Echo()

        def decode(self, x):
            with one_pass(self):
                return self.decoder(x)

    model = Both()
    with remember(model):
        pieces = [model.decode(X[:, :3]), model.decode(X[:, 3:])]
        assert torch.equal(model.encoder(X), model.encoder(X))
    torch.testing.assert_close(torch.cat(pieces, 1), model.decode(X))


class Fourier(nn.Module):
    no_past = "waves span the whole text"


def test_what_cannot_be_fed_in_pieces_is_named():
    with pytest.raises(ValueError, match=r"1\.0 \(Fourier\) cannot be fed in pieces: waves span"):
        with remember(nn.Sequential(Echo(), nn.Sequential(Fourier()))):
            pass
    with pytest.raises(ValueError, match=r"the model \(Fourier\)"), remember(Fourier()):
        pass


def test_looks_back_follows_those_who_hand_over():
    def window(q, k, v, mask=None):
        return v

    window.looks_back = 3

    class Wrapper(nn.Module):
        def __init__(self, attend):
            super().__init__()
            self.attend = attend

    assert looks_back(window) == looks_back(partial(window, mask=1)) == looks_back(Wrapper(Wrapper(window))) == 3
    assert looks_back(partial(lambda q, attend: q, attend=window)) == 3
    with pytest.raises(ValueError, match="Linear does not say which tokens it sees"):
        looks_back(Wrapper(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="nobody does not say"):
        looks_back(lambda_named("nobody"))


def lambda_named(name):
    f = lambda q, k, v: v
    f.__name__ = name
    return f


class Layer(nn.Module):
    def forward(self, k, v, mask):
        return with_past(self, self.attend, k, v, mask)

    def __init__(self, back):
        super().__init__()
        self.attend = lambda_named("attend")
        self.attend.looks_back = back


@pytest.mark.parametrize("back, kept", [(math.inf, 8), (2, 3), (0, 1)])
def test_keys_masks_and_windows(back, kept):
    layer, k = Layer(back), torch.randn(2, 3, 8, 4)
    real = torch.rand(2, 1, 1, 8) > 0.4
    with torch.no_grad(), remember(layer):
        for t in range(8):
            seen, _, mask = layer(k[:, :, t : t + 1], k[:, :, t : t + 1], real[..., t : t + 1])
    assert torch.equal(seen, k[:, :, 8 - kept :]) and torch.equal(mask, real[..., 8 - kept :])
    with torch.no_grad(), remember(layer):
        layer(k[:, :, :5], k[:, :, :5], None)
        _, _, mask = layer(k[:, :, 5:7], k[:, :, 5:7], real[..., 5:7])
        assert mask[..., -2:].equal(real[..., 5:7]) and mask[..., :-2].all(), "without a mask all were real"
        _, _, mask = layer(k[:, :, 7:], k[:, :, 7:], None)
        assert mask is None if back == 0 else mask[..., -1].all() and mask.shape[-1] == kept


def test_a_mask_with_a_row_per_query_is_needed_in_every_piece():
    layer, k = Layer(math.inf), torch.randn(2, 3, 8, 4)
    with remember(layer):
        layer(k, k, torch.ones(8, 8, dtype=torch.bool))
        _, _, mask = layer(k[:, :, :1], k[:, :, :1], torch.ones(2, 1, 1, 9, dtype=torch.bool))
        assert mask.shape[-1] == 9
        with pytest.raises(ValueError, match="needs its own, for 10"):
            layer(k[:, :, :1], k[:, :, :1], None)
