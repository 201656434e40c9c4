"""Triton kernels, one topic a file. A chapter builds each kernel step by step; this is where the finished ones live.

`from tfkit.kernels.softmax import softmax`: module and function share a name. The same kernels run on a GPU and,
without one, in Triton's interpreter on CPU tensors. `DEVICE` says where ("cuda" or "cpu"), `INTERPRET` whether it is
the interpreter, `HAS_TRITON` whether there is a Triton at all, and `guarded()` catches accesses outside a tensor.
Import `triton`, `tl` and `jit` from here in a notebook that defines kernels of its own, so that the mode is set
first.
"""

from ._runtime import DEVICE, HAS_GPU, HAS_TRITON, INTERPRET, autotune, config, guarded, jit, tl, triton

__all__ = ["DEVICE", "HAS_GPU", "HAS_TRITON", "INTERPRET", "autotune", "config", "guarded", "jit", "tl", "triton"]
