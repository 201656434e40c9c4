"""Speed as ratios, each against a peer in the same run: `make bench`.

Sections: tfkit's parts against torch.nn and transformers; against x-transformers, mambapy and performer-pytorch where
they are installed; drawing a token; writing a text with state against recomputation; the cost of `import tfkit`; each
chapter's mechanisms against its plain reference; the length from which on each mixer of the course beats fused
attention; the run time of each notebook. `python -m tests.bench parts writing` chooses.
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
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from tfkit import measure
from tfkit.authoring.files import NOTEBOOKS
from tfkit.authoring.notebooks import ENVIRONMENT
from tfkit.zoo.attention import MultiHeadAttention, causal_attention
from tfkit.zoo.attention_variants import GroupedQueryAttention
from tfkit.zoo.feedforward import llama
from tfkit.zoo.linear_attention import (
    Featured,
    RandomFeatures,
    causal_feature_attention,
    elu_features,
    feature_attention,
)
from tfkit.zoo.positions import Rotary
from tfkit.zoo.state_spaces import MambaMixer, mamba
from tfkit.zoo.transformer import generate, gpt2, greedy, language_model, sampler, transformer_encoder

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


class Grouped(nn.Module):
    """A layer of `transformers`' Llama, attention alone, with rotary positions and its own causal form."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

        config = LlamaConfig(hidden_size=width, num_attention_heads=heads, num_key_value_heads=groups,
                             attn_implementation="sdpa")  # fmt: skip
        self.inner, self.turn = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x):
        places = torch.arange(x.shape[1])[None]
        return self.inner(x, self.turn(x, places), None)[0]


def compare(name: str, ours: nn.Module, theirs: nn.Module, peer: str, inputs, repeats: int = 9) -> bool:
    """Two lines: forward, and forward with backward, each as ratios of time and of the most memory held."""
    good = True
    for what, run in (("forward", forward), ("forward and backward", training_step)):
        for model in (ours, theirs):
            model.train(what != "forward")
        a, b = run(ours, inputs), run(theirs, inputs)
        found, memory = measure.time_ratio(a, b, repeats=repeats), measure.peak_bytes(a) / measure.peak_bytes(b)
        good &= found.ratio <= GOAL
        print(f"{name:32} {what:22} {found.ratio:5.2f} x {peer:18} ({1e3 * found.seconds:7.1f} ms), memory "
              f"{memory:5.2f} x{'  above the goal' * (found.ratio > GOAL)}", flush=True)  # fmt: skip
    return good


