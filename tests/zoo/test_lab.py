"""The lab: parts are found by what they do, impossible choices are refused, runs live in threads."""

import base64
import functools
import gc
import inspect
import re
import statistics
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tfkit import contracts, measure
from tfkit.zoo import lab
from tfkit.zoo.attention import MultiHeadAttention, attention, causal_attention
from tfkit.zoo.lab import SLOTS, Choice, Run, Sizes
from tfkit.zoo.positions import Alibi, Rotary
from tfkit.zoo.sparse_attention import LSHAttention
from tfkit.zoo.transformer import Block, FeedForward, FourierMixing, GatedConvolution, PreNorm

ROOT = Path(__file__).resolve().parents[2]
DIGITS = Choice(task="digits", attend="attention")
EVERY = [(slot, label) for slot in SLOTS for label in lab.parts(slot)]
KNOWN = {
    "mixer": ["MultiHeadAttention", "GatedConvolution", "FourierMixing", "Recurrence", "PathAttention"],
    "attend": ["attention", "causal_attention", "TalkingHeads", "ThresholdRelative"],
    "positions": ["Rotary", "Alibi", "T5Bias", "ShawRelative", "Fire", "SinusoidalPositions", "LearnedPositions"],
    "feedforward": ["FeedForward", "GatedFeedForward", "Pattention", "fast_kan", "mixture of experts"],
    "norm": ["LayerNorm", "RMSNorm", "ScaleNorm", "TokenBatchNorm", "TokenGroupNorm"],
    "wiring": ["PreNorm", "PostNorm", "LayerScale", "DeepNorm", "SandwichNorm"],
    "weigh": ["attention_weights", "causal_weights"],
}


class Peek(nn.Module):
    """Looks one token ahead."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, :1] * 0], 1)


class Shift(nn.Module):
    """Looks one token back."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] * 0, x[:, :-1]], 1)


class Together(nn.Module):
    """Subtracts the mean over the batch, and has a matrix: sequences meet, tokens do not."""

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x - x.mean((0, 1)))


class Counting(nn.Module):
    """Gives another answer at each call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Numbers(nn.Module):
    """Asks for a number, which the meta device does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) * (1 if x.sum().item() else 2)


@pytest.fixture
def own():
    """Forget the parts that a test registers."""
    yield lab.register
    for shelf in lab.catalogue().parts.values():
        for label in [label for label, part in shelf.items() if part.module == __name__]:
            del shelf[label]


# ----------------------------------------------------------------------------------------------------------- discovery


@pytest.mark.parametrize("slot, label", [(slot, label) for slot, labels in KNOWN.items() for label in labels])
def test_well_known_parts_are_found_in_their_slot(slot, label):
    assert label in lab.parts(slot)
    assert [other for other in KNOWN if label in lab.parts(other)] == [slot]


@functools.cache
def on_digits(slot: str, label: str) -> str:
    return lab.refusal(replace(DIGITS, **{slot: label}))


@pytest.mark.parametrize("slot, label", EVERY, ids=lambda value: str(value))
def test_every_part_builds_and_takes_a_step_or_is_refused_in_a_sentence(slot, label):
    found = on_digits(slot, label)
    assert found == "" or re.fullmatch(r"It cannot (be built|take a step)(: |, since )[^\n]{3,300}[.?]", found), found
    assert not found or label not in KNOWN[slot], found


def test_nearly_all_parts_work_on_digits():
    refused = [(slot, label) for slot, label in EVERY if on_digits(slot, label)]
    assert len(refused) <= len(EVERY) / 10, refused


def test_discovery_costs_no_more_than_a_small_encoder_for_each_part():
    """Both in processor time, so that neither the processor nor its load decides."""

    def cost(run) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    build = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, batch_first=True), 4)(
        torch.ones(4, 64, 256)
    )
    unit = min(cost(build) for _ in range(5))
    found = cost(lab.catalogue.__wrapped__)
    assert found < unit * len(EVERY), f"{found / unit / len(EVERY):.1f} encoders a part: build the slow one smaller"


