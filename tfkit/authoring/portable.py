"""Run the tests as other processors would: other instruction sets and thread counts in the same machine."""

from __future__ import annotations

import os
import subprocess
import sys

from tfkit.authoring.files import ROOT
from tfkit.authoring.notebooks import ENVIRONMENT

# OPENBLAS_CORETYPE chooses how NumPy multiplies matrices, ATEN_CPU_CAPABILITY which of torch's loops run, the number of
# threads how sums are split. Four runs have every value at least once; `make test` itself is the fifth, with none set.
SETTINGS = (
    {"OPENBLAS_CORETYPE": "Haswell", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"},
    {"OPENBLAS_CORETYPE": "SkylakeX", "OMP_NUM_THREADS": "2"},  # without a capability: the best that there is
    {"OPENBLAS_CORETYPE": "Zen", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    {"OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
)


def portable(paths: list[str] | None = None) -> None:
    """Run kernel tests, zoo tests and notebooks under every setting. Raises SystemExit that names those that failed."""
    failed = []
    for chosen in SETTINGS:
        label = " ".join(f"{name}={value}" for name, value in chosen.items())
        print(f"== {label}", flush=True)
        environment = {**os.environ, **ENVIRONMENT, **chosen, "MKL_NUM_THREADS": chosen["OMP_NUM_THREADS"]}
        for name in {"OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY"} - set(chosen):
            environment.pop(name, None)
        workers = ["-n", "1"] if chosen["OMP_NUM_THREADS"] == "2" else []
        where = paths or ["tests/kernels", "tests/zoo", "notebooks"]
        command = [sys.executable, "-m", "pytest", "-q", *where, *workers]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            failed.append(label)
    if failed:
        sys.exit(
            f"something differs under: {'; '.join(failed)}. A stored number that cannot be stable stands inside "
            "\u27e8 \u27e9; a tolerance follows the size of the sum that it bounds."
        )
    print("all tests and stored outputs hold under all settings")
