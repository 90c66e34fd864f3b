"""OpenBLAS is loaded before mlx, once, on Linux alone, and can be declined; a terminal is told where it is missing."""

import ctypes
import ctypes.util
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from duo_mlx import _blas

LOADER_FAILS = """
import ctypes
def missing(name, mode=0):
    raise OSError(f"{name}: cannot open shared object file")
ctypes.CDLL = missing
import duo_mlx
from duo_mlx import _blas
_blas.preload()
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def preload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str | None, list[str], str]]]:
    """``preload(...)``: what it returned, which libraries it asked for, what it wrote to a terminal."""

    def run(platform: str = "linux", opt_out: str | None = None, mlx: bool = False, have: tuple[str, ...] = ()):
        asked: list[str] = []

        def load(name: str, mode: int) -> object:
            assert mode == ctypes.RTLD_GLOBAL
            asked.append(name)
            if name not in have:
                raise OSError(name)
            return object()

        terminal = Terminal()
        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.delenv(_blas.OPT_OUT, raising=False)
        if opt_out is not None:
            monkeypatch.setenv(_blas.OPT_OUT, opt_out)
        if mlx:
            monkeypatch.setitem(sys.modules, "mlx.core", object())
        else:
            monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
        _blas.preload.cache_clear()
        loaded = _blas.preload()
        return loaded and str(loaded), asked, terminal.getvalue()

    yield run
    _blas.preload.cache_clear()


def test_loads_the_first_library_that_is_there(preload):
    fedora, everywhere = _blas.LIBRARIES
    assert preload(have=(fedora, everywhere)) == (fedora, [fedora], "")
    assert preload(have=(everywhere,)) == (everywhere, [fedora, everywhere], "")


def test_missing_is_one_line_that_says_how_to_get_it(preload):
    loaded, asked, said = preload()
    assert (loaded, asked) == (None, list(_blas.LIBRARIES))
    assert said.count("\n") == 1
    assert said.endswith("\n")
    assert "apt install libopenblas0-pthread" in said
    assert "DUO_MLX_OPENBLAS=0" in said


@pytest.mark.parametrize(
    "circumstances", [{"platform": "darwin"}, {"opt_out": "0"}, {"mlx": True}], ids=["macOS", "opted out", "too late"]
)
def test_does_and_says_nothing_where_it_is_of_no_use(preload, circumstances):
    assert preload(**circumstances, have=_blas.LIBRARIES) == (None, [], "")
    assert preload(**circumstances) == (None, [], "")


def test_other_values_of_the_variable_do_not_decline(preload):
    assert preload(opt_out="1", have=_blas.LIBRARIES)[0] == _blas.LIBRARIES[0]


def test_no_stderr_at_all(preload, monkeypatch):
    preload()
    _blas.preload.cache_clear()
    monkeypatch.setattr(sys, "stderr", None)
    assert _blas.preload() is None


class Unknowing:
    """An OpenBLAS that takes its kernels from the environment alone, as it is loaded."""

    def __init__(self, found: str) -> None:
        self._handle = 42
        name = os.environ.get(_blas.CORETYPE, found)
        self.openblas_get_corename = lambda: name.encode()
        self.openblas_get_num_threads = lambda: 3


AVX2, AVX512 = "avx avx2 fma", "avx avx2 fma avx512f avx512cd avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("found", "flags", "asked", "kernels", "loads"),
    [
        ("Prescott", AVX512, None, "SkylakeX", 2),
        ("Prescott", AVX2, None, "Haswell", 2),
        ("Prescott", "sse2 avx", None, "Prescott", 1),  # nothing better to be had
        ("Prescott", AVX512.replace(" avx512vl", ""), None, "Haswell", 2),
        ("Zen", AVX512, None, "Zen", 1),  # it knows the processor
        ("Prescott", AVX512, "Nehalem", "Nehalem", 1),  # the user has said what to take
        ("Prescott", AVX512, "Prescott", "Prescott", 1),
    ],
)
def test_an_unknown_processor_gets_the_kernels_that_it_can_run(
    monkeypatch, tmp_path, found, flags, asked, kernels, loads
):
    loaded, closed = [], []

    def load(name: str, mode: int) -> Unknowing:
        loaded.append((name, mode))
        return Unknowing(found)

    monkeypatch.setattr(_blas, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: avx512f\nflags\t\t: fpu {flags}\n\n" * 2)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(_blas._ctypes, "dlclose", closed.append)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    for name, value in ((_blas.OPT_OUT, None), (_blas.CORETYPE, asked)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    _blas.preload.cache_clear()
    try:
        assert _blas.preload() == _blas.Loaded(_blas.LIBRARIES[0], kernels, threads=3)
        assert str(_blas.preload()) == f"{_blas.LIBRARIES[0]}, kernels for {kernels}"
    finally:
        _blas.preload.cache_clear()
    assert loaded == [(_blas.LIBRARIES[0], ctypes.RTLD_GLOBAL)] * loads and closed == [42] * (loads - 1)
    assert os.environ.get(_blas.CORETYPE) == asked


LOADED_AGAIN = """
import ctypes
from duo_mlx import _blas
name, kernels = _blas.LIBRARIES[1], {kernels!r}
library = _blas._again(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL), name, kernels)
import mlx.core as mx, numpy as np
whole = mx.arange(70_000.0).reshape(250, 280) % 7
assert np.array_equal(np.array(whole @ whole.T), np.array(whole) @ np.array(whole).T)
print(_blas._kernels(library))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is of use on Linux alone")
@pytest.mark.parametrize("kernels", _blas.KERNELS)
def test_the_library_itself_can_be_loaded_again(kernels):
    if not ctypes.util.find_library("openblas"):
        pytest.skip("OpenBLAS is not installed here")
    if kernels not in runnable():
        pytest.skip("this processor cannot run these kernels")
    code, environment = LOADED_AGAIN.format(kernels=kernels), without_opt_out(**{_blas.OPT_OUT: "0"})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kernels]