def test_a_new_chapter_appears_and_a_broken_one_does_no_harm(monkeypatch):
    new = types.ModuleType("tfkit.zoo.new")

    class Fresh(Shift):
        pass

    class Broken(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            raise RuntimeError("not today\nsecond line")

    def fresh_feedforward(width: int, hidden: int) -> nn.Module:
        return FeedForward(width, hidden)

    class Huge(nn.Module):
        def __init__(self, hidden: int = 10**12):
            super().__init__()
            self.map = nn.Linear(64, hidden)

    def helper(x):
        raise AssertionError("not a part, never called")

    new.Fresh, new.Broken, new.fresh_feedforward, new.helper = Fresh, Broken, fresh_feedforward, helper
    new.Huge, new.__all__ = Huge, ["Fresh", "Broken", "Huge", "fresh_feedforward", "helper"]
    new.mechanisms = {
        "two layers": lambda: (
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
            (torch.ones(2, 16, 64),),
        ),
        "no": lambda: 1 / 0,
    }
    with_new = {**lab.modules(), "new": new, "gone": ImportError("no such")}
    monkeypatch.setattr(lab, "modules", lambda: with_new)
    found = lab.catalogue.__wrapped__()
    assert found.parts["mixer"]["Fresh"].word == "new.Fresh"
    assert {"fresh_feedforward", "two layers"} <= set(found.parts["feedforward"])
    assert found.left_out["new.Broken"] == "RuntimeError: not today."
    assert found.left_out["new.mechanisms['no']"] == "ZeroDivisionError: division by zero."
    assert found.left_out["new.Huge"] == "it has 65,000,000,000,000 parameters, too many for a part."
    assert found.left_out["gone"] == "ImportError: no such."
    assert "new.helper" not in found.left_out
    for slot in SLOTS:
        assert set(lab.parts(slot)) <= set(found.parts[slot]), "older parts keep their labels"


def test_two_parts_of_one_name_keep_both(monkeypatch):
    labels = lab.parts("wiring")
    assert labels["BranchNorm"].module != labels["BranchNorm (depth_and_residuals)"].module


def test_left_out_gives_reasons():
    for name, reason in lab.left_out().items():
        assert reason and "\n" not in reason, name
    assert "mixer" in lab.left_out()["transformer.Block"]
    assert "(2, 4, 64)" in lab.left_out()["attention.LowRankPooling"]


@pytest.mark.parametrize(
    "make, slot",
    [
        (lambda: MultiHeadAttention(64, 4), "mixer"),
        (Shift, "mixer"),
        (Peek, "mixer"),
        (lambda: FeedForward(64), "feedforward"),
        (lambda: Together(64), "feedforward"),
        (lambda: nn.Linear(64, 64), "feedforward"),
        (lambda: nn.LayerNorm(64), "norm"),
        (lambda: nn.RMSNorm(64), "norm"),
        (lambda: Rotary(16, attention), "attend"),
        (lambda: Alibi(4), "attend"),
    ],
)
def test_a_slot_is_what_a_module_does(make, slot):
    assert lab.slot_of(make()) == slot


@pytest.mark.parametrize("seed", range(8))
def test_chance_decides_nothing(seed):
    """Workers of a test run must find the same parts, whatever was drawn before."""

    class Coin(nn.Module):
        """Looks back or not, by a draw."""

        def __init__(self):
            super().__init__()
            self.back = bool(torch.rand(()) < 0.5)
            self.map = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x.cumsum(1) if self.back else x)

    torch.manual_seed(seed)
    found = lab.Catalogue({slot: {} for slot in (*SLOTS, "weigh")}, {})
    part = found.admit("own", partial(lab.tried, "own", "Coin", Coin))
    assert part.slot == "mixer"
    assert lab.slot_of(LSHAttention(64, 4)) == "mixer", "one pair of tokens in a bucket is enough"


