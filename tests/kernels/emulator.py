"""The Metal kernels run here: their source is compiled as C++ with metal.h in front and executed lane by lane.

What is compiled is the source that MLX makes of a launch, utils.h left out: shared helpers, the signature that MLX
writes, the kernel's body. Only the signature is rewritten, pointers to `metal.h`'s counting ones and attributes to
values. Compiled kernels are kept in ``cache`` under a hash of all that they depend on.
"""

import contextlib
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from duo_mlx.kernels import launch
from duo_mlx.kernels.launch import Launch

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=undefined", "-Wno-attributes", "-Wno-unknown-pragmas", f"-I{HERE}"]  # fmt: skip
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}  # in which lanes and threadgroups run

SIGNATURE = re.compile(
    r"template <(?P<template>[^>]*)>\n\[\[kernel\]\] void (?P<name>\w+)\((?P<parameters>.*?)\) \{\n(?P<body>.*)\n\}\n\n"
    r"template \[\[host_name.*?\]\] \[\[kernel\]\] decltype\(\w+<(?P<values>[^>]*)>\)",
    re.DOTALL,
)
ARGUMENT = re.compile(r"(?P<const>const )?(?:device|constant) (?P<type>\w+)\* (?P<name>\w+) \[\[buffer\(\d+\)\]\]")
ATTRIBUTE = re.compile(r"(?P<type>\w+) (?P<name>\w+) \[\[(?P=name)\]\]")


class KernelError(Exception):
    """A kernel read or wrote out of bounds, its lanes diverged, or a sanitiser stopped it."""


@dataclass(frozen=True)
class Count:
    """What happened to one buffer: accesses, and how many elements had at least one; ``bytes`` is of the latter."""

    reads: int
    writes: int
    touched: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Run:
    """One finished launch."""

    launch: Launch
    outputs: list[mx.array]
    counts: dict[str, Count]


@dataclass(frozen=True)
class Compiled:
    """A kernel's C++, and the names of its buffers in order."""

    text: str
    buffers: tuple[str, ...]


def translate(source: str) -> Compiled:
    """C++ for the Metal source of a kernel as MLX prints it."""
    found = SIGNATURE.search(source)
    assert found, source
    name = f"kernel_{hashlib.sha256(source.encode()).hexdigest()[:16]}"  # shared objects have no symbol in common
    parameters, arguments, buffers = [], [], []
    for parameter in found["parameters"].split(",\n"):
        if argument := ARGUMENT.search(parameter):
            pointer = f"emulator::{'In' if argument['const'] else 'Out'}<{argument['type']}>"
            parameters.append(f"{pointer} {argument['name']}")
            arguments.append(f"{pointer}(buffers[{len(buffers)}])")
            buffers.append(argument["name"])
        else:
            attribute = ATTRIBUTE.search(parameter)
            assert attribute, parameter
            parameters.append(f"{attribute['type']} {attribute['name']}")
            arguments.append(f"emulator::lane().{attribute['name']}")
    text = (
        f'#include "metal.h"\n{source[: found.start()]}\n'
        f"template <{found['template']}>\nvoid {name}({', '.join(parameters)}) {{\n{found['body']}\n}}\n"
        f'extern "C" void emulated_kernel(emulator::Buffer* buffers) {{\n'
        f"  {name}<{found['values']}>({', '.join(arguments)});\n}}\n"
    )
    return Compiled(text, tuple(buffers))


