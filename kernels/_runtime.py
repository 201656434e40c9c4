"""Where the kernels run, decided here once and before any kernel is defined: on a GPU, or in Triton's interpreter.

Without a GPU (or with TRITON_INTERPRET=1 set by hand) every kernel runs in the interpreter, on CPU tensors, with
NumPy: slow, exact, and open to print() and pdb. Where Triton does not exist (macOS, Windows) the references work and
a kernel that is launched says what is missing.
"""

import os
import sys
import warnings
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
HAS_GPU = HAS_TRITON and torch.cuda.is_available()
INTERPRET = not HAS_GPU or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRET else "cuda"
MISSING = f"Triton is not installed; it exists for Linux, and this is {sys.platform}"

if HAS_TRITON:
    if INTERPRET:
        if "triton.language" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            raise RuntimeError(
                "import kernels before triton: there is no GPU here, so the kernels run in Triton's interpreter, and "
                "Triton decides that when it is imported. Or set TRITON_INTERPRET=1 before Python starts."
            )
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton now, and by every @triton.jit line from now on
    import triton
    import triton.language as tl

    jit = triton.jit
else:
    warnings.warn(f"{MISSING}. The references run, the kernels do not.", stacklevel=3)

    class _Nothing:
        """Stands for `triton` and `tl` while the files are read: every attribute is this object again."""

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args, **kwargs):
            return self

        def __getitem__(self, key):
            return self

        cdiv = staticmethod(lambda a, b: -(-a // b))
        next_power_of_2 = staticmethod(lambda n: 1 << (n - 1).bit_length())

    class _Absent:
        """A kernel that cannot be launched, and says why."""

        def __init__(self, function):
            self.__name__ = getattr(function, "__name__", "kernel")

        def __getitem__(self, grid):
            raise RuntimeError(f"{self.__name__} cannot run: {MISSING}.")

    triton = tl = _Nothing()

    def jit(function=None, **options):
        return _Absent(function) if function is not None else _Absent


def autotune(configs, key, interpret, **options):
    """`triton.autotune` on a GPU. In the interpreter nothing is timed and the constants `interpret` are used.

    configs: list of triton.Config, key: names of the arguments whose change asks for a new search, interpret: dict of
    the constants that the interpreter uses (few, large blocks: an operation costs about 60 microseconds there,
    whatever its size). Other options go to `triton.autotune`.
    """
    if not HAS_TRITON:
        return lambda kernel: kernel
    return triton.autotune([triton.Config(interpret)] if INTERPRET else configs, key=key, **options)


def in_shared(configs, like, need):
    """The configurations whose need(config), in bytes, fits the shared memory of `like`'s GPU; else the smallest."""
    limit = limits(like.device.index)[0]
    return [c for c in configs if need(c) <= limit] or [min(configs, key=need)]


def config(num_warps=4, num_stages=2, **constants):
    """A `triton.Config` with its constants as keywords: config(BLOCK=128, num_warps=8)."""
    return triton.Config(constants, num_warps=num_warps, num_stages=num_stages)


@lru_cache
def limits(index=None):
    """(bytes of shared memory for one program, multiprocessors, Triton's target) of the GPU with this index.

    In the interpreter as on Hopper, so that it plans alike.
    """
    if INTERPRET:
        return 232_448, 132, None
    driver = triton.runtime.driver.active
    known = driver.utils.get_device_properties(index or 0)
    return known["max_shared_mem"], known["multiprocessor_count"], driver.get_current_target()


def capability(index=None):
    """What the tensor cores are: ("cuda", 90) or ("hip", "gfx942"); ("cuda", 90) in the interpreter."""
    target = limits(index)[2]
    return ("cuda", 90) if target is None else (target.backend, target.arch)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(function, dtypes=FLOATS, **tensors):
    """Refuse what a kernel could only misread: another device, mixed or unknown dtypes, a mode switched too late.

    function: the public function's name for the message; dtypes: those allowed; tensors: by name, None is skipped.
    All tensors must share one dtype. Raises ValueError, and RuntimeError for the mode.
    """
    if not HAS_TRITON:
        raise RuntimeError(f"{function} cannot run: {MISSING}.")
    if not torch.compiler.is_compiling() and triton.knobs.runtime.interpret != INTERPRET:
        built, now = ("interpreter", "GPU") if INTERPRET else ("GPU", "interpreter")
        raise RuntimeError(
            f"{function}: the kernels were built for the {built} and TRITON_INTERPRET now asks for the {now}. "
            "A kernel's mode is fixed when it is defined: set the variable before importing kernels, in a fresh Python."
        )
    first = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{function}: {name} must be a tensor, it is a {type(x).__name__}")
        if x.device.type != DEVICE:
            raise ValueError(f"{function}: {name} is on {x.device}, and the kernels run on {DEVICE} here")
        if x.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{function}: {name} is {str(x.dtype).removeprefix('torch.')}; it must be {allowed}")
        old = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        if old and capability(x.device.index) < ("cuda", 80):
            arch = "{}.{}".format(*divmod(capability(x.device.index)[1], 10))
            raise ValueError(
                f"{function}: {name} is bfloat16, which needs compute capability 8.0, and this GPU has {arch}; "
                "use float16, with a scaled loss"
            )
        first = first or (name, x)
        if x.dtype != first[1].dtype or x.device != first[1].device:
            raise ValueError(
                f"{function}: {name} is {x.dtype} on {x.device} and {first[0]} is {first[1].dtype} on {first[1].device}"
            )


PLAIN = (torch.Tensor, torch.nn.Parameter)


def traced(x):
    """Are there shapes and no numbers within reach: torch.compile, export, fake tensors, inside of torch.func?"""
    return torch.compiler.is_compiling() or type(x) not in PLAIN or torch._C._are_functorch_transforms_active()


def readable(x):
    """May a check look at the numbers? Where they lie on the CPU: on a GPU it would wait for everything before."""
    return not traced(x) and x.device.type == "cpu"


_libraries = {}  # by name of the operator: what keeps it registered


def operator(schema, shapes):
    """A function of tensors and numbers that launches kernels, as the operator tfkit::<module>_<function> of torch.

    Called with real tensors it runs as it is, on the device of its first argument, which need not be the current one.
    While torch.compile or export trace, and for fake tensors, the operator stands for it: one opaque step, of which
    `shapes`, with the same arguments, says what comes out. schema: "(Tensor x, float eps) -> Tensor". Results are new
    memory, never a view of an argument.
    """

    def register(function):
        @wraps(function)
        def run(*arguments):
            device = arguments[0].device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return function(*arguments)
            with torch.cuda.device(device):
                return function(*arguments)

        name = f"{function.__module__.rpartition('.')[2]}_{function.__name__}"
        if name in _libraries:  # the module was loaded again
            _libraries[name]._destroy()
        library = _libraries[name] = torch.library.Library("tfkit", "FRAGMENT")
        library.define(name + schema)
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tfkit::{name}", shapes, lib=library)
        op = getattr(torch.ops.tfkit, name).default

        @wraps(function)
        def call(*arguments):
            return op(*arguments) if traced(arguments[0]) else run(*arguments)

        return call

    return register


def spread(found, needs):
    """The tensors of `found`, one for each True of `needs`, with None for each False."""
    result, taken = [], 0
    for need in needs:
        result.append(found[taken] if need else None)
        taken += int(need)
    return tuple(result)


def autocast(*tensors):
    """Under torch.autocast the tensors in the type that it asks for, as torch's own products; float64 stays."""
    if DEVICE == "meta" or not torch.is_autocast_enabled(DEVICE):
        return tensors
    to = torch.get_autocast_dtype(DEVICE)
    return tuple(t if t is None or t.dtype in (to, torch.float64) else t.to(to) for t in tensors)


def wide(dtype):
    """The torch dtype of sums and states: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype):
    """The Triton dtype to compute in: float64 for float64 (the gradient checks), float32 for all else."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype):
    """The Triton dtype of what `tl.dot` multiplies: the tensor's own, so that tensor cores are used.

    The interpreter computes silently wrong with bfloat16, so it multiplies in float32.
    """
    if dtype == torch.bfloat16 and INTERPRET:
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


TF32 = ("gfx942",)  # AMD's GPUs whose tensor cores take float32 in fewer bits


def precision(dtype):
    """`input_precision` of `tl.dot`: "tf32" for float32 where torch allows it and the GPU has it, else "ieee"."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    kind, arch = capability()
    return "tf32" if (arch >= 80 if kind == "cuda" else arch in TF32) else "ieee"


_guards = []  # the guards that are open, outermost first


def empty(shape, like, dtype=None):
    """Memory for a result, on the device of `like`; inside `guarded()` filled with NaN (or -1 for whole numbers).

    What a kernel forgets to write then shows in the result instead of hiding behind a lucky zero.
    """
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if _guards:
        out.fill_(float("nan") if out.is_floating_point() else True if out.dtype == torch.bool else -1)
    return out


def _span(tensor):
    """First byte and the byte behind the last of what a tensor view covers."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def guarded():
    """Catch in the interpreter every load and store that leaves the tensors given to the kernel.

    Alone, the interpreter reads and writes whatever lies there, like a GPU on a lucky day. Inside this context each
    unmasked address is compared with the memory of the launch's tensor arguments (views count as what they cover), an
    address outside raises IndexError with the distance, and `empty` fills results with NaN. On a GPU only the latter.
    """
    _guards.append(None)
    try:
        if INTERPRET and HAS_TRITON and len(_guards) == 1:
            with _checked_addresses():
                yield
        else:
            yield
    finally:
        _guards.pop()


@contextmanager
def _checked_addresses():
    from triton.runtime import interpreter

    np = interpreter.np  # what the interpreter computes with
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ["create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas"]
    kept = {name: getattr(builder, name) for name in names}
    arguments, call = executor._init_args_hst, executor.__call__
    launches = []  # (sorted starts, ends) of the launch that runs

    def tensors(values):
        for value in values:
            if isinstance(value, tuple | list):
                yield from tensors(value)
            elif hasattr(value, "base"):
                yield from tensors([value.base])
            elif isinstance(value, torch.Tensor):
                yield value

    def remember(self, positional, keywords):
        host = arguments(self, positional, keywords)
        spans = sorted(_span(x) for x in tensors([*host[0], *host[1].values()]))
        merged = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        launches.append((np.array([m[0] for m in merged], np.uint64), np.array([m[1] for m in merged], np.uint64)))
        return host

    def run(self, *args, **kwargs):
        depth = len(launches)
        try:
            return call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause = error
            while isinstance(cause, interpreter.InterpreterError):  # a helper inside a kernel wraps it once more
                cause = cause.__cause__
            if isinstance(cause, IndexError):
                raise IndexError(f"{self.fn.__name__}: {cause}") from None
            raise
        finally:
            del launches[depth:]

    def inspect(what, pointers, mask):
        starts, ends = launches[-1]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        used = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        used = np.atleast_1d(used)
        if used.size == 0:
            return
        if starts.size == 0:
            raise IndexError(f"{what} by a launch without tensors")
        slot = np.maximum(np.searchsorted(starts, used, side="right").astype(np.int64) - 1, 0)
        outside = (used < starts[slot]) | (used + np.uint64(size) > ends[slot])
        if outside.any():
            address, nearest = int(used[outside][0]), int(slot[outside][0])
            before = int(starts[nearest]) - address
            after = address + size - int(ends[nearest])
            where = f"{before // size} elements before" if before > 0 else f"{after // size} elements behind"
            raise IndexError(f"{what} of {int(outside.sum())} addresses outside every tensor, the first {where} one")

    def watch(name):
        def wrapped(self, *args, **kwargs):
            pointers, rest = (args[1], args[2:]) if name == "create_atomic_rmw" else (args[0], args[1:])
            mask = {"create_masked_load": 0, "create_masked_store": 1, "create_atomic_rmw": 1}.get(name)
            kind = {"create_masked_load": "load", "create_masked_store": "store"}.get(name, "atomic operation")
            inspect(kind, pointers, None if mask is None else rest[mask])
            return kept[name](self, *args, **kwargs)

        return wrapped

    try:
        executor._init_args_hst, executor.__call__ = remember, run
        for name in names:
            setattr(builder, name, watch(name))
        yield
    finally:
        executor._init_args_hst, executor.__call__ = arguments, call
        for name, function in kept.items():
            setattr(builder, name, function)
