"""The kernels of a layer's FFNs, emulated: numbers, what they read, that they write all of their outputs, no races."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import forms
from duo_mlx.kernels import fused

# Formats of big and small, "gate and up, down"; then sizes: hidden, width of big, width of small.
FORMATS = {
    "float": ("float, float", "float, float", [(27, 45, 11), (139, 150, 9), (8, 8, 8)]),
    "q4g32": ("q4g32, q4g32", "q4g32, q4g32", [(64, 96, 32), (544, 32, 32)]),
    "q4g64": ("q4g64+bias, q4g64+bias", "q4g64, q4g64", [(64, 128, 64)]),
    "q4g128": ("q4g128, q4g128", "q4g128+bias, q4g128+bias", [(128, 256, 128)]),
    "q8g32": ("q8g32, q8g32", "q8g32, q8g32", [(64, 96, 32), (288, 32, 32)]),
    "q8g64": ("q8g64, q8g64", "q8g64+bias, q8g64+bias", [(64, 128, 64)]),
    "q8g128": ("q8g128+bias, q8g128+bias", "q8g128, q8g128", [(128, 256, 128)]),
    "small's down is float": ("q4g32, q4g32", "q4g32+bias, float+bias", [(64, 96, 13), (32, 32, 9)]),
}
ODD = {
    "width 1": ("float, float", "float+bias, float+bias", [(5, 1, 1)]),
    "odd widths": ("q8g32, float", "float, float", [(32, 37, 5), (32, 9, 1)]),
    "odd hidden": ("float, q4g64", "float, q8g32", [(27, 64, 32), (9, 128, 64)]),
    "no small": ("float+bias, float+bias", None, [(27, 45, 45)]),
    "no small, quantised": ("q4g32, q4g32", None, [(64, 64, 64)]),
}
FORMS = {
    **{f"gated {name}": (f"float+bias, float, gated {name}", f"float, float, gated {name}", [(27, 45, 11)])
       for name in forms.ACTIVATIONS},
    **{f"plain {name}": (f"float+bias, float+bias, plain {name}", f"float, float, gated {name}", [(27, 45, 11)])
       for name in forms.ACTIVATIONS},
    "plain, no small": ("q4g32+bias, float, plain relu2", None, [(32, 37, 37)]),
    "plain small": ("q8g32, q4g32, gated gelu_tanh", "float, q4g32, plain gelu", [(64, 96, 32)]),
    "two activations": ("float, float, gated relu", "float, float", [(27, 45, 11)]),
}  # fmt: skip
CASES = FORMATS | ODD | FORMS
# case, dtype, batch and tokens
RUNS = [(case, dtype, (1, 1)) for case in FORMATS for dtype in (mx.float32, mx.float16, mx.bfloat16)]
RUNS += [(case, mx.float32, (1, 1)) for case in ODD]
RUNS += [(case, mx.float32, (1, 2)) for case in FORMS]
RUNS += [("gated gelu_tanh", mx.bfloat16, (1, 1)), ("plain relu2", mx.float16, (1, 1))]
RUNS += [("float", mx.float32, (1, 2)), ("float", mx.float32, (3, 1)), ("float", mx.float32, (1, 7))]
RUNS += [("q4g64", mx.float32, (2, 1)), ("q4g64", mx.float32, (1, 4)), ("q4g64", mx.float16, (1, 7))]
RUNS += [("small's down is float", mx.float32, (1, 3)), ("small's down is float", mx.bfloat16, (1, 8))]
RUNS += [("no small", mx.float32, (1, 3)), ("no small, quantised", mx.float32, (4, 2))]


def layers(ffns_of, case, dtype):
    """A case's FFNs in each of its sizes."""
    big, small, sizes = CASES[case]
    for hidden, big_width, small_width in sizes:
        second = small and (small_width, *small.split(", "))
        yield ffns_of(hidden, (big_width, *big.split(", ")), second, dtype)