@pytest.mark.parametrize(
    "make, reason",
    [
        (nn.Identity, "each number alone"),
        (nn.GELU, "each number alone"),
        (Counting, "called twice"),
        (lambda: nn.Linear(64, 32), r"into \(2, 16, 32\)"),
        (lambda: nn.GRU(64, 64, batch_first=True), "returns a tuple"),
        (lambda: nn.Bilinear(4, 4, 4), "asks for input1, input2"),
        (lambda: Block(Shift(), FeedForward(64), lambda: nn.LayerNorm(64)), "whole block"),
        (lambda: nn.Sequential(MultiHeadAttention(64, 4), FeedForward(64)), "whole block"),
    ],
)
def test_what_fits_no_slot_is_refused(make, reason):
    with pytest.raises(lab.Refused, match=reason):
        lab.slot_of(make())


def test_places_are_what_tells_a_position_scheme_from_an_attend_function():
    class Wrapped(nn.Module):
        def __init__(self, attend=attention):
            super().__init__()
            self.attend = attend

        def forward(self, q, k, v, mask=None):
            return self.attend(q, k, v, mask=mask)

    assert lab.slot_of(Wrapped(), "attend") == "attend"
    assert lab.slot_of(Rotary(16, attention), "attend") == "positions"
    assert lab.slot_of(Alibi(4, attention), "attend") == "positions"


def test_names_of_the_house_become_numbers():
    names = lab.house_names(Sizes(32, 2, 3), 48)
    assert (names["width"], names["head_width"], names["height"], names["grid width"]) == (32, 16, 6, 8)

    def grid(height: int, width: int, unheard: int, share: float, given=3): ...

    assert lab.fill(grid, names) == {"height": 6, "width": 8, "unheard": 4, "share": 1.0}
    with pytest.raises(lab.Refused, match="`mixer`"):
        lab.fill(Block, names)
    assert lab.fill(Block, names, ("mixer", "feedforward", "norm")) == {}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "choice, reason",
    [
        (Choice(mixer="GatedConvolution"), r"see the future: output \d+ changes when input \d+ does"),
        (Choice(mixer="FourierMixing"), "see the future"),
        (Choice(attend="attention"), "see the future"),
        (Choice(attend="TalkingHeads"), "see the future"),
        (Choice(feedforward="mixture of experts"), "see the future"),
        (
            Choice(mixer="FourierMixing", positions="Rotary"),
            "Rotary goes into an attend slot, and FourierMixing has none",
        ),
        (
            Choice(attend="TalkingHeads", positions="ShawRelative"),
            "no exported function gives the weights of TalkingHeads",
        ),
        (Choice(sizes=Sizes(64, 7, 1)), "width 64 does not divide into 7 heads"),
        (Choice(sizes=Sizes(64, 0, 1)), "width 64 does not divide into 0 heads"),
        (Choice(feedforward="memory layers", sizes=Sizes(32)), "exists for width 64 alone"),
        (Choice(mixer="MultiHeadAtention"), "do you mean MultiHeadAttention"),
        (Choice(task="chess"), "there are text, recall"),
        (Choice(attend="TalkingHeads", positions="T5Bias"), "take a step, since these parts do not work together"),
        (
            Choice(attend="PolynomialAttention", sizes=Sizes(64, 1, 2)),
            r"16 examples would take 9\d\.\dGB of memory, more than 4GB",
        ),
    ],
)
def test_an_impossible_choice_is_refused_with_the_reason(choice, reason):
    found = lab.refusal(choice)
    assert re.search(reason, found), found
    assert "\n" not in found and found.endswith((".", "?"))


@pytest.mark.parametrize(
    "choice, words",
    [
        (Choice(mixer="GatedConvolution", positions="Rotary"), "Mixer GatedConvolution .*; mixer MultiHeadAttention"),
        (Choice(attend="attention", norm="RMSNorm"), "Attend attention .*; attend causal_attention"),
        (Choice(sizes=Sizes(64, 7, 1)), "Width 64, heads 7, depth 1 .*; width 64, heads 4, depth 2"),
        (Choice(attend="attention", mixer="no such"), "Attend .* and mixer no such .*; attend .* and mixer MultiHead"),
    ],
)
def test_a_refusal_names_the_part_that_does_not_fit_and_one_that_does(choice, words):
    assert re.search(words, lab.advice(choice)), lab.advice(choice)