def peers() -> bool:
    """Grouped queries at 2,048 tokens against transformers; other libraries where they are installed, in pairs."""
    x, ids = torch.randn(1, 2048, WIDTH), torch.randint(96, (1, 1024))
    ours = GroupedQueryAttention(WIDTH, 8, 2, bias=False, attend=Rotary(WIDTH // 8, causal_attention))
    good = compare("grouped queries, 2,048 tokens", ours, Grouped(WIDTH, 8, 2), "transformers", x)
    if find_spec("x_transformers"):
        from x_transformers import Decoder, TransformerWrapper

        theirs = TransformerWrapper(
            num_tokens=96, max_seq_len=1024, use_abs_pos_emb=False,
            attn_layers=Decoder(dim=WIDTH, depth=4, heads=8, attn_dim_head=32, attn_kv_heads=2, attn_flash=True,
                                rotary_pos_emb=True, rotary_emb_dim=32, use_rmsnorm=True, ff_swish=True, ff_glu=True,
                                ff_no_bias=True, ff_mult=8 / 3),
        )  # fmt: skip
        mixer = lambda: GroupedQueryAttention(WIDTH, 8, 2, bias=False, attend=Rotary(32, causal_attention))
        model = llama(96, WIDTH, 4, 8, int(WIDTH * 8 / 3), mixer=mixer)
        good &= compare("Llama, 4 blocks, 1,024 tokens", model, theirs, "x-transformers", ids)
    if find_spec("mambapy"):
        from mambapy.mamba import MambaBlock, MambaConfig

        theirs = MambaBlock(MambaConfig(d_model=WIDTH, n_layers=1))
        good &= compare("Mamba, 1,024 tokens", MambaMixer(WIDTH), theirs, "mambapy", x[:, :1024], repeats=5)
    if find_spec("performer_pytorch"):
        from performer_pytorch import SelfAttention

        for name, form in (("Performer", feature_attention), ("causal Performer", causal_feature_attention)):
            theirs = SelfAttention(
                WIDTH, causal=form is causal_feature_attention, heads=4, dim_head=64, nb_features=128
            )
            ours = MultiHeadAttention(WIDTH, 4, attend=Featured(RandomFeatures(64, 128), form))
            good &= compare(f"{name}, 1,024 tokens", ours, theirs, "performer-pytorch", x[:, :1024], repeats=3)
    return good


def drawing() -> bool:
    """A token from 50,257 by top-k and top-p, against the rules of transformers and the usual lines of nanoGPT."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    generator, good = torch.Generator().manual_seed(0), True
    cut, nucleus = TopKLogitsWarper(50), TopPLogitsWarper(0.9)
    drawn = lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=generator)

    def usual(logits):
        logits = logits / 0.8
        least = logits.topk(50).values[:, -1:]
        return drawn(logits.masked_fill(logits < least, -torch.inf))

    for batch in (1, 8):
        logits = 3 * torch.randn(batch, 50257)
        for name, ours, theirs, peer in (
            ("top-k", sampler(0.8, 50), usual, "nanoGPT's lines"),
            ("top-k", sampler(0.8, 50), lambda x: drawn(cut(None, x / 0.8)), "transformers"),
            ("top-p", sampler(0.8, None, 0.9), lambda x: drawn(nucleus(None, x / 0.8)), "transformers"),
        ):
            found = measure.time_ratio(partial(ours, logits), partial(theirs, logits), repeats=31)
            good &= found.ratio <= GOAL
            print(f"{name}, batch {batch}: {found.ratio:5.2f} x {peer} ({1e3 * found.seconds:.2f} ms)", flush=True)
    return good


class Preallocated:
    """Our GPT-2's weights in a loop written for it alone: keys and values go into tensors made at the start."""

    def __init__(self, model, batch: int, length: int):
        self.model, mixer = model, model.stack.blocks[0].mix.part
        shape = (2, batch, mixer.heads, length, mixer.head_width)
        self.kept = [torch.zeros(shape) for _ in model.stack.blocks]

    @torch.no_grad()
    def write(self, ids, steps: int):
        model, past, fresh = self.model, 0, ids
        for _ in range(steps):
            n, x = fresh.shape[1], model.embed(fresh, past)
            for block, kept in zip(model.stack.blocks, self.kept, strict=True):
                mixer, feed = block.mix.part, block.feed
                q, k, v = mixer.to_qkv(block.mix.norm(x)).unflatten(-1, (3, mixer.heads, -1)).permute(2, 0, 3, 1, 4)
                kept[0][:, :, past : past + n], kept[1][:, :, past : past + n] = k, v
                keys, values = kept[:, :, :, : past + n]
                y = F.scaled_dot_product_attention(q, keys, values, is_causal=n > 1)
                x = x + mixer.to_out(y.transpose(1, 2).flatten(2))
                x = x + feed.part(feed.norm(x))
            past, logits = past + n, F.linear(model.stack.norm(x)[:, -1], model.embed.table.weight)
            fresh = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, fresh], 1)
        return ids


@torch.no_grad()
def recomputed(model, ids, steps: int):
    for _ in range(steps):
        ids = torch.cat([ids, greedy(model(ids)[:, -1])[:, None]], 1)
    return ids


def writing() -> bool:
    """GPT-2 against a preallocated cache; tokens per second after 1,000, with state and from the start each time."""
    good, model = True, gpt2(96, 1024, 128, 4, 4).eval()
    for batch in (1, 8):
        prompt, peer = torch.randint(96, (batch, 16)), Preallocated(model, batch, 256)
        if not torch.equal(generate(model, prompt, 30), peer.write(prompt, 30)):
            raise RuntimeError("the two ways of writing differ, so their times say nothing")
        found = measure.time_ratio(partial(generate, model, prompt, 200), partial(peer.write, prompt, 200), repeats=5)
        good &= found.ratio <= GOAL
        print(f"GPT-2, batch {batch}: {found.ratio:5.2f} x a preallocated cache, {batch * 200 / found.seconds:,.0f} "
              f"tokens per second{'  above the goal' * (found.ratio > GOAL)}", flush=True)  # fmt: skip
    linear = partial(MultiHeadAttention, 64, 2, attend=Featured(elu_features, causal_feature_attention))
    models = {"attention": (language_model(96, 64, 2), 1), "Mamba": (mamba(96, 64, 2), 10),
              "linear attention": (language_model(96, 64, 2, mixer=linear), 10)}  # fmt: skip
    for name, (model, goal) in models.items():
        model.eval()
        for batch in (1, 8):
            long, short = torch.randint(96, (batch, 1000)), 8
            with_state, once = (partial(generate, model, long, steps) for steps in (short + 1, 1))
            again = partial(recomputed, model, long, short)
            step = (measure.seconds(with_state) - measure.seconds(once)) / short  # reading the prompt does not count
            whole = measure.seconds(again) / short
            good &= whole / step >= goal
            print(
                f"{name:18} batch {batch}: {batch / step:9,.0f} tokens per second with state, {batch / whole:7,.0f} "
                f"from the start, {whole / step:6.1f} times{'  below the goal' * (whole / step < goal)}",
                flush=True,
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
    sections = {f.__name__: f for f in (parts, peers, drawing, writing, imports, mechanisms, crossovers, notebooks)}
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
