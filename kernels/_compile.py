"""Compile kernels for a GPU without launching them, also for one that is not there.

The driver is replaced by one that only names its target, and every launch ends behind the compiler: Triton to LLVM to
machine code. Tensors have shapes and types but no memory (device "meta"), so full sizes cost nothing. That finds what
the interpreter forgives: types that do not match, blocks that are no powers of two, products too small for the tensor
cores, more shared memory than a multiprocessor has. And it fills Triton's cache on disk: what several processes have
compiled here side by side, `kernels.bench` finds ready when it measures.

The kernels must be defined as for a GPU: where there is none, `torch.cuda.is_available` has to be replaced before they
are imported, as tests/kernels/compile_for.py does.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# What one program may have on a device of each kind: bytes of shared memory, and how many multiprocessors there are.
TARGETS = {
    "cuda:75": (65_536, 40),  # T4
    "cuda:80": (166_912, 108),  # A100
    "cuda:89": (101_376, 128),  # RTX 4090
    "cuda:90": (232_448, 132),  # H100, H200
    "hip:gfx90a": (65_536, 110),  # MI250, one of its two halves
    "hip:gfx942": (65_536, 304),  # MI300
}


@dataclass
class Compiled:
    """One kernel that was compiled: its name, its constants, bytes of shared memory, and Triton's own object."""

    name: str
    constants: dict
    shared: int
    kernel: object = field(repr=False)


class _Utilities:
    def __init__(self, shared, processors):
        self.properties = {"max_shared_mem": shared, "multiprocessor_count": processors}

    def get_device_properties(self, device):
        return self.properties


class _Driver:
    """A driver without a device."""

    def __init__(self, target, shared, processors):
        from triton.backends.compiler import GPUTarget

        self.number = list(TARGETS).index(target) if target in TARGETS else len(TARGETS)  # Triton caches by device

        backend, arch = target.split(":")
        wave = 32 if backend == "cuda" else 64
        self.target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, wave)
        self.utils = _Utilities(shared, processors)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


def here():
    """The (target, shared, processors) of the GPU of this machine, for `pretend`."""
    from triton.runtime import driver

    target, known = driver.active.get_current_target(), driver.active.utils.get_device_properties(0)
    return f"{target.backend}:{target.arch}", known["max_shared_mem"], known["multiprocessor_count"]


@contextmanager
def only_compiled(target, shared=None, processors=None, share=(0, 1), ends=False, device="meta"):
    """Inside, launches of kernels compile for `target` ("cuda:90"), and the list that comes back grows by each.

    share: (i, k) compiles configurations i, i + k, ... of each search, so that k processes can divide them; ends: the
    first and the last that the pruning leaves, and no more. device: where the tensors are, "cpu" for a function that
    looks at numbers.
    """
    from triton.runtime import autotuner, driver, jit

    from . import _runtime as runtime

    if runtime.INTERPRET:
        raise RuntimeError("the kernels were defined for the interpreter, which compiles nothing")
    known = TARGETS.get(target, (0, 0))
    compiled, run, search, kept = [], jit.JITFunction.run, autotuner.Autotuner.run, runtime.DEVICE
    before = driver._active

    def compile_one(self, *args, grid, warmup=False, **constants):
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        compiled.append(Compiled(self.__name__, constants, kernel.metadata.shared, kernel))
        return kernel

    def compile_some(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
        chosen = dict.fromkeys((configs[0], configs[-1])) if ends else configs[share[0] :: share[1]]
        for config in chosen:
            self.fn.run(*args, **kwargs, **config.all_kwargs())
        self.nargs = None

    try:
        driver.set_active(_Driver(target, shared or known[0], processors or known[1]))
        runtime.limits.cache_clear()
        jit.JITFunction.run, autotuner.Autotuner.run, runtime.DEVICE = compile_one, compile_some, device
        yield compiled
    finally:
        jit.JITFunction.run, autotuner.Autotuner.run, runtime.DEVICE = run, search, kept
        runtime.limits.cache_clear()
        driver.set_active(before)
