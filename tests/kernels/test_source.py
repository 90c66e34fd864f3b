"""The Metal source that MLX makes of the kernels: reviewed snapshots, known names, address spaces, dispatches.

After a change that is meant: ``DUO_MLX_SNAPSHOTS=write pytest tests/kernels/test_source.py``, then read the diff.
"""

import io
import os
import re
import shutil
import subprocess
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest

from duo_mlx import forms
from duo_mlx.kernels import fused, launch

HERE = Path(__file__).parent
SNAPSHOTS = HERE / "snapshots"
# hidden, big, small, dtype, rows
LAYERS = {
    "q4g64-bfloat16-1": (64, (128, "q4g64", "q4g64"), (64, "q4g64+bias", "q4g64+bias"), mx.bfloat16, 1),
    "mixed-float16-8": (64, (96, "q8g32", "q8g32"), (13, "q8g32", "float"), mx.float16, 8),
    "float-float32-3": (27, (45, "float+bias", "float+bias"), (11, "float", "float"), mx.float32, 3),
    "no-small-float16-2": (2, (3, "float", "float"), None, mx.float16, 2),
    **{
        f"{activation}-bfloat16-2": (
            64,
            (96, "q4g32", "q4g32", f"plain {activation}"),
            (32, "float", "float", f"gated {activation}"),
            mx.bfloat16,
            2,
        )
        for activation in forms.ACTIVATIONS
    },
}


def router_source(dtype, hidden):
    x, weight = mx.zeros((1, hidden), dtype), mx.zeros((2, hidden), dtype)
    return launch.source(fused.router(x, weight, mx.zeros(2), (1, 2)))


@pytest.fixture(scope="module")
def sources(ffns_of):
    """The source of every kernel by name and variant."""
    made = {
        f"route-{name}": router_source(dtype, 300)
        for name, dtype in (("bfloat16", mx.bfloat16), ("float32", mx.float32))
    }
    for name, (hidden, big, small, dtype, rows) in LAYERS.items():
        for launched in fused.launches(ffns_of(hidden, big, small, dtype), rows, dtype):
            made[f"{launched.kernel}-{name}"] = launch.source(launched)
    return made


@pytest.mark.parametrize(
    "name", ["route-bfloat16", "up-q4g64-bfloat16-1", "up-relu2-bfloat16-2", "down-mixed-float16-8"]
)
def test_the_source_is_what_was_reviewed(sources, name):
    file = SNAPSHOTS / f"{name}.metal"
    if os.environ.get("DUO_MLX_SNAPSHOTS") == "write":
        file.write_text(sources[name])
    assert sources[name] == file.read_text()


def without_comments(source):
    return re.sub(r"//.*", "", source)


def test_every_name_is_one_that_mlx_itself_uses(sources):
    """spaces.h holds all names that Metal has to supply: without one of them the kernels do not compile there."""
    headers = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
    if not headers.is_dir():
        pytest.skip("this mlx ships no Metal headers")
    shipped = "\n".join(without_comments(file.read_text()) for file in sorted(headers.rglob("*.h")))
    known = set(re.findall(r"\w+", shipped))
    supplied = set(re.findall(r"[A-Za-z_]\w+", without_comments((HERE / "spaces.h").read_text())))
    for name, source in sources.items():
        text = without_comments(source)
        attributes = set(re.findall(r"\[\[(\w+)", text))
        used = set(re.findall(r"[A-Za-z_]\w+", text)) & supplied | attributes
        assert {"simd_sum", "uint", "static", "threadgroup_position_in_grid"} <= used
        assert not used - known, name
        for qualified in re.findall(r"\b(?:metal|mem_flags)(?:::\w+)+", text):
            assert qualified in shipped, name


def clang_says(source):
    """Errors and warnings of clang for a kernel as MLX prints it, all address spaces being types of their own."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("no clang++ to check address spaces with")
    # C++ has no attributes at an explicit instantiation
    text = re.sub(r"^template \[\[.*?\]\] \[\[kernel\]\]", "template", source, flags=re.MULTILINE)
    command = [clang, "--target=aarch64-linux-gnu", "-std=c++17", "-fsyntax-only", "-ffreestanding", "-Wall", "-Wextra"]
    command += [
        "-Wno-unknown-attributes",
        "-Wno-unused-const-variable",
        "-include",
        str(HERE / "spaces.h"),
        "-x",
        "c++",
        "-",
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stderr


def test_address_spaces_and_signatures_agree(sources):
    for name, source in sources.items():
        assert clang_says(source) == "", name


def test_an_address_space_or_a_name_that_is_wrong_is_found(sources):
    """In the source of the router, which has few offsets and many weights."""
    source = sources["route-float32"]
    for added, error in {
        "const constant float* one = offsets; (void)one;": "",
        "const device float* many = weight; (void)many;": "",
        "const device float* one = offsets; (void)one;": "cannot initialize a variable",
        "const constant float* many = weight; (void)many;": "cannot initialize a variable",
        "(void)simd_product(1.0f);": "undeclared identifier 'simd_product'",
    }.items():
        said = clang_says(source.replace("int taken", f"{added}\nint taken"))
        assert error in said if error else said == "", said


def test_buffers_are_no_more_than_metal_has(sources):
    assert all(source.count("[[buffer(") <= 31 for source in sources.values())


@pytest.mark.parametrize("prefilled", [False, True])
def test_a_routed_layer_is_three_dispatches(ffns_of, tmp_path, prefilled):
    """Of the kernels' primitives, counted in the graph; and there is no other."""
    ffns = ffns_of(64, (128, "q4g64", "q4g64"), (64, "q4g64", "q4g64"), mx.float32)
    weight, offsets = mx.zeros((2, 64)), mx.zeros(2)
    counted = Counter()

    def layer(x):
        with launch.prefilled_with_nan() if prefilled else nullcontext():
            out = fused.ffn(ffns, x, fused.decide(x, weight, offsets, (1, 2)))
        file = io.StringIO()
        mx.export_to_dot(file, out)
        counted.update(re.findall(r'\[label ="([^"]*)", shape=rectangle\]', file.getvalue()))
        return out

    mx.eval(weight, offsets, ffns.big.parameters(), ffns.small.parameters())
    mx.export_function(str(tmp_path / "layer.mlxfn"), layer, mx.zeros((1, 64)))
    assert counted == {"CustomKernel": 3}
