"""The training loop: it learns, repeats itself, and ends well whatever happens."""

import math
import multiprocessing
import os

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tfkit import train as T


@pytest.fixture(autouse=True)
def static(monkeypatch):
    monkeypatch.setenv("TFKIT_STATIC", "1")
    yield
    plt.close("all")


def problem(seed=0, dropout=0.0):
    """Which of four quarters of the plane a point is in."""
    torch.manual_seed(seed)
    x = torch.randn(256, 2)
    y = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4)), x, y


def test_it_learns_and_the_history_tells():
    model, x, y = problem()
    validate = lambda: T.accuracy(model(x), y)
    history = T.fit(model, T.minibatches(x, y, size=64), 120, lr=3e-2, validate=validate, every=50)
    assert history.steps == len(history.loss) == len(history.grad_norm) == 120
    assert list(history.validation) == [50, 100, 120]
    assert history.validation[120] > 0.95 and history.last() < 0.3 < history.loss[0]
    assert history.last(2) == pytest.approx(sum(history.loss[-2:]) / 2)
    assert history.seconds > 0 and not history.interrupted
    assert all(isinstance(v, float) and v >= 0 for v in history.grad_norm)
    assert math.isnan(T.History().last())


def test_the_same_seed_gives_the_same_run():
    def run(seed):
        model, x, y = problem(dropout=0.5)
        return T.fit(model, T.minibatches(x, y, size=32), 10, seed=seed).loss

    assert run(3) == run(3) != run(4)


@pytest.mark.parametrize("training", [True, False])
def test_validation_runs_in_eval_mode_without_gradients(training):
    model, x, y = problem(dropout=0.5)
    model.train(training)
    seen = []

    def validate():
        seen.append((model.training, model[2].training, torch.is_grad_enabled()))
        return 1.0

    def loss(model, x, y):
        assert model.training and torch.is_grad_enabled()
        return T.next_token_loss(model(x), y)

    T.fit(model, T.minibatches(x, y, size=32), 5, loss=loss, validate=validate, every=2)
    assert seen == [(False, False, False)] * 3  # at steps 2, 4 and the last
    assert model.training is training and model[2].training is training


def test_modes_are_restored_when_validation_fails():
    model, x, y = problem()
    with pytest.raises(ZeroDivisionError):
        T.fit(model, T.minibatches(x, y, size=32), 5, validate=lambda: 1 / 0, every=1)
    assert model.training


def test_interrupting_keeps_the_model_and_the_history(capsys):
    model, x, y = problem()
    before = model[0].weight.detach().clone()

    def batches():
        stream = T.minibatches(x, y, size=32)
        for _ in range(7):
            yield next(stream)
        raise KeyboardInterrupt

    model.eval()
    history = T.fit(model, batches(), 50)
    assert history.interrupted and history.steps == 7 and len(history.grad_norm) == 7
    assert not torch.equal(before, model[0].weight) and not model.training
    captured = capsys.readouterr()
    assert "interrupted after 7 of 50 steps" in captured.err and captured.out == ""


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_weights():
    model, x, y = problem()
    model.eval()
    weights = []

    def loss(model, x, y):
        weights.append(model[0].weight.detach().clone())
        return T.next_token_loss(model(x), y) * (math.nan if len(weights) == 4 else 1)

    with pytest.raises(FloatingPointError, match="nan at step 4 of 9.*0.003"):
        T.fit(model, T.minibatches(x, y, size=32), 9, loss=loss)
    assert torch.equal(model[0].weight, weights[-1]) and not model.training


def test_batches_that_end_too_early_are_named():
    model, x, y = problem()
    with pytest.raises(ValueError, match="ended after 2 of 5 steps"):
        T.fit(model, iter([(x, y), (x, y)]), 5)
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match="no batch in list.* at step 1 of 5"):
            T.fit(model, nothing, 5)


def test_a_finite_iterable_starts_again():
    model, x, y = problem()
    seen = []

    def loss(model, x, y):
        seen.append(x[0].tolist())
        return T.next_token_loss(model(x), y)

    T.fit(model, [(x[:8], y[:8]), (x[8:16], y[8:16])], 5, loss=loss)
    assert seen == [x[8 * (i % 2)].tolist() for i in range(5)]
    history = T.fit(model, DataLoader(TensorDataset(x, y), 100, shuffle=True), 7)  # three batches an epoch
    assert history.steps == 7
    epochs = []
    sampler = torch.utils.data.SequentialSampler(x)
    sampler.set_epoch = epochs.append  # as DistributedSampler has
    T.fit(model, DataLoader(TensorDataset(x, y), 100, sampler=sampler), 7)
    assert epochs == [0, 1, 2]


