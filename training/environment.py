"""Process settings that decide how fast PyTorch runs on a shared CPU."""

from __future__ import annotations

import os
import sys

# Without these, threads spin at barriers and every large temporary costs page faults, which is slow on a shared
# CPU. They are read when the process starts.
CPU_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "0",
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
}


def restart_with_environment(module: str) -> None:
    """Start ``python -m module`` again with the settings above, once, on Linux."""
    if sys.platform.startswith("linux") and "MALLOC_MMAP_MAX_" not in os.environ:
        os.environ.update(CPU_ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
