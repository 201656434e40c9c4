"""Compile every kernel for an H100 or H200 on a machine that has none: python -m tests.kernels.compile_for_hopper

The kernels are defined as for a GPU and the driver is one that only names its target, so each launch ends after the
compiler: Triton to LLVM to PTX to machine code, with the tensors' real dtypes and alignments. That finds what the
interpreter forgives: types that do not match, blocks that are no powers of two, products too small for the tensor
cores, more shared memory than a multiprocessor has. It computes nothing, so results are not looked at.
"""

import os
import sys
import time
import warnings

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
warnings.simplefilter("ignore")
# ruff: noqa: E402

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import autotuner, driver, jit

torch.cuda.is_available = lambda: True  # before kernels is imported
SHARED = 232_448  # bytes of shared memory that one program may use on compute capability 9.0


class Hopper:
    """A driver without a device."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


launched, run = [], jit.JITFunction.run


def compile_only(self, *args, grid, warmup=False, **constants):
    kernel = run(self, *args, grid=grid, warmup=True, **constants)
    launched.append((self.__name__, constants, kernel.metadata.shared))
    return kernel


def compile_some(self, *args, **kwargs):
    """In place of a search: the first and the last configuration that the pruning leaves."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
    for config in dict.fromkeys((configs[0], configs[-1])):
        result = self.fn.run(*args, **kwargs, **config.all_kwargs())
    self.nargs = None
    return result


def sizes(entry):
    """A tiny size, and the last size as wide as it is measured but with little of everything else."""
    wide = {k: v if k in ("columns", "e", "width", "tokens") else bench_tiny(v) for k, v in entry["sizes"][-1].items()}
    small = entry.get("tiny") or bench_tiny(entry["sizes"][0])
    return [(small, torch.float32), (small, torch.bfloat16)] + [(wide, torch.bfloat16)] * (wide != small)


def bench_tiny(size):
    from kernels import bench

    return bench.tiny(size)


def main(names):
    driver.set_active(Hopper())
    jit.JITFunction.run, autotuner.Autotuner.run = compile_only, compile_some
    import kernels._runtime as runtime

    assert not runtime.INTERPRET
    runtime.DEVICE = "cpu"  # the tensors stay here
    runtime.empty = lambda shape, like, dtype=None: torch.zeros(shape, dtype=dtype or like.dtype)  # nothing fills it
    torch.cuda.get_device_properties = lambda *_: type("H200", (), {"multi_processor_count": 132})()
    from kernels import bench

    failed = 0
    for entry in bench.entries(names):
        for size, dtype in sizes(entry):
            before, started = len(launched), time.perf_counter()
            try:
                inputs = entry["inputs"](size, dtype, "cpu")
                bench.evaluate(entry["ours"], inputs, entry["differentiate"])
                found = launched[before:]
                greedy = [f"{name} wants {shared} bytes" for name, _, shared in found if shared > SHARED]
                reason = ", ".join(greedy) or ("" if found else "nothing was launched")
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            failed += bool(reason)
            kinds = sorted({name for name, *_ in launched[before:]})
            took = f"{time.perf_counter() - started:.0f} s"
            print(f"{entry['name']:28} {str(dtype)[6:]:9} {reason or ', '.join(kinds)} ({took})", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 100))