def test_the_words_of_python_and_torch_stay_out_of_a_refusal():
    wish = Choice(attend="TalkingHeads", positions="T5Bias")
    with pytest.raises(lab.Refused) as caught:
        lab.attempt(wish)
    assert isinstance(caught.value.__cause__, TypeError), "who wants to know more finds it here"
    assert lab.examine(wish).words == (
        "Refused. Attend TalkingHeads does not fit here (it cannot take a step, since these parts do not work "
        "together); attend causal_attention does."
    )


def raised(make) -> Exception:
    with pytest.raises(Exception) as caught:
        make()
    return caught.value


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MultiHeadAttention(64, 7), "width 64 does not divide into 7 heads."),
        (lambda: lab.fill(Block, {}), "the lab does not know what to pass as `mixer`."),
        (lambda: Block(bias=True), ""),
        (lambda: nn.Linear(3, 4)(torch.ones(2, 2)), ""),
        (lambda: torch.optim.SGD([]), ""),
        (lambda: (lambda a, b: a)(*[1]), ""),
        (lambda: [a for a, b in [(1, 2, 3)]], ""),
    ],
)
def test_only_what_a_chapter_wrote_itself_is_repeated(make, words):
    assert lab.own_words(raised(make)) == words


def test_memory_is_counted_and_nothing_is_made():
    class Copies(nn.Module):
        """Three results as large as x, and a view."""

        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).mul(2).transpose(0, 1).sin()

    x = torch.ones(4, 8, device="meta")
    with lab.Weighing() as weighing:
        Copies()(x)
        x.add_(1)
    assert weighing.bytes == 3 * x.numel() * 4
    light, twice = (lab.weight(replace(DIGITS, sizes=Sizes(64, 4, depth))) for depth in (2, 4))
    assert 1.8 < twice / light < 2.05 and light < lab.MOST_BYTES / 100
    state, wish = torch.get_rng_state(), Choice(attend="PolynomialAttention", sizes=Sizes(64, 1, 2))
    assert lab.weight(wish) == lab.weight(wish) > lab.MOST_BYTES, "what is kept between calls changes no count"
    assert torch.equal(state, torch.get_rng_state())
    assert 0 < lab.weight(replace(DIGITS, mixer="FourierMixing")) < lab.MOST_BYTES


def test_what_cannot_be_counted_is_not_refused_for_it(own):
    assert own(Numbers) == "mixer"
    wish = replace(DIGITS, mixer="Numbers")
    assert lab.refusal(wish) == ""
    assert 0 < lab.weight(wish) < lab.weight(DIGITS), "what came before it"


def test_weighing_leaves_no_empty_tensor_in_a_cache():
    for label in ("TaylorAttention", "PolynomialAttention"):
        if label in lab.parts("attend"):
            lab.weight(replace(DIGITS, attend=label))
    caches = [v for m in lab.modules().values() for v in vars(m).values() if hasattr(v, "cache_info")]
    assert caches
    for cache in caches:
        for kept in gc.get_referents(cache):
            values = kept.values() if isinstance(kept, dict) else [kept]
            tensors = [t for t in tree_leaves([*values]) if isinstance(t, Tensor)]
            assert not any(t.is_meta for t in tensors), cache


def test_no_run_is_dropped_for_a_fifth():
    shelf = lab.Shelf()
    shelf.runs = [Run(Choice()) for _ in range(shelf.MOST)]
    before = list(shelf.runs)
    with pytest.raises(lab.Refused, match="the figure holds 4 runs: Clear it first"):
        shelf.start(Run(Choice()))
    assert shelf.runs == before


@pytest.mark.parametrize("mixer", ["GatedConvolution", "FourierMixing", "MultiHeadAttention"])
@pytest.mark.parametrize("name", ["recall", "listops", "digits", "series"])
def test_looking_ahead_is_fine_where_nothing_to_come_is_asked(name, mixer):
    assert lab.refusal(Choice(task=name, mixer=mixer, attend="attention")) == ""


