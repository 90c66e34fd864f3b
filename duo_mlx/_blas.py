"""OpenBLAS in place of the BLAS inside mlx's Linux wheel.

That wheel bundles the reference BLAS, which multiplies matrices at about a thirtieth of the machine's speed. Symbols
are bound when a library is loaded, so an OpenBLAS whose symbols are global before ``mlx.core`` is imported takes its
place for the whole process. This also holds for a PyTorch that is imported *later*; one that is imported earlier keeps
its own BLAS, and so does every program with ``DUO_MLX_OPENBLAS=0`` in its environment.
"""

import ctypes
import os
import sys
from functools import cache

OPT_OUT = "DUO_MLX_OPENBLAS"
LIBRARIES = ("libopenblasp.so.0", "libopenblas.so.0")  # Fedora's with threads, then the name everywhere else
ADVICE = (
    "duo-mlx: mlx's own BLAS is slow on Linux; install OpenBLAS (apt install libopenblas0-pthread, or "
    f"dnf install openblas-threads), or set {OPT_OUT}=0 to do without\n"
)


@cache
def preload() -> str | None:
    """Load OpenBLAS where that can help, and return the name of what was loaded.

    Where it is not installed, one line on a terminal's stderr says how to get it. Nothing happens on macOS, where MLX
    uses Accelerate, after ``mlx.core`` has been imported, where ``DUO_MLX_OPENBLAS`` is 0, and when called again.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get(OPT_OUT) == "0":
        return None
    for library in LIBRARIES:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(ADVICE)
    return None
