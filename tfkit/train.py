"""One training loop for every chapter and for real runs, and the history that it returns."""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfkit.parallel import barrier, each_tensor, engine, mean, own_rows, states, world


def quiet() -> bool:
    """True when only static output is wanted: under the tests, and while notebooks are executed to be stored."""
    return os.environ.get("TFKIT_STATIC", "") not in ("", "0")


def set_seed(seed: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; positions whose target is -100 do not count. Logits (..., V), targets (...)."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of positions where the largest logit is the target; targets of -100 do not count. Shapes as above."""
    asked = targets != -100
    return (logits.argmax(-1)[asked] == targets[asked]).double().mean().item()


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Learning-rate factor: linear from 1/warmup to 1 over `warmup` steps, then half a cosine down to `floor` at
    `steps`, where it stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup) if step < steps else 1.0
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done))


def matrices_decay(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Parameter groups for an optimizer: matrices and larger decay; vectors (biases, gains of norms) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [([p for p in trained if p.ndim >= 2], weight_decay), ([p for p in trained if p.ndim < 2], 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


@dataclass(repr=False)
class History:
    """What happened during `fit`: a loss for every step, validation values where asked, and how long it took (s)."""

    loss: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    grad_norm: list[float] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    def __repr__(self) -> str:
        """One line; numbers that differ from run to run stand in angle brackets."""
        values = [f"loss {first:.3g} to {self.last():.3g}" for first in self.loss[:1]]
        values += [f"validation {value:.4g}" for value in [*self.validation.values()][-1:]] + [f"{self.seconds:.1f} s"]
        stopped = ", interrupted" * self.interrupted
        return f"History: {self.steps} steps{stopped}, \u27e8{', '.join(values)}\u27e9"

    def _repr_mimebundle_(self, include=None, exclude=None):
        """In a notebook: the line, and the curve below it."""
        if not self.loss:
            return {"text/plain": repr(self)}
        import matplotlib.pyplot as plt

        from tfkit.figures import bundle

        figure, said = self.plot().figure, " and validation values" * bool(self.validation)
        data, metadata = bundle(figure, f"Training loss{said} against the step, {self.steps} steps.")
        plt.close(figure)
        return data | {"text/plain": repr(self)}, metadata

    @property
    def steps(self) -> int:
        return len(self.loss)

    def last(self, steps: int = 20) -> float:
        """Mean training loss over the last `steps` steps."""
        tail = self.loss[-steps:]
        return sum(tail) / len(tail) if tail else math.nan

    def plot(self, ax=None, label: str = "training", log: bool = False):
        """Draw the loss against the step (and validation values as dots); returns the axes."""
        from tfkit.plots import curve

        steps = range(1, self.steps + 1)
        ax = curve(steps, self.loss, ax=ax, label=label, xlabel="step", ylabel="loss (nats)", smooth=0.9)
        if self.validation:
            places, values = list(self.validation), list(self.validation.values())
            ax.plot(places, values, "o", ms=4, color="black", label=f"{label}, validation")
            ax.legend(frameon=False)
        if log:
            ax.set_yscale("log")
        return ax


def minibatches(*tensors: Tensor, size: int, seed: int = 0) -> Iterable[tuple[Tensor, ...]]:
    """Endless shuffled minibatches of `size` rows: every row once per epoch, without what is left over at its end."""
    rows = {len(t) for t in tensors}
    if len(rows) != 1:
        raise ValueError(f"tensors must have as many rows as each other, got {[len(t) for t in tensors]}")
    count = rows.pop()
    if not 1 <= size <= count:
        raise ValueError(f"size must be between 1 and the number of rows, {count}; got {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(t[chosen] for t in tensors)


OPTIONS = {
    "weight_decay": 0.01, "warmup": None, "floor": 0.1, "clip": 1.0, "seed": None, "optimizer": None, "schedule": None,
    "callbacks": (), "accumulate": 1, "precision": "fp32", "save": None, "resume": None, "parallel": "ddp",
}  # fmt: skip


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    steps: int,
    *,
    lr: float | None = None,
    loss: Callable[..., Tensor] | None = None,
    validate: Callable[[], float] | None = None,
    every: int = 100,
    **options,
) -> History:
    """Train `model` in place with AdamW for `steps` steps and return the history.

    batches   yields (inputs, ..., targets); `model(*inputs)` is compared with the targets by `next_token_loss`. They
              are moved to the model's device. A list or a `DataLoader` that ends is started again
    lr        the largest learning rate, 3e-3 unless told
    loss      instead of that comparison: a function loss(model, *batch) -> scalar
    validate  called every `every` steps and at the end, in eval mode and without gradients; its number is kept
    options   weight_decay (0.01), warmup (a tenth of the steps), floor (0.1: the last learning rate over the largest),
              clip (1.0, the largest gradient norm), seed (None)
      optimizer   one that exists, or a function of the model that makes it; its own learning rates and groups count
      schedule    a function (step, steps) -> factor of the learning rates, instead of `warmup_cosine`
      callbacks   functions of (model, history), called after each step; one that returns True ends the training
      accumulate  batches for each step (1), whose mean loss it takes
      precision   "fp32" (as the weights are), or "bf16" for autocast
      save        a file for checkpoints, written every `every` steps and at the end
      resume      such a file, to continue to the bit what was saved with the same arguments; the batches must be given
                  as they were at first. True: the file of `save`, where it exists
      parallel    "ddp" or "fsdp": what wraps the model among several processes

    Started by `torchrun` (or with torch.distributed set up), every process calls `fit` with the same batches and takes
    its share of their rows; losses must be means over rows. The first alone shows progress and writes. "fsdp" leaves
    the model sharded, while checkpoints hold whole weights.

    Interrupting the kernel keeps the model and returns the history so far. A loss that is not finite raises
    FloatingPointError naming the step; the model then still has the weights from before that step.
    """
    run = _Run(model, batches, steps, lr, loss, _settings(steps, every, lr, options))
    history, given = run.history, run.given
    started, was_training, bar = time.perf_counter() - history.seconds, model.training, _bar(steps, history.steps)
    model.train()
    try:
        while history.steps < steps:
            run.step()
            due = history.steps % every == 0 or history.steps == steps
            if validate is not None and due:
                history.validation[history.steps] = _evaluate(model, validate)
            bar.set_postfix_str(f"loss {history.loss[-1]:.3f}", refresh=False)
            bar.update()
            stop = any([callback(model, history) for callback in given.callbacks])
            if given.save and (due or stop):
                history.seconds = time.perf_counter() - started
                run.save(given.save)
            if stop:
                break
    except KeyboardInterrupt:
        history.interrupted = True
        if world()[0] == 0:
            said = f"interrupted after {history.steps} of {steps} steps; the model keeps what it has learned"
            print(said, file=sys.stderr)
    finally:
        history.seconds = time.perf_counter() - started
        run.close()
        bar.close()
        model.train(was_training)
    return history


def _settings(steps: int, every: int, lr: float | None, options: dict) -> SimpleNamespace:
    """The options with their defaults; raises TypeError or ValueError for what cannot be meant."""
    if unknown := set(options) - set(OPTIONS):
        raise TypeError(f"fit() has no option {', '.join(sorted(unknown))}; it has {', '.join(OPTIONS)}")
    given = SimpleNamespace(**OPTIONS | options)
    for name, value, least in (("steps", steps, 0), ("every", every, 1), ("accumulate", given.accumulate, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, choices in (("precision", ("fp32", "bf16")), ("parallel", ("ddp", "fsdp"))):
        if getattr(given, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(given, name)!r}")
    if given.optimizer is not None and (lr is not None or "weight_decay" in options):
        raise ValueError("lr and weight_decay belong to the optimizer that was given; set them there")
    if given.schedule is not None and not {"warmup", "floor"}.isdisjoint(options):
        raise ValueError("warmup and floor belong to the schedule that was given; set them there")
    if given.resume is True and not given.save:
        raise ValueError("resume=True continues the file of save=, and there is none; pass resume=FILE")
    given.warmup = max(1, steps // 10) if given.warmup is None else given.warmup
    given.schedule = given.schedule or partial(warmup_cosine, warmup=given.warmup, floor=given.floor)
    return given


class _Run:
    """The moving parts of one call of `fit`: engine, optimizer, place in the data, history."""

    def __init__(self, model: nn.Module, batches: Iterable, steps: int, lr: float | None, loss, given: SimpleNamespace):
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"nothing to train: no parameter of {type(model).__name__} has requires_grad=True")
        if given.seed is not None:
            set_seed(given.seed)
        self.model, self.steps, self.loss, self.given = model, steps, loss or _default_loss, given
        self.device, self.history = trained[0].device, History()
        self.engine = engine(model, given.parallel, self.device)
        self.optimizer = given.optimizer
        if self.optimizer is None:
            lr = 3e-3 if lr is None else lr
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=given.weight_decay)
        elif not isinstance(self.optimizer, torch.optim.Optimizer):
            self.optimizer = given.optimizer(model)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in known for p in model.parameters()):
            raise ValueError("the optimizer has none of the model's parameters; pass a function of the model")
        self.settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.stream = _Stream(batches)
        if given.resume and (given.resume is not True or os.path.exists(given.save)):
            self.load(given.save if given.resume is True else given.resume)

    def step(self) -> None:
        """One step of the optimizer, over `accumulate` batches."""
        step, parts, seen = self.history.steps, self.given.accumulate, 0.0
        factor = self.given.schedule(step, self.steps)
        for group, start in zip(self.optimizer.param_groups, self.settings, strict=True):
            group["lr"] = start["lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            batch = own_rows(each_tensor(self.stream.next(step, self.steps), self._to_device))
            with contextlib.ExitStack() as around:
                if part + 1 < parts and hasattr(self.engine, "no_sync"):
                    around.enter_context(self.engine.no_sync())
                if self.given.precision == "bf16":
                    around.enter_context(torch.autocast(self.device.type, torch.bfloat16))
                value = self.loss(self.engine, *batch) / parts
            seen += (known := mean(value.detach()).item())
            if not math.isfinite(known):
                largest = max(start["lr"] for start in self.settings)
                said = f"the loss is {known} at step {step + 1} of {self.steps}"
                raise FloatingPointError(f"{said}; a smaller lr than {largest:g} may help")
            value.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.given.clip or math.inf)
        self.optimizer.step()
        self.history.loss.append(seen)
        self.history.grad_norm.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Leave the optimizer as it was given: with its own learning rates."""
        for group, start in zip(self.optimizer.param_groups, self.settings, strict=True):
            group["lr"] = start["lr"]

    def save(self, path: str | os.PathLike) -> None:
        """Write everything that `load` needs, whole or not at all. Holds tensors and plain values alone."""
        weights, moments = states(self.model, self.optimizer)
        content = {"model": weights, "optimizer": moments, "history": asdict(self.history), "stream": self.stream.place,
                   "rng": _rng_state()}  # fmt: skip
        if world()[0] == 0:
            torch.save(content, f"{path}.part")
            os.replace(f"{path}.part", path)
        barrier()

    def load(self, path: str | os.PathLike) -> None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        states(self.model, self.optimizer, content)
        for group, start in zip(self.optimizer.param_groups, self.settings, strict=True):
            group.update(start)
        self.history = History(**content["history"])
        self.stream.go_to(content["stream"])
        _set_rng_state(content["rng"])


class _Stream:
    """Batch after batch, from the start again where a finite iterable ends; it knows its place and can return to it."""

    def __init__(self, batches: Iterable):
        self.batches, self.epoch, self.taken, self.source, self.rng = batches, -1, 0, None, None

    def _open(self) -> None:
        self.epoch, self.taken, self.rng = self.epoch + 1, 0, _rng_state(self.batches)
        if hasattr(sampler := getattr(self.batches, "sampler", None), "set_epoch"):
            sampler.set_epoch(self.epoch)
        self.source = iter(self.batches)

    def next(self, step: int, steps: int) -> tuple:
        """The next batch. Raises ValueError when there is none, naming the step."""
        if self.source is None:
            self._open()
        batch = next(self.source, None)
        if batch is None and self.taken and not isinstance(self.batches, Iterator):
            self._open()
            batch = next(self.source, None)
        if batch is None and not self.taken:
            raise ValueError(f"there is no batch in {type(self.batches).__name__} at step {step + 1} of {steps}")
        if batch is None:
            raise ValueError(f"the batches ended after {step} of {steps} steps; pass a list, a DataLoader or an "
                             "endless iterator, e.g. minibatches(...)")  # fmt: skip
        self.taken += 1
        return batch if isinstance(batch, tuple | list) else (batch,)

    @property
    def place(self) -> dict:
        return {"epoch": self.epoch, "taken": self.taken, "rng": self.rng}

    def go_to(self, place: dict) -> None:
        """Begin the epoch as it was begun, and pass over the batches that were taken from it."""
        _set_rng_state(place["rng"], self.batches)
        self.epoch = place["epoch"] - 1
        self._open()
        for _ in range(place["taken"]):
            self.next(0, 0)


def _rng_state(batches: Iterable = ()) -> dict:
    """The global generators of Python, NumPy and torch, and the loader's own, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    state = {"python": random.getstate(), "numpy": (name, torch.from_numpy(keys.copy()), *rest)}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    own = getattr(batches, "generator", None)
    return state | {"torch": torch.get_rng_state(), "cuda": cuda, "loader": None if own is None else own.get_state()}


def _set_rng_state(state: dict, batches: Iterable = ()) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if state["loader"] is not None:
        batches.generator.set_state(state["loader"])


def _default_loss(model: nn.Module, *batch) -> Tensor:
    return next_token_loss(model(*batch[:-1]), batch[-1])


@torch.no_grad()
def _evaluate(model: nn.Module, validate: Callable[[], float]) -> float:
    model.eval()
    try:
        return float(validate())
    finally:
        model.train()


def _bar(steps: int, done: int):
    hidden = quiet() or world()[0] > 0
    if hidden:
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm
    return tqdm(total=steps, initial=done, disable=hidden, leave=False, unit="step", mininterval=0.2)