def test_the_future_is_measured_and_not_listed(own):
    assert own(Peek) == own(Shift) == "mixer"
    assert "see the future" in lab.refusal(Choice(mixer="Peek"))
    assert lab.refusal(Choice(mixer="Shift")) == ""


@pytest.mark.parametrize(
    "attend, weights", [("attention", "attention_weights"), ("causal_attention", "causal_weights")]
)
def test_the_weights_of_an_attend_function_are_found_by_trying(attend, weights):
    assert lab.weights_of(attend).endswith(f".{weights}")


def test_what_is_no_part_cannot_be_registered(own):
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    assert own(Two) == "its forward asks for x, y."
    assert lab.left_out()[f"{__name__}.Two"]


# ---------------------------------------------------------------------------------------------------------- round trip

CHOICES = [
    Choice(),
    Choice(positions="Rotary", norm="RMSNorm", feedforward="GatedFeedForward", wiring="LayerScale"),
    Choice(task="series", mixer="MultiDConvHeadAttention", positions="ShawRelative", wiring="DeepNorm"),
    Choice(task="recall", mixer="PathAttention", positions="LearnedPositions", sizes=Sizes(32, 2, 3)),
    Choice(task="digits", mixer="FourierMixing", feedforward="memory layers", norm="TokenGroupNorm"),
    Choice(task="listops", mixer="Recurrence", feedforward="fast_kan", norm="ScaleNorm", wiring="SandwichNorm"),
    Choice(task="digits", positions="GridRotary", attend="attention", wiring="PostNorm"),
]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c.task}-{c.mixer}-{c.positions}")
@pytest.mark.parametrize("seed", [0, 7])
def test_the_lines_rebuild_the_model(choice, seed):
    lines = lab.code(choice, seed)
    elsewhere: dict = {}
    exec(lines, elsewhere)
    assert same_weights(lab.build(choice, seed), elsewhere["model"])
    assert len(lines.splitlines()) <= 17
    if choice.mixer != "FourierMixing":
        assert not same_weights(lab.build(choice, seed), lab.build(choice, seed + 1))


