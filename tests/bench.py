"""Speed as ratios, each against a peer in the same run: `make bench`.

Sections: tfkit's parts against torch.nn and transformers; the cost of `import tfkit`; each chapter's mechanisms against
its plain reference; the length from which on each mixer of the course beats fused attention; the run time of each
notebook. `python -m tests.bench parts imports mechanisms crossovers notebooks` chooses.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from tfkit import measure
from tfkit.authoring.files import NOTEBOOKS
from tfkit.authoring.notebooks import ENVIRONMENT
from tfkit.zoo.attention import MultiHeadAttention
from tfkit.zoo.transformer import gpt2, transformer_encoder

GOAL = 1.05  # at most this times the fastest peer
BATCH, TOKENS, WIDTH, HEADS = 8, 256, 256, 4


def forward(model: nn.Module, *inputs) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model(*inputs)

    return call


def training_step(model: nn.Module, *inputs) -> Callable[[], None]:
    def call() -> None:
        result = model(*inputs)
        result.sum().backward()
        model.zero_grad(set_to_none=True)

    return call


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Logits(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids, use_cache=False).logits


def hf_gpt2(vocabulary: int, depth: int) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=TOKENS, n_embd=WIDTH, n_layer=depth, n_head=HEADS,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    return Logits(transformers.GPT2LMHeadModel(config))


def torch_layer(depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False) if depth > 1 else layer


def parts() -> bool:
    """Our attention, block, encoder and language model against equals with as many weights."""
    x, ids = torch.randn(BATCH, TOKENS, WIDTH), torch.randint(96, (BATCH, TOKENS))
    pairs = {
        "multi-head attention": (MultiHeadAttention(WIDTH, HEADS), {"torch.nn": TorchAttention()}, x),
        "block": (transformer_encoder(WIDTH, 1, HEADS).blocks[0], {"torch.nn": torch_layer(1)}, x),
        "encoder, 4 blocks": (transformer_encoder(WIDTH, 4, HEADS), {"torch.nn": torch_layer(4)}, x),
        "language model, 4 blocks": (gpt2(96, TOKENS, WIDTH, 4, HEADS), {"transformers": hf_gpt2(96, 4)}, ids),
    }  # fmt: skip
    print(f"batch {BATCH}, {TOKENS} tokens, width {WIDTH}, {HEADS} heads; time of tfkit over the peer's, goal {GOAL}")
    good = True
    for name, (ours, peers, inputs) in pairs.items():
        for peer, theirs in peers.items():
            for what, run in (("forward", forward), ("forward and backward", training_step)):
                for model in (ours, theirs):
                    model.train(what != "forward")
                found = measure.time_ratio(run(ours, inputs), run(theirs, inputs), repeats=15)
                mark = "" if found.ratio <= GOAL else "  above the goal"
                good &= found.ratio <= GOAL
                print(
                    f"{name:26} {what:22} {found.ratio:5.2f} x {peer:13} ({1e3 * found.seconds:6.1f} ms), "
                    f"{measure.parameters(ours):,} against {measure.parameters(theirs):,} parameters{mark}"
                )
    return good


def imports() -> bool:
    """What `import tfkit` costs beyond `import torch`: at most 0.1 s."""
    script = "import time, torch; t = time.perf_counter(); import tfkit; print(time.perf_counter() - t)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(5)]
    print(f"import tfkit after import torch: {statistics.median(seconds):.4f} s")
    return statistics.median(seconds) <= 0.1


def mechanisms() -> bool:
    """A line for each mechanism that a chapter lists, its training step against the chapter's plain reference."""
    import tfkit.zoo

    for found in pkgutil.iter_modules(tfkit.zoo.__path__):
        table = getattr(importlib.import_module(f"tfkit.zoo.{found.name}"), "mechanisms", None)
        if table:
            print(f"\n{found.name}")
            measure.compare(table)
    return True


def crossovers() -> bool:
    """For every mixer of chapters 10 to 16 the length from which on it is faster than fused attention for good."""
    from tfkit.zoo import long_range_arena as arena

    price = lambda name: [arena.cost(name, arena.Plan(length=n, size=64)) for n in arena.LENGTHS]
    dense, good = price("plain attention"), True
    print(f"one text, width 64, 4 heads, window, rank or chunk 64; tokens {', '.join(map(str, arena.LENGTHS))}")
    print(f"{'':22} {'claims':>6} {'forward':>9} {'training':>9}   time over dense attention, forward, by length")
    for name, entry in arena.mixers.items():
        if entry.chapter < 10:
            continue
        found = price(name)
        meet = [
            arena.crossover(arena.LENGTHS, [getattr(c, what) for c in found], [getattr(c, what) for c in dense])
            for what in ("forward", "training")
        ]
        late = entry.work < 2 and meet[0] > arena.LENGTHS[-1]
        good &= not late
        ratios = " ".join(f"{a.forward / b.forward:6.2f}" for a, b in zip(found, dense, strict=True))
        print(
            f"{name:22} n^{entry.work:<4.3g} {meet[0]:9.0f} {meet[1]:9.0f}   {ratios}{'  above the goal' * late}",
            flush=True,
        )
    return good


def notebooks() -> bool:
    """Run time of each notebook in seconds, with one thread."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.update(ENVIRONMENT)
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        started = time.perf_counter()
        NotebookClient(nb, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        print(f"{path.stem:34} {time.perf_counter() - started:6.1f} s", flush=True)
    return True


def main() -> None:
    sections = {f.__name__: f for f in (parts, imports, mechanisms, crossovers, notebooks)}
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("sections", nargs="*", help=", ".join(sections))
    chosen = parser.parse_args().sections or list(sections)
    if unknown := set(chosen) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    results = {}
    for name in chosen:
        print(f"\n== {name}: {sections[name].__doc__.splitlines()[0]}", flush=True)
        results[name] = sections[name]()
    print("\n" + json.dumps({name: "goal met" if ok else "goal missed" for name, ok in results.items()}))


if __name__ == "__main__":
    main()