def test_batches_may_be_lists_dicts_and_single_tensors():
    model, x, y = problem()
    of_dict = lambda model, batch: T.next_token_loss(model(batch["x"]), batch["more"][0])
    assert T.fit(model, [{"x": x, "more": [y]}], 1, loss=of_dict).steps == 1
    assert T.fit(model, [x], 1, loss=lambda model, x: model(x).square().mean()).steps == 1
    assert T.fit(model, [[x, y]], 1).steps == 1


@pytest.mark.parametrize("options, said", [
    ({"every": 0}, "every must be at least 1, got 0"), ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ({"precision": "fp8"}, "precision must be one of fp32, bf16, got 'fp8'"), ({"resume": True}, "resume=FILE"),
    ({"parallel": "tp"}, "parallel must be one of ddp, fsdp, got 'tp'"),
    ({"optimizer": torch.optim.SGD, "lr": 1.0}, "lr and weight_decay belong to the optimizer"),
    ({"optimizer": torch.optim.SGD, "weight_decay": 1.0}, "lr and weight_decay belong to the optimizer"),
    ({"schedule": max, "warmup": 3}, "warmup and floor belong"), ({"schedule": max, "floor": 0.0}, "warmup and floor"),
    ({"optimizer": torch.optim.SGD([torch.zeros(2)])}, "none of the model's parameters"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(options, said):
    model, x, y = problem()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=said):
        T.fit(model, [(x, y)], 3, **options)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        T.fit(model, [(x, y)], -1)
    assert T.fit(model, [(x, y)], 0).steps == 0


def test_nothing_to_train_is_said():
    model, x, y = problem()
    with pytest.raises(ValueError, match="no parameter of Sequential has requires_grad"):
        T.fit(model.requires_grad_(False), [(x, y)], 1)


def test_an_optimizer_with_groups_and_a_schedule():
    model, x, y = problem()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    rates, asked = [], []

    def schedule(step, steps):
        asked.append((step, steps))
        return 1 / (step + 1)

    note = lambda model, history: rates.append([g["lr"] for g in optimizer.param_groups])
    before = [p.detach().clone() for p in model.parameters()]
    T.fit(model, [(x, y)], 3, optimizer=optimizer, schedule=schedule, callbacks=[note], clip=None)
    assert asked == [(0, 3), (1, 3), (2, 3)]
    assert rates == [pytest.approx([0.1 / k, 0.02 / k]) for k in (1, 2, 3)]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.02]  # left as it was given
    by_hand, x, y = problem()
    assert all(map(torch.equal, before, by_hand.parameters()))
    other = torch.optim.SGD([{"params": by_hand[0].parameters(), "lr": 0.1}, {"params": by_hand[3].parameters()}], 0.02)
    for k in (1, 2, 3):
        other.zero_grad()
        T.next_token_loss(by_hand(x), y).backward()
        other.param_groups[0]["lr"], other.param_groups[1]["lr"] = 0.1 / k, 0.02 / k
        other.step()
    assert all(torch.allclose(p, q) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_an_optimizer_made_from_the_model_and_groups_that_decay():
    model, x, y = problem()
    model[0].bias.requires_grad_(False)
    made = []

    def optimizer(model):
        made.append(torch.optim.AdamW(T.matrices_decay(model, 0.3), lr=0.5))
        return made[-1]

    T.fit(model, [(x, y)], 1, optimizer=optimizer)
    matrices, vectors = made[0].param_groups
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0
    assert [p.shape for p in matrices["params"]] == [(16, 2), (4, 16)]
    assert [p.shape for p in vectors["params"]] == [(4,)]
    assert len(T.matrices_decay(nn.Linear(2, 2, bias=False))) == 1


def test_callbacks_see_each_step_and_may_stop(tmp_path):
    model, x, y = problem()
    seen = []

    def note(given, history):
        assert given is model
        seen.append((history.steps, dict(history.validation)))

    stop = lambda model, history: history.steps == 4
    history = T.fit(model, [(x, y)], 9, callbacks=[stop, note], validate=lambda: 7.0, every=3, save=tmp_path / "run.pt")
    assert seen == [(1, {}), (2, {}), (3, {3: 7.0}), (4, {3: 7.0})] and history.steps == 4 and not history.interrupted
    assert torch.load(tmp_path / "run.pt", weights_only=True)["history"]["validation"] == {3: 7.0}


def test_accumulated_batches_make_the_step_of_one_large_batch():
    def run(batches, **options):
        model, *_ = problem()
        return T.fit(model.double(), batches, 3, lr=0.1, **options), model

    _, x, y = problem()
    x = x.double()
    whole, one = run([(x[:96], y[:96])])
    parts, other = run([(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)], accumulate=3)
    assert parts.steps == 3 and parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-9)
    assert all(torch.allclose(p, q, rtol=1e-9) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_bf16_computes_in_bf16_and_keeps_the_weights():
    model, x, y = problem()
    seen = []

    def loss(model, x, y):
        seen.append(model(x).dtype)
        return T.next_token_loss(model(x), y)

    history = T.fit(model, [(x, y)], 40, lr=3e-2, loss=loss, precision="bf16")
    assert set(seen) == {torch.bfloat16} and model[0].weight.dtype == torch.float32
    assert history.last(5) < 0.6 < history.loss[0]
    T.fit(model, [(x, y)], 1, loss=loss)
    assert seen[-1] == torch.float32


def sources(kind, x, y):
    """Batches that are drawn anew in each epoch, from a generator of their own or from the global one."""
    if kind == "minibatches":
        return T.minibatches(x, y, size=100, seed=5)
    own = torch.Generator().manual_seed(3) if kind == "own generator" else None
    return DataLoader(TensorDataset(x, y), 100, shuffle=True, generator=own)


@pytest.mark.parametrize("kind", ["minibatches", "global generator", "own generator"])
@pytest.mark.parametrize("stop", [2, 3, 7])
def test_a_run_that_is_resumed_is_the_same_run_to_the_bit(kind, stop, tmp_path):
    file = tmp_path / "run.pt"

    def run(steps=9, **options):
        model, x, y = problem(seed=1, dropout=0.3)
        momentum = lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        history = T.fit(model, sources(kind, x, y), steps, optimizer=momentum, seed=4, validate=lambda: 1.0, every=4,
                        accumulate=2, **options)  # fmt: skip
        return history, [p.detach() for p in model.parameters()]

    whole, weights = run()
    first, _ = run(save=file, callbacks=[lambda model, history: history.steps == stop])
    assert first.steps == stop and not os.path.exists(f"{file}.part")
    torch.rand(5)
    rest, again = run(save=file, resume=True)
    assert rest.loss == whole.loss and rest.grad_norm == whole.grad_norm and rest.validation == whole.validation
    assert all(map(torch.equal, weights, again)) and rest.seconds > first.seconds
    done, again = run(resume=file)  # nothing is left to do
    assert done.loss == whole.loss and all(map(torch.equal, weights, again))
    (tmp_path / "other.pt").unlink(missing_ok=True)
    anew, again = run(save=tmp_path / "other.pt", resume=True)  # no such file yet
    assert anew.loss == whole.loss and all(map(torch.equal, weights, again))
    with pytest.raises(FileNotFoundError):
        run(resume=tmp_path / "nowhere.pt")


def test_the_arguments_given_on_resuming_count(tmp_path):
    model, x, y = problem()
    file, rates = tmp_path / "run.pt", []
    T.fit(model, [(x, y)], 2, lr=0.5, save=file)
    made = []

    def optimizer(model):
        made.append(torch.optim.AdamW(model.parameters(), lr=0.25, weight_decay=0.125))
        return made[0]

    note = lambda model, history: rates.append(made[0].param_groups[0]["lr"])
    T.fit(model, [(x, y)], 4, optimizer=optimizer, schedule=lambda step, steps: 1.0, resume=file, callbacks=[note])
    assert rates == [0.25, 0.25] and made[0].param_groups[0]["weight_decay"] == 0.125
    assert made[0].state[model[0].weight]["step"] == 4


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, x, y = problem()
    file = tmp_path / "run.pt"
    T.fit(model, [(x, y)], 2, save=file)
    before, save = file.read_bytes(), torch.save

    def full(content, path):
        save(content, path)
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        T.fit(model, [(x, y)], 2, save=file)
    assert file.read_bytes() == before


def test_the_place_in_the_schedule_and_its_floor():
    rates = []
    model, x, y = problem()
    made = []

    def optimizer(model):
        made.append(torch.optim.SGD(model.parameters(), lr=1.0))
        return made[0]

    note = lambda model, history: rates.append(made[0].param_groups[0]["lr"])
    T.fit(model, [(x, y)], 20, optimizer=optimizer, warmup=4, floor=0.5, callbacks=[note])
    assert rates == pytest.approx([T.warmup_cosine(step, 20, 4, 0.5) for step in range(20)])
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and 0.5 < rates[-1] < 0.51


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


def together(kind, folder, **options):
    _, x, y = problem()
    file = folder / f"{kind}.pt"
    options |= {"parallel": kind, "accumulate": 2, "save": file, "validate": lambda: 0.5}
    T.fit(Small().double(), T.minibatches(x.double(), y, size=16), 3, **options)
    history = T.fit(Small().double(), T.minibatches(x.double(), y, size=16), 5, resume=file, **options)
    return history.loss, history.grad_norm


def rank(number, port, folder, queue):
    try:
        torch.set_num_threads(1)
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TFKIT_STATIC": "0"}
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
        torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=2)
        results = [together(kind, folder) for kind in ("ddp", "fsdp")]
        with pytest.raises(ValueError, match="7 rows cannot be shared by 2"):
            T.fit(nn.Linear(2, 2), [(torch.zeros(7, 2), torch.zeros(7))], 1)
        nan = lambda model, x: model(x).mean() * (math.nan if number else 1)
        with pytest.raises(FloatingPointError, match="step 1"):  # in both, whoever has it
            T.fit(nn.Linear(2, 2), [torch.zeros(4, 2)], 1, loss=nan)
        torch.distributed.destroy_process_group()
        queue.put((number, results))
    except BaseException as error:
        queue.put((number, repr(error)))
        raise


@pytest.mark.slow
def test_two_processes_train_to_the_same_weights_as_one(tmp_path, capfd):
    spawn = multiprocessing.get_context("spawn")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    queue = spawn.Queue()
    ranks = [spawn.Process(target=rank, args=(n, store.port, tmp_path, queue), daemon=True) for n in range(2)]
    try:
        for process in ranks:
            process.start()
        found = dict(queue.get(timeout=240) for _ in ranks)
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
    alone = tmp_path / "alone"
    alone.mkdir()
    loss, norm = together("ddp", alone)
    one = torch.load(alone / "ddp.pt", weights_only=True)["model"]
    for at, kind in enumerate(("ddp", "fsdp")):
        for number in range(2):
            assert not isinstance(found[number], str), found[number]
            assert found[number][at][0] == pytest.approx(loss, rel=1e-9)
            assert found[number][at][1] == pytest.approx(norm, rel=1e-9)
        two = torch.load(tmp_path / f"{kind}.pt", weights_only=True)["model"]
        assert list(two) == list(one) and all(torch.allclose(two[name], one[name], rtol=1e-9) for name in one)
    assert capfd.readouterr().err.count("5/5") <= 2  # one bar for each kind, of the first process alone


def test_unknown_options_are_named():
    model, x, y = problem()
    with pytest.raises(TypeError, match="momentum.*weight_decay"):
        T.fit(model, [(x, y)], 1, momentum=0.9)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it():
    model, x, y = problem()
    kept = []
    loss = lambda model, x, y: 1000 * T.next_token_loss(model(x), y)
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        kept.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        history = T.fit(model, T.minibatches(x, y, size=32), 3, loss=loss, clip=0.5)
    assert kept == pytest.approx([0.5] * 3, rel=1e-3) and min(history.grad_norm) > 1


def test_weight_decay_and_warmup_are_used():
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    T.fit(model, [()] * 1, 1, loss=lambda m: 0 * m.weight.sum(), lr=0.1, weight_decay=0.5, warmup=4)
    assert torch.allclose(model.weight, before * (1 - 0.1 / 4 * 0.5))


def test_several_inputs_reach_the_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            return self.scale * (a + b)

    a, b, y = torch.randn(6, 3), torch.randn(6, 3), torch.randint(3, (6,))
    history = T.fit(Two(), [(a, b, y)], 1)
    assert history.loss[0] == pytest.approx(T.next_token_loss(a + b, y).item())


def test_it_is_silent_when_static_and_shows_a_bar_otherwise(capfd, monkeypatch):
    model, x, y = problem()
    T.fit(model, T.minibatches(x, y, size=32), 3)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TFKIT_STATIC", "0")
    assert not T.quiet()
    T.fit(model, T.minibatches(x, y, size=32), 3)
    assert "step" in capfd.readouterr().err


def test_loss_and_accuracy_leave_out_what_is_not_asked():
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    kept = [(0, 0, 1), (0, 2, 2), (1, 2, 4)]
    by_hand = -sum(logits[b, n].log_softmax(0)[t] for b, n, t in kept) / 3
    assert T.next_token_loss(logits, targets).item() == pytest.approx(by_hand.item(), rel=1e-5)
    share = sum(logits[b, n].argmax().item() == t for b, n, t in kept) / 3
    assert T.accuracy(logits, targets) == pytest.approx(share)


def test_warmup_cosine():
    factors = [T.warmup_cosine(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1) and factors[55] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert T.warmup_cosine(150, 100, 10) == T.warmup_cosine(100, 100, 10) == pytest.approx(0.1)  # it stays there
    assert T.warmup_cosine(100, 100, 10, floor=0.0) == 0 and T.warmup_cosine(55, 100, 10, 0.4) == pytest.approx(0.7)
    assert T.warmup_cosine(1, 1, 1) == pytest.approx(0.1)


def test_minibatches_cover_each_row_once_per_epoch():
    x = torch.arange(12)
    stream = T.minibatches(x, x * 10, size=4)
    epochs = [[next(stream) for _ in range(3)] for _ in range(3)]
    orders = []
    for epoch in epochs:
        assert all(torch.equal(b, a * 10) for a, b in epoch)
        orders.append(torch.cat([a for a, _ in epoch]).tolist())
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2]
    first = lambda seed: next(T.minibatches(x, size=6, seed=seed))[0].tolist()
    assert first(0) == first(0) != first(1)
    uneven = T.minibatches(x, size=5)
    rows = torch.cat([next(uneven)[0], next(uneven)[0]]).tolist()
    assert len(set(rows)) == 10  # two whole batches; the two rows left over wait for another epoch


@pytest.mark.parametrize("tensors, size, said", [
    ((torch.zeros(3), torch.zeros(4)), 2, r"\[3, 4\]"), ((torch.zeros(3),), 4, "4"), ((torch.zeros(3),), 0, "0"),
])  # fmt: skip
def test_minibatches_errors(tensors, size, said):
    with pytest.raises(ValueError, match=said):
        next(T.minibatches(*tensors, size=size))


def test_history_plots_itself():
    history = T.History(loss=[2.0 / (i + 1) for i in range(30)], validation={10: 0.5, 30: 0.4})
    ax = history.plot(label="model", log=True)
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "loss (nats)" and ax.get_yscale() == "log"
    dots = ax.lines[-1]
    assert list(dots.get_xdata()) == [10, 30] and list(dots.get_ydata()) == [0.5, 0.4]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["model", "model, validation"]
    assert T.History(loss=[1.0, 0.5]).plot(ax=ax) is ax


def test_history_is_one_line_and_a_picture():
    history = T.History(loss=[2.0 / (i + 1) for i in range(3000)], validation={10: 0.5, 30: 0.25}, seconds=1.25)
    assert repr(history) == "History: 3000 steps, \u27e8loss 2 to 0.000669, validation 0.25, 1.2 s\u27e9"
    data, metadata = history._repr_mimebundle_()
    assert data["text/plain"] == repr(history) and "loss (nats) against step" in str(metadata)
    assert not plt.get_fignums()
    assert T.History()._repr_mimebundle_() == {"text/plain": "History: 0 steps, \u27e80.0 s\u27e9"}
    assert "interrupted" in repr(T.History(loss=[1.0], interrupted=True))


def test_set_seed_seeds_all_three():
    import random

    import numpy as np

    draw = lambda: (T.set_seed(5), random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    assert draw() == draw()