def test_another_process_without_checked_shapes_finds_the_same_parts_and_rebuilds_the_model():
    choice = CHOICES[1]
    sums = "{name: (tuple(t.shape), t.double().sum().item()) for name, t in model.state_dict().items()}"
    shelves = "{slot: list(lab.parts(slot)) for slot in lab.SLOTS}"
    found = subprocess.run(
        [sys.executable, "-c", f"{lab.code(choice, 3)}\nprint(({sums}, {shelves}))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    weights, labels = eval(found)
    model = lab.build(choice, 3)
    assert weights == {name: (tuple(t.shape), t.double().sum().item()) for name, t in model.state_dict().items()}
    assert labels == {slot: list(lab.parts(slot)) for slot in SLOTS}
    assert not [name for name, why in lab.left_out().items() if "zoo.lab" in why]


def test_a_part_of_your_own_is_imported_by_the_lines(own):
    own(Shift)
    choice = Choice(mixer="Shift")
    assert f"from {__name__} import Shift" in lab.code(choice)
    assert isinstance(lab.build(choice).mixers[0], Shift)


def test_building_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    lab.build(Choice())
    assert torch.equal(before, torch.get_rng_state())


def test_the_choice_is_what_is_built():
    model = lab.build(Choice(positions="Rotary", norm="RMSNorm", wiring="PostNorm", sizes=Sizes(32, 2, 3)))
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("Rotary") == kinds.count("MultiHeadAttention") == len(model.mixers) == 3
    assert kinds.count("RMSNorm") == 7 and "LayerNorm" not in kinds and kinds.count("PostNorm") == 6
    assert model.mixers[0].attend.attend is causal_attention
    assert model.mixers[0] is not model.mixers[1]


# --------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", lab.TASKS)
def test_a_task_is_complete(name):
    about = lab.task(name)
    x, y = next(about.batches(0))
    again, other = next(about.batches(0))[0], next(about.batches(1))[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.shape[1:] == about.held_out[0].shape[1:] and y.shape[1:] == about.held_out[1].shape[1:]
    assert about.length == x.shape[1]
    model = lab.build(Choice(task=name))
    assert about.loss(model(x), y).ndim == 0 and about.score(model(about.held_out[0]), about.held_out[1]) < 0.6
    perfect = y if name == "series" else torch.nn.functional.one_hot(y.clamp(min=0), 128).float()
    assert about.score(perfect, y) == pytest.approx(1.0)


def test_held_out_digits_are_not_trained_on():
    about = lab.task("digits")
    batches = about.batches(0)
    seen = {tuple(row.flatten().tolist()) for _ in range(60) for row in next(batches)[0]}
    unseen = [row for row in about.held_out[0] if tuple(row.flatten().tolist()) not in seen]
    assert len(unseen) > 0.99 * len(about.held_out[0])


# ------------------------------------------------------------------------------------------------- diagram, cost, looks


def test_the_diagram_has_the_shapes_of_the_real_module():
    model, x = lab.build(DIGITS), lab.task("digits").held_out[0]
    drawn = lab.diagram(model, x)
    words = re.sub("<[^>]+>", " ", drawn)
    for expected in ("b × 16 × 16 → b × 10", "b × 16 × 64 → b × 16 × 192", "× 2", "MultiHeadAttention  with attention"):
        assert re.sub(r"\s+", " ", expected) in re.sub(r"\s+", " ", words), expected
    assert f"{measure.parameters(model):,} parameters" in words
    assert not any(m._forward_hooks for m in model.modules()), "hooks stay behind"
    assert drawn.count("<div") == drawn.count("</div>")


def test_the_diagram_does_not_invent():
    class Idle(lab.Model):
        def forward(self, x):
            return self.head(self.embed(x))

    model = lab.build(DIGITS)
    idle = Idle(model.embed, model.positions, model.stack, model.head)
    assert "MultiHeadAttention" not in lab.diagram(idle, lab.task("digits").held_out[0])


def test_cost_is_counted():
    model, x = lab.build(DIGITS), lab.task("digits").held_out[0]
    found = lab.cost(model, x)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes > 16 * found.parameters
    deeper = lab.build(replace(DIGITS, sizes=Sizes(64, 4, 4)))
    assert 1.8 < lab.cost(deeper, x).flops / found.flops < 2.05


@pytest.mark.parametrize("mixer, what", [("MultiHeadAttention", "attention"), ("GatedConvolution", "influence")])
def test_there_is_always_something_to_look_at(mixer, what):
    choice = replace(DIGITS, mixer=mixer)
    found, words = lab.looks(lab.build(choice).eval(), lab.task("digits").held_out[0])
    assert words.startswith(what) and found.shape == (16, 16)
    if what == "attention":
        torch.testing.assert_close(found.sum(-1), torch.ones(16))
    else:
        near = (torch.arange(16)[:, None] - torch.arange(16)).abs() <= 1
        assert (found[near] > 0).all() and not found[~near].any()


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_starts_reports_and_finishes():
    reports = []
    run = Run(DIGITS, steps=40, report=lambda run: reports.append((run.state, len(run.losses))), pause=0.02)
    run.start()  # returns at once: 40 steps with a pause between them take longer
    assert run.state == "training" and len(run.losses) < 40
    run.wait(60)
    assert run.state == "finished" and len(run.losses) == 40 and run.seconds > 0
    assert run.losses[-1] < run.losses[0] and run.scores[40] > run.scores[2]
    assert len(reports) > 1 and reports[0][0] == "training" and reports[-1] == ("finished", 40)
    assert run.map[0].shape == (16, 16)


def test_a_run_stops_when_asked():
    run = Run(DIGITS, steps=100_000).start()
    end = time.monotonic() + 30
    while len(run.losses) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    run.stop()
    run.wait(30)
    assert run.state == "stopped" and 3 <= len(run.losses) < 100_000
    assert run.message == ""


def test_errors_stay_in_the_thread(capsys, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    run = Run(Choice(norm="none")).start().wait(30)
    assert run.state == "failed" and "no norm is called none" in run.message
    wild = Run(DIGITS, steps=50, lr=1e30).start().wait(60)
    assert wild.state == "failed" and wild.message.startswith("FloatingPointError")

    def broken(run):
        raise RuntimeError("the page is gone")

    alone = Run(DIGITS, steps=3, report=broken, pause=1e9).start().wait(60)
    assert alone.state == "finished" and "the page is gone" in alone.message
    assert not raised
    assert capsys.readouterr().err == ""


def test_the_same_seed_trains_the_same():
    losses = [Run(DIGITS, steps=5, seed=seed).start().wait(60).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_shelf_keeps_four_and_trains_one():
    shelf = lab.Shelf()
    runs = [shelf.start(Run(DIGITS, steps=1)).wait(60) for _ in range(3)]
    assert shelf.runs == runs
    busy = shelf.start(Run(DIGITS, steps=100_000))
    with pytest.raises(lab.Refused, match="one run at a time"):
        shelf.start(Run(DIGITS, steps=1))
    assert shelf.training and shelf.runs == [*runs, busy]
    shelf.stop()
    busy.wait(30)
    assert busy.state == "stopped" and not shelf.training


def test_labels_say_what_differs():
    runs = [Run(Choice()), Run(Choice(norm="RMSNorm")), Run(Choice(sizes=Sizes(32)), lr=1e-3)]
    assert lab.labels(runs)[0] == "1: LayerNorm, width 64, heads 4, depth 2, rate 0.003"
    assert lab.labels(runs[:2]) == ["1: LayerNorm", "2: RMSNorm"]
    assert lab.labels(runs[:1]) == ["1: MultiHeadAttention"] and lab.labels([]) == []


def test_the_figure_compares_and_stays_out_of_pyplot():
    import matplotlib.pyplot as plt

    runs = [Run(replace(DIGITS, norm=norm), steps=3).start().wait(60) for norm in ("LayerNorm", "RMSNorm", "ScaleNorm")]
    fig = lab.draw([*runs, Run(DIGITS)])
    left, middle, _ = fig.axes
    assert len(left.lines) == len(middle.lines) == 4
    assert [t.get_text() for t in middle.get_legend().texts] == lab.labels([*runs, Run(DIGITS)])
    assert plt.get_fignums() == []
    assert lab.draw([]).axes


def test_the_newest_question_alone_is_answered():
    answers, worked, first = [], [], threading.Event()

    def work(n):
        worked.append(n)
        first.wait(5)
        return n

    latest = lab.Latest(work, answers.append)
    for n in range(50):
        latest.ask(n)
    first.set()
    latest._pool.shutdown(wait=True)
    assert answers == [49] and len(worked) <= 2, "only what was asked last, beside what was begun"


# ---------------------------------------------------------------------------------------------------------------- page


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def page():
    page = lab.Page(replace(DIGITS), lab.Shelf())
    until(lambda: page.panel.examined)
    yield page
    page.shelf.stop()
    for run in page.shelf.runs:
        run.wait(30)


def test_the_page_offers_every_part(page):
    for slot in SLOTS:
        assert list(page.controls.menus[slot].options) == list(lab.parts(slot))
    assert page.controls.choice == DIGITS


def test_the_page_says_what_it_found(page):
    assert "parameters" in page.panel.words.value and "b × 16 × 64" in page.panel.model.value
    assert "lab.assemble" in page.panel.code.value
    page.controls.menus["mixer"].value = "FourierMixing"
    assert page.panel.examined is None and page.controls.buttons["Train"].disabled
    until(lambda: page.panel.examined)
    assert not page.controls.buttons["Train"].disabled
    page.controls.menus["positions"].value = "Rotary"
    until(lambda: page.panel.examined)
    assert "Refused." in page.panel.words.value and page.controls.buttons["Train"].disabled
    page.controls.buttons["Train"].click()
    assert page.shelf.runs == []


def test_two_runs_are_trained_compared_and_cleared(page):
    buttons, menus = page.controls.buttons, page.controls.menus
    menus["steps"].value = 100
    for norm in ("LayerNorm", "RMSNorm"):
        menus["norm"].value = norm
        until(lambda: page.panel.examined)
        buttons["Train"].click()
        assert buttons["Train"].disabled and not buttons["Stop"].disabled
        until(lambda: page.shelf.runs[-1].losses)
        buttons["Stop"].click()
        until(lambda: not buttons["Train"].disabled)
    assert [run.state for run in page.shelf.runs] == ["stopped", "stopped"]
    assert "1: LayerNorm" in page.film.table.value and "2: RMSNorm" in page.film.table.value
    picture = re.search(
        r'<img alt="([^"]{20,})" style="[^"]+" src="data:image/png;base64,([^"]+)">', page.film.picture.value
    )
    assert base64.b64decode(picture[2]).startswith(b"\x89PNG")
    buttons["Clear"].click()
    assert page.shelf.runs == [] and page.film.picture.value == "" and buttons["Clear"].disabled


def test_handlers_answer_within_a_tenth_of_a_second_while_a_run_trains(page):
    page.controls.menus["steps"].value = 3000
    page.controls.buttons["Train"].click()
    until(lambda: page.shelf.runs[0].losses)
    took = []
    for i in range(20):
        for name, values in {"norm": ("RMSNorm", "LayerNorm"), "width": (32, 64)}.items():
            started = time.perf_counter()
            page.controls.menus[name].value = values[i % 2]
            took.append(time.perf_counter() - started)
        time.sleep(0.01)
    started = time.perf_counter()
    page.controls.buttons["Stop"].click()
    took.append(time.perf_counter() - started)
    assert statistics.median(took) < 0.02 and sorted(took)[-3] < 0.1, f"handlers took {sorted(took)[-5:]} s"
    assert page.shelf.runs[0].state == "training" or page.shelf.runs[0].wait(30).state == "stopped"


def test_a_handler_that_waits_would_be_noticed(page, monkeypatch):
    monkeypatch.setattr(page.examiner, "ask", lambda choice: lab.examine(choice) and time.sleep(0.03))
    page.controls.connect(page.changed, *[lambda: None] * 3)
    started = time.perf_counter()
    page.controls.menus["norm"].value = "RMSNorm"
    assert time.perf_counter() - started > 0.02


def test_without_a_kernel_finished_runs_are_shown():
    bench = lab.Workbench(DIGITS, replace(DIGITS, mixer="FourierMixing"), steps=4)
    shown = bench._repr_mimebundle_()
    assert bench.page is None and [run.state for run in bench.shelf.runs] == ["finished", "finished"]
    assert "lab.assemble" in shown["text/plain"] and "b × 16 × 64" in shown["text/html"]


def test_with_a_kernel_the_page_is_shown(monkeypatch):
    monkeypatch.setattr(lab, "quiet", lambda: False)
    bench = lab.Workbench(DIGITS)
    assert "application/vnd.jupyter.widget-view+json" in bench._repr_mimebundle_()
    assert bench.page.controls.choice == DIGITS


def test_contracts_and_the_house_agree_on_what_a_causal_model_is():
    x = lab.task("text").held_out[0][:1, :12]
    assert contracts.causal(lab.build(Choice()), x)
    assert not contracts.causal(lab.build(Choice(attend="attention")), x)


def test_parts_can_be_built_by_their_words():
    names = lab.house_names(Sizes(), 16)
    part = lab.parts("wiring")["LayerScale"]
    made = lab.evaluate(part.expression(names))
    assert isinstance(made, partial) and inspect.isclass(made.func)
    assert issubclass(lab.parts("wiring")["PreNorm"].target, PreNorm)
    assert lab.parts("mixer")["GatedConvolution"].target is GatedConvolution
    assert lab.parts("mixer")["FourierMixing"].target is FourierMixing