class Emulator:
    """A server process and the kernels that were compiled for it."""

    KernelError = KernelError

    def __init__(self, compiler: str, cache: Path):
        self.compiler = compiler
        self.cache = cache
        self.reset()
        self._sources: dict[object, str] = {}
        self._base = hashlib.sha256(repr((compiler, FLAGS)).encode())
        self._base.update((HERE / "metal.h").read_bytes())
        self._base.update(subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout)
        self._server: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the server)

    def reset(self) -> None:
        """Forget what `execute` ran and how it should."""
        self.runs: list[Run] = []
        self.order = "forward"
        self.change: Callable[[str], str] = str  # made to every source

    def execute(self, launched: Launch) -> list[mx.array]:
        """In place of `duo_mlx.kernels.launch.execute`."""
        done = self.run(self.change(self.source(launched)), launched, self.order)
        self.runs.append(done)
        return done.outputs

    def source(self, launched: Launch) -> str:
        """`launch.source`, made once for each variant."""
        kinds = tuple((name, array.dtype, array.size < 8) for name, array in launched.inputs)
        key = (launched.kernel, launched.template, kinds, tuple((name, dtype) for name, _, dtype in launched.outputs))
        if key not in self._sources:
            self._sources[key] = launch.source(launched)
        return self._sources[key]

    def prepare(self, launches: Sequence[Launch]) -> None:
        """Compile what these launches need, several at a time."""
        texts = {translate(self.change(self.source(launched))).text for launched in launches}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compiled, texts))

    def run(self, source: str, launched: Launch, order: str = "forward", seed: int = 0) -> Run:
        """Run Metal source as MLX prints it with a launch's inputs, grid and outputs.

        Raises:
            KernelError: what the kernel did wrong.
        """
        compiled = translate(source)
        inputs = dict(launched.inputs)
        outputs = {name: (shape, dtype) for name, shape, dtype in launched.outputs}
        path = str(self._compiled(compiled.text)).encode()
        request = [struct.pack("=I", len(path)), path]
        request.append(struct.pack("=8I", ORDERS[order], seed, *launched.grid, *launched.threadgroup))
        request.append(struct.pack("=I", len(compiled.buffers)))
        sizes = {}
        for name in compiled.buffers:
            if name in outputs:
                shape, dtype = outputs[name]
                elements, data = int(np.prod(shape)), b""
                size = elements * dtype.size
            else:
                data = _bytes(inputs[name]) if name in inputs else _extent(name, inputs)
                size = len(data)
                elements = inputs[name].size if name in inputs else size // 4
            sizes[name] = elements, size
            request += [struct.pack("=I2Q", name in outputs, size, elements), data]
        return self._answer(b"".join(request), launched, sizes)

    def _answer(self, request: bytes, launched: Launch, sizes: dict[str, tuple[int, int]]) -> Run:
        server = self._running()
        with contextlib.suppress(BrokenPipeError):  # if it has ended, its answer says why
            server.stdin.write(request)
            server.stdin.flush()
        error = self._read("=I")[0]
        message = self._read(f"{error}s")[0].decode()
        counts, outputs = {}, []
        for name, (elements, size) in sizes.items():
            touched, reads, writes = self._read("=3Q")
            counts[name] = Count(reads, writes, touched, elements, touched * size // max(elements, 1))
            for output, shape, dtype in launched.outputs:
                if output == name:
                    outputs.append(_array(self._read(f"{size}s")[0], shape, dtype))
        if message:
            raise KernelError(message)
        return Run(launched, outputs, counts)

    def _read(self, form: str) -> tuple[int | bytes, ...]:
        server = self._running()
        data = server.stdout.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            self._end(server)
            self._stderr.seek(0)
            raise KernelError(self._stderr.read().decode(errors="replace"))
        return struct.unpack(form, data)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._server is None:
            program = self._built((HERE / "server.cpp").read_text(), "server", ["-rdynamic", "-ldl"])
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            environment["ASAN_OPTIONS"] = "detect_leaks=0"
            self._stderr.seek(0)
            self._stderr.truncate()
            self._server = subprocess.Popen(
                [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=environment
            )
        return self._server

    def _compiled(self, text: str) -> Path:
        return self._built(text, "kernel", ["-shared", "-fPIC"])

    def _built(self, text: str, kind: str, flags: list[str]) -> Path:
        digest = self._base.copy()
        digest.update(text.encode())
        program = self.cache / f"{kind}-{digest.hexdigest()[:32]}"
        if not program.exists():
            with tempfile.TemporaryDirectory(dir=self.cache) as directory:
                file = Path(directory, "source.cpp")
                file.write_text(text)
                command = [self.compiler, *FLAGS, str(file), "-o", f"{directory}/out", *flags]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"the {kind} does not compile:\n{done.stderr}")
                Path(directory, "out").replace(program)
        return program

    def _end(self, server: "subprocess.Popen[bytes]") -> None:
        self._server = None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        server.stdout.close()
        server.wait()

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._end(self._server)
        self._stderr.close()


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _extent(name: str, inputs: dict[str, mx.array]) -> bytes:
    """What MLX hands over as an input's shape."""
    return struct.pack(f"{inputs[name.removesuffix('_shape')].ndim}i", *inputs[name.removesuffix("_shape")].shape)


def _bytes(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint16) if array.dtype.size == 2 else array).tobytes()


def _array(data: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    unsigned = {2: np.uint16, 4: np.uint32}[dtype.size]
    return mx.array(np.frombuffer(data, unsigned)).view(dtype).reshape(shape)
