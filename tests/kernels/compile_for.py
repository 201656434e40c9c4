"""Compile the kernels for GPUs that are not here: python -m tests.kernels.compile_for [TARGET ...] [--only NAME ...]

Without a target every entry of `benchmarks()` is compiled for Hopper, and for the others those kernels whose code
depends on the GPU: products on tensor cores, in tiles that must fit. See `kernels._compile`.
"""

import argparse
import os
import sys
import time
import warnings

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
warnings.simplefilter("ignore")
# ruff: noqa: E402

import torch

torch.cuda.is_available = lambda: True  # before kernels is imported

from kernels import _compile, _runtime

_runtime.empty = lambda shape, like, dtype=None: torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)

from kernels import _measure, bench

PRODUCTS = ("flash_attention_causal", "matmul_bias_gelu", "linear_attention", "decode_attention")


def sizes(entry, target):
    """A size and a type each: a tiny one and the last one, of which only the widths matter to the compiler."""
    half = torch.float16 if target == "cuda:75" else torch.bfloat16
    if target != "cuda:90":
        return [(entry["sizes"][-1], half)]
    small = entry.get("tiny") or bench.tiny(entry["sizes"][0])
    return [(small, torch.float32), (small if entry.get("numbers") else entry["sizes"][-1], half)]


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=list(_compile.TARGETS))
    parser.add_argument("--only", nargs="+", default=[])
    given = parser.parse_args(arguments)
    failed = 0
    for target in given.targets:
        limit = _compile.TARGETS[target][0]
        names = given.only or ([] if target == "cuda:90" else PRODUCTS)
        for entry in bench.entries(names):
            for size, dtype in sizes(entry, target):
                started = time.process_time()
                where = "cpu" if entry.get("numbers") else "meta"
                ends = target == "cuda:90"
                with _compile.only_compiled(target, ends=ends, share=(0, 1000), device=where) as found:
                    try:
                        inputs = entry["inputs"](size, dtype, where)
                        _measure.evaluate(entry["ours"], inputs, entry["differentiate"])
                        greedy = [f"{one.name} wants {one.shared} bytes" for one in found if one.shared > limit]
                        reason = ", ".join(greedy) or ("" if found else "nothing was launched")
                    except Exception as error:
                        reason = f"{type(error).__name__}: {error}"
                failed += bool(reason)
                kinds, took = ", ".join(sorted({one.name for one in found})), time.process_time() - started
                what = f"{reason or kinds} ({len(found)} in {took:.0f} s)"
                print(f"{target:10} {entry['name']:26} {str(dtype)[6:]:9} {what}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