@pytest.fixture(scope="module", autouse=True)
def prepared(request, emulator, ffns_of):
    """The kernels of the runs that were asked for, compiled several at a time."""
    chosen = {item.callspec.id for item in request.session.items if item.originalname == test_every_format.__name__}
    launches = []
    for case, dtype, (batch, tokens) in RUNS:
        if run_id((case, dtype, (batch, tokens))) in chosen:
            for ffns in layers(ffns_of, case, dtype):
                launches += fused.launches(ffns, batch * tokens, dtype)
    emulator.reset()
    emulator.prepare(launches)


def run_id(run):
    case, dtype, (batch, tokens) = run
    return f"{case}, {dtype}, {batch}x{tokens}".replace("mlx.core.", "")


def routes_for(shape):
    """Skip, small and big alone, and in a batch mixtures, among them ones that only the last row makes."""
    rows = shape[0] * shape[1]
    all_alike = [[route] * rows for route in (0, 1, 2)]
    last = [[0] * (rows - 1) + [1], [1] * (rows - 1) + [2], [(row * 2 + 1) % 3 for row in range(rows)]]
    return [np.array(routes).reshape(shape) for routes in (all_alike + last if rows > 1 else all_alike)]


def inputs_for(hidden, shape, dtype):
    random = np.random.default_rng(3)
    return mx.array(random.standard_normal((*shape, hidden)), dtype)