def runnable() -> list[str]:
    flags = _blas.CPUINFO.read_text().split()
    return [name for name, needed in _blas.KERNELS.items() if needed <= set(flags)]


def run_without_openblas(stderr: int) -> None:
    subprocess.run([sys.executable, "-c", LOADER_FAILS], stderr=stderr, check=True, env=without_opt_out())


def without_opt_out(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != _blas.OPT_OUT} | more


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is of use on Linux alone")
def test_a_terminal_reads_the_line_once():
    reader, terminal = os.openpty()
    try:
        run_without_openblas(terminal)
        said = os.read(reader, 10_000).decode()
    finally:
        os.close(terminal)
        os.close(reader)
    assert said.replace("\r\n", "\n") == _blas.ADVICE


def test_a_pipe_reads_nothing():
    reader, pipe = os.pipe()
    try:
        run_without_openblas(pipe)
    finally:
        os.close(pipe)
    with open(reader, "rb") as said:  # noqa: PTH123 (a descriptor, no path)
        assert said.read() == b""


def libraries_that_multiply(folder: Path, **environment: str) -> set[str]:
    """To which libraries the dynamic linker binds mlx's calls of BLAS, in a process that multiplies two matrices."""
    code = (
        "import duo_mlx; from duo_mlx import _blas; print(_blas.preload()); import mlx.core as mx; "
        "mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))"
    )
    environment = without_opt_out(LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(folder / "bindings"), **environment)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None" and _blas.OPT_OUT not in environment:
        pytest.skip("OpenBLAS is not installed here")
    bindings = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    calls = [line for line in bindings if "libmlx.so" in line and "`cblas_sgemm'" in line]
    return {Path(line.split(" to ")[1].split(" [")[0]).name for line in calls}


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is of use on Linux alone")
def test_mlx_multiplies_with_openblas(tmp_path):
    used = libraries_that_multiply(tmp_path)
    assert used
    assert used <= set(_blas.LIBRARIES)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is of use on Linux alone")
def test_mlx_multiplies_with_its_own_blas_when_told_to(tmp_path):
    used = libraries_that_multiply(tmp_path, DUO_MLX_OPENBLAS="0")
    assert used
    assert not used & set(_blas.LIBRARIES)
