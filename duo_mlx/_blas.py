"""OpenBLAS in place of the BLAS inside mlx's Linux wheel.

That wheel bundles the reference BLAS, which multiplies matrices at about a thirtieth of the machine's speed. Symbols
are bound when a library is loaded, so an OpenBLAS whose symbols are global before ``mlx.core`` is imported takes its
place for the whole process. This also holds for a PyTorch that is imported *later*; one that is imported earlier keeps
its own BLAS, and so does every program with ``DUO_MLX_OPENBLAS=0`` in its environment.

OpenBLAS has kernels for many processors. Before 0.3.25 (its pull request 4268) it took those of 2004 for one from Intel
that it did not know, a fifth of what a processor with AVX-512 can do. There it is loaded again with the best kernels
that the processor can run.
"""

import _ctypes
import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OPT_OUT = "DUO_MLX_OPENBLAS"
LIBRARIES = ("libopenblasp.so.0", "libopenblas.so.0")  # Fedora's with threads, then the name everywhere else
FALLBACK = "Prescott"  # what OpenBLAS takes a processor for that it does not know
CORETYPE = "OPENBLAS_CORETYPE"
KERNELS = {  # by OpenBLAS's names, the best first: what a processor must have for them, as Linux calls it
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "Haswell": {"avx2", "fma"},
}
CPUINFO = Path("/proc/cpuinfo")
ADVICE = (
    "duo-mlx: mlx's own BLAS is slow on Linux; install OpenBLAS (apt install libopenblas0-pthread, or "
    f"dnf install openblas-threads), or set {OPT_OUT}=0 to do without\n"
)


@dataclass(frozen=True)
class Loaded:
    """An OpenBLAS.

    Args:
        name: of the library.
        kernels: the processor that they are for; None where it was built for one alone, and does not say.
        threads: at most so many multiply two matrices; None where it does not say.
    """

    name: str
    kernels: str | None = None
    threads: int | None = None

    def __str__(self) -> str:
        return ", kernels for ".join(filter(None, (self.name, self.kernels)))


@cache
def preload() -> Loaded | None:
    """Load OpenBLAS where that can help, and say what was loaded.

    Where it is not installed, one line on a terminal's stderr says how to get it. Nothing happens on macOS, where MLX
    uses Accelerate, after ``mlx.core`` has been imported, where ``DUO_MLX_OPENBLAS`` is 0, and when called again.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get(OPT_OUT) == "0":
        return None
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if _kernels(library) == FALLBACK and CORETYPE not in os.environ and (better := _best()):
            library = _again(library, name, better)
        return Loaded(name, _kernels(library), _threads(library))
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(ADVICE)
    return None


def _kernels(library: ctypes.CDLL) -> str | None:
    try:
        name = library.openblas_get_corename
    except AttributeError:
        return None
    name.restype = ctypes.c_char_p
    said: bytes = name()
    return said.decode()


def _threads(library: ctypes.CDLL) -> int | None:
    try:
        return int(library.openblas_get_num_threads())
    except AttributeError:
        return None


def _best() -> str | None:
    """The best kernels that this processor can run, if any are better than `FALLBACK`."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    has = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return next((name for name, needed in KERNELS.items() if needed <= has), None)


def _again(library: ctypes.CDLL, name: str, kernels: str) -> ctypes.CDLL:
    """The same library, loaded anew with other kernels, which it chooses by its environment as it is loaded."""
    _ctypes.dlclose(library._handle)
    os.environ[CORETYPE] = kernels
    try:
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    finally:
        del os.environ[CORETYPE]  # other programs, and other copies of OpenBLAS, know their processor themselves