def check_counts(runs, ffns, route):
    """Weights of a module that no row takes are not touched; those of others all are, and once for all rows.

    In the last columns of a matrix whose outputs are no multiple of a simdgroup's, its last row is read in place of
    what is not there. Scales are read by each lane that has part of their group.
    """
    taken = set(route.ravel().tolist())
    if ffns.small is ffns.big:
        taken = {2} if taken & {1, 2} else set()
    for run in runs:
        columns = dict(run.launch.template)["COLUMNS"]
        for name, array in run.launch.inputs:
            if name.startswith(("big_", "small_")):
                module, projection, *part = name.split("_")
                linears = getattr(ffns, module)
                stored = (part[0] if part else "weight") in linears.get(f"{projection}_proj", {})
                needed = stored and {"big": 2, "small": 1}[module] in taken
                assert run.counts[name].touched == (array.size if needed else 0), name
                if needed and not part:
                    assert run.counts[name].reads == -(-array.shape[0] // columns) * columns * array.shape[1], name
        for name, _, _ in run.launch.outputs:
            assert run.counts[name].writes == run.counts[name].touched == run.counts[name].elements, name


def verify(emulated, ffns, expected, close, shape, dtype):
    """Everything that must hold of the two kernels, for all routes of a shape."""
    hidden = ffns.big.down_proj.weight.shape[0]
    small_width = ffns.small.up_proj.weight.shape[0]
    x = inputs_for(hidden, shape, dtype)
    for route in routes_for(shape):
        emulated.runs.clear()
        out = fused.ffn(ffns, x, mx.array(route))
        assert (out.dtype, out.shape) == (dtype, x.shape)
        close(out, expected(ffns, x, route))
        assert (np.array(out.astype(mx.float32))[route == 0] == 0).all()
        inner = np.array(emulated.runs[0].outputs[0].astype(mx.float32)).reshape(*shape, -1)
        assert not np.isnan(inner).any()
        assert (inner[route == 0] == 0).all()
        assert (inner[route == 1][:, small_width:] == 0).all()
        check_counts(emulated.runs, ffns, route)
    for order in ("reverse", "shuffled"):
        emulated.order = order
        assert mx.array_equal(fused.ffn(ffns, x, mx.array(route)), out)
    emulated.order = "forward"


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_every_format(emulated, ffns_of, expected, close, run):
    case, dtype, shape = run
    for ffns in layers(ffns_of, case, dtype):
        assert fused.refusal(ffns, shape[0] * shape[1], dtype) is None
        verify(emulated, ffns, expected, close, shape, dtype)


@pytest.mark.usefixtures("emulated")
def test_large_and_small_values(ffns_of):
    """Where the exponential overflows, silu is x or 0, and a value that is not a number stays with its own token."""
    ffns = ffns_of(2, (1, "float", "float"), None, mx.float32)
    ffns.big.gate_proj.weight, ffns.big.up_proj.weight = mx.array([[1.0, 0.0]]), mx.array([[0.0, 1.0]])
    ffns.big.down_proj.weight = mx.array([[1.0], [0.0]])
    x = mx.array([[[200.0, 1.0], [-200.0, 1.0], [0.0, 1.0], [float("nan"), 1.0]]])
    out = np.array(fused.ffn(ffns, x, mx.array([[2, 2, 2, 2]])))
    assert out[0, :3, 0].tolist() == [200, 0, 0]
    assert np.isnan(out[0, 3, 0])


@pytest.mark.usefixtures("emulated")
def test_routes_of_any_integer_type_and_strided_inputs(ffns_of, expected, close):
    ffns = ffns_of(27, (45, "float", "float"), (11, "float", "float"), mx.float32)
    x = inputs_for(27, (2, 3), mx.float32)
    route = np.array([[2, 0, 1], [1, 2, 2]])
    wanted = expected(ffns, x, route)
    turned = mx.contiguous(x.transpose(1, 0, 2)).transpose(1, 0, 2)
    for dtype in (mx.uint8, mx.int32, mx.int64):
        close(fused.ffn(ffns, turned, mx.array(route, dtype)), wanted)


# What is changed in the source, and in what it turns that; each must be noticed.
MUTATIONS = {
    "zeros are not written": ("inner[row * big_width + i] = static_cast<T>(0.0f);", ""),
    "skipped rows are not written": ("out[at] = static_cast<T>(0.0f);", ""),
    "wrong bits of a word": ("& (LOWEST << (BITS * (i % PER_WORD)))", "& (LOWEST << (BITS * (i % PER_WORD ^ 1)))"),
    "wrong scale of a value": ("1.0f / static_cast<float>(1u << (BITS * (i % PER_WORD)))", "1.0f"),
    "no bias of a group": (" + bias[column] * total", ""),
    "a group too far": ("k / GROUP]);\n      bias", "k / GROUP + 1]);\n      bias"),
    "the tail is one short": ("for (; k < inputs; k++)", "for (; k + 1 < inputs; k++)"),
    "the tail is one long": ("for (; k < inputs; k++)", "for (; k <= inputs; k++)"),
    "a step reads past the end": ("k + STEP <= inputs", "k < inputs"),
    "past the last column": ("min(COLUMNS, outputs - column) - 1", "COLUMNS - 1"),
    "the first row only": ("row < ROWS; row++) {\n      if (takes", "row < 1; row++) {\n      if (takes"),
    "weights are read for nobody": ("if (big != 0)", "if (true)"),
    "small is taken for big": ("duo::BIG);", "duo::SMALL);"),
    "no linear bias": ("if constexpr (BIAS)", "if constexpr (false)"),
    "no sum over lanes": ("= simd_sum(sums[row * COLUMNS + i])", "= sums[row * COLUMNS + i]"),
    "the wrong side of silu": ("x < 0 ? part", "x > 0 ? part"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_noticed(emulated, emulator, ffns_of, expected, close, mutation):
    """The checks above fail for source with a fault in it: so they are able to."""
    old, new = MUTATIONS[mutation]
    changed = []

    def change(source):
        changed.append(old in source)
        return source.replace(old, new)

    emulated.change = change
    ffns = ffns_of(32, (37, "q8g32+bias", "float"), (13, "q4g32", "float+bias"), mx.float32)
    emulated.prepare(fused.launches(ffns, 3, mx.float32))
    with pytest.raises((AssertionError, emulator.KernelError)):
        verify(emulated, ffns, expected, close, (1, 3), mx.float32)
    assert any(changed)
