"""Run the tests as other processors would: other instruction sets and thread counts in the same machine."""

from __future__ import annotations

import os
import subprocess
import sys

from tfkit.authoring.files import ROOT
from tfkit.authoring.notebooks import ENVIRONMENT

# Each group of settings runs with the paths beside it. OPENBLAS_CORETYPE chooses how NumPy multiplies matrices, ATEN_
# CPU_CAPABILITY which of torch's loops run; the number of threads decides how sums are split.
CORES = ("Haswell", "SkylakeX", "Zen", "Nehalem")
CAPABILITIES = ("default", "avx2", "native")


def settings() -> list[dict[str, str]]:
    """One dict of environment variables for each run."""
    found = [{"OPENBLAS_CORETYPE": core} for core in CORES]
    for capability in CAPABILITIES:
        chosen = {} if capability == "native" else {"ATEN_CPU_CAPABILITY": capability}
        found += [{**chosen, "OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n} for n in ("1", "2")]
    return found


def portable(paths: list[str] | None = None) -> None:
    """Run kernel tests, zoo tests and notebooks under every setting. Raises SystemExit that names those that failed."""
    failed = []
    for chosen in settings():
        label = " ".join(f"{name}={value}" for name, value in chosen.items())
        print(f"== {label}", flush=True)
        environment = {**os.environ, **ENVIRONMENT, **chosen}
        for name in {"OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY"} - set(chosen):
            environment.pop(name, None)
        workers = ["-n", "1"] if chosen.get("OMP_NUM_THREADS") == "2" else []
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
