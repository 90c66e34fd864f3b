"""The emulator itself: it computes as Metal does and notices what a kernel must not do."""

from itertools import count

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.kernels import launch
from duo_mlx.kernels.launch import Launch

NAMES = count()
ONES = mx.ones(64)
COPY = "const uint i = thread_position_in_grid.x;\n"
SHARED = """
threadgroup float shared[64];
const uint i = thread_index_in_threadgroup;
shared[i] = x[i];
BARRIER
out[i] = shared[63 - i];
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.fixture
def run(emulated, monkeypatch):
    """``run(body, x, order="forward", dtype=float32, shape=x's)``: a kernel's body on 64 threads, with input ``x``."""

    def of(body, x=ONES, order="forward", dtype=mx.float32, shape=None):
        monkeypatch.setattr(launch, "parts", lambda _: ("", body))
        name = f"test{next(NAMES)}"  # MLX's kernel is kept by name
        outputs = (("out", x.shape if shape is None else shape, dtype),)
        launched = Launch(name, (("x", x),), (("T", dtype),), (64, 1, 1), (64, 1, 1), outputs)
        return emulated.run(emulated.source(launched), launched, order)

    return of


def test_a_copy_is_right_and_counted(run):
    x = mx.arange(64).astype(mx.float32)
    done = run(COPY + "out[i] = x[i] + x[0];", x)
    assert mx.array_equal(done.outputs[0], x)
    assert (done.counts["x"].reads, done.counts["x"].touched, done.counts["x"].bytes) == (128, 64, 256)
    assert done.counts["out"].writes == 64


def test_what_is_not_written_is_not_a_number(run):
    (out,) = run(COPY + "if (i != 7) out[i] = x[i];").outputs
    assert np.flatnonzero(np.isnan(np.array(out))).tolist() == [7]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[i] = x[i + 1];", "out of bounds: read of element 64 of 64"),
        ("auto y = x + 60; out[i] = y[i / 4];", "out of bounds: read of element 64 of 64"),
        ("out[int(i) - 1] = x[i];", "out of bounds: write of element -1 of 64"),
        (f"if (i < 40) {{ {BARRIER} }} out[i] = x[i];", "divergence: lane 0 waits at a barrier .* has ended"),
        (f"if (i == 3) return;\n{BARRIER} out[i] = x[i];", "divergence: .* has ended"),
        ("if (i != 3) out[i] = simd_sum(x[i]);", "divergence: lane 0 waits at a simdgroup operation"),
        ("if (i < 9)\nout[i] = simd_sum(x[i]);\nelse\nout[i] = simd_sum(x[i]);", "divergence"),
        (f"if (i < 9)\n{BARRIER}\nelse\n{BARRIER}\nout[i] = x[i];", "divergence"),
        ("float own[4]; own[i / 8] = x[i]; out[i] = own[0];", "index 4 out of bounds"),
        ("int shift = int(i); out[i] = float(1u << shift);", "shift exponent 32 is too large"),
    ],
)
def test_faults_are_found_and_the_next_kernel_runs(run, emulator, body, message):
    with pytest.raises(emulator.KernelError, match=message):
        run(COPY + body)
    assert mx.array_equal(run(COPY + "out[i] = x[i];").outputs[0], ONES)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_with_a_barrier_the_order_does_not_matter(run, order):
    x = mx.arange(64).astype(mx.float32)
    assert mx.array_equal(run(SHARED.replace("BARRIER", BARRIER), x, order).outputs[0], x[::-1])


def test_a_missing_barrier_shows_in_the_orders(run):
    x = mx.arange(1, 65).astype(mx.float32)
    without = SHARED.replace("BARRIER", "")
    forward, reverse = (np.array(run(without, x, order).outputs[0]) for order in ("forward", "reverse"))
    assert (forward != reverse).any()


def test_a_race_between_simdgroups_shows_though_each_of_them_is_in_step(run):
    body = """
threadgroup float sums[2];
const float sum = simd_sum(x[thread_index_in_threadgroup]);
sums[simdgroup_index_in_threadgroup] = sum;
out[thread_index_in_threadgroup] = simd_sum(thread_index_in_simdgroup < 2 ? sums[thread_index_in_simdgroup] : 0.0f);
"""
    forward, reverse = (np.array(run(body, ONES, order).outputs[0]) for order in ("forward", "reverse"))
    assert (forward != reverse).any()


def all_patterns(dtype):
    return mx.arange(2**16).astype(mx.uint16).view(dtype)


EACH = "for (uint i = thread_index_in_threadgroup; i < {count}u; i += 64) out[i] = static_cast<{to}>(x[i]);"


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_every_16_bit_float_becomes_the_right_float(run, dtype):
    x = all_patterns(dtype)
    (out,) = run(EACH.format(count=2**16, to="float"), x).outputs
    if dtype == mx.float16:
        wanted = np.arange(2**16).astype(np.uint16).view(np.float16).astype(np.float32)
    else:
        wanted = np.arange(2**16).astype(np.uint32).__lshift__(16).view(np.float32)
    assert np.array_equal(np.array(out), wanted, equal_nan=True)
    assert np.array_equal(np.signbit(np.array(out)), np.signbit(wanted))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_floats_round_to_the_nearest_16_bits_and_ties_to_even(run, dtype):
    """Each 16-bit number, the middle between it and the next, and the floats right beside that middle."""
    exact = np.array(all_patterns(dtype).astype(mx.float32))
    with np.errstate(all="ignore"):  # among them are NaN and infinity
        middle = exact[:-1] / 2 + exact[1:] / 2
    floats = np.concatenate([exact, middle, *(np.nextafter(middle, np.float32(to)) for to in (np.inf, -np.inf))])
    floats = np.append(floats, np.float32([65519.996, 65520, 1e38, 3.4e38, 1e-45, -1e-45, np.nan])).astype(np.float32)
    (out,) = run(EACH.format(count=floats.size, to="T"), mx.array(floats), dtype=dtype, shape=floats.shape).outputs
    found = np.array(out.astype(mx.float32))
    if dtype == mx.float16:
        with np.errstate(over="ignore"):
            wanted = floats.astype(np.float16).astype(np.float32)
    else:
        wanted = np.array(mx.array(floats).astype(mx.bfloat16).astype(mx.float32))
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found)[~np.isnan(wanted)], np.signbit(wanted)[~np.isnan(wanted)])
