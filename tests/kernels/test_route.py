"""The kernel of norm, router and argmax, emulated."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from duo_mlx.kernels import fused

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
ROUNDING = {mx.float32: 4e-7, mx.float16: 2**-10, mx.bfloat16: 2**-7}  # relative: the 16-bit types' last unit
# hidden, batch and tokens, routes: within a simdgroup, some lanes idle, several simdgroups, more than one turn a lane
SHAPES = [
    (1, (1, 1), (1, 2)),
    (16, (1, 3), (0, 2)),
    (130, (2, 1), (0, 1, 2)),
    (576, (1, 1), (1, 2)),
    (200, (2, 4), (2, 1)),
    (4100, (1, 2), (1, 2)),
]


def given(hidden, shape, choices, dtype, seed=0):
    random = np.random.default_rng(seed)
    norm = nn.RMSNorm(hidden, eps=1e-5)
    norm.weight = mx.array(1 + random.standard_normal(hidden) / 5, dtype)
    h = mx.array(random.standard_normal((*shape, hidden)) * 3, dtype)
    weight = mx.array(random.standard_normal((len(choices), hidden)), dtype)
    return h, norm, weight, mx.array(random.standard_normal(len(choices)), mx.float32)


def verify(emulated, h, norm, weight, offsets, choices):
    normed, route = fused.decide(h, norm, weight, offsets, choices)
    counts = emulated.runs[-1].counts
    assert normed.dtype == h.dtype and route.dtype == mx.uint32
    for name in ("normed", "route"):
        assert counts[name].writes == counts[name].touched == counts[name].elements
    assert counts["weight"].reads == weight.size * route.size
    values, scale, found = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (h, norm.weight, normed))
    wanted = scale * values / np.sqrt((values**2).mean(-1, keepdims=True) + norm.eps)
    assert (np.abs(found - wanted) <= ROUNDING[h.dtype] * np.abs(wanted)).all()
    assert mx.allclose(normed, norm(h), rtol=2 * ROUNDING[h.dtype], atol=1e-6)
    logits = found @ np.array(weight.astype(mx.float32)).T + np.array(offsets)
    assert np.array(route).tolist() == np.array(choices)[logits.argmax(-1)].tolist()
    for order in ("reverse", "shuffled"):
        emulated.order = order
        again = fused.decide(h, norm, weight, offsets, choices)
        assert mx.array_equal(again[0], normed) and mx.array_equal(again[1], route)
    emulated.order = "forward"
    return route


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "shape", "choices"), SHAPES)
def test_norm_and_route(emulated, hidden, shape, choices, dtype):
    taken = set()
    for seed in range(3):
        route = verify(emulated, *given(hidden, shape, choices, dtype, seed), choices)
        taken |= set(np.array(route).ravel().tolist())
    assert len(taken) > 1 or hidden == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_router_in_more_precision_than_the_model_keeps_it(emulated, dtype):
    h, norm, weight, offsets = given(40, (1, 4), (1, 2), dtype)
    weight = weight.astype(mx.float32) + mx.array([[0.0], [1e-4]])
    verify(emulated, h, norm, weight, offsets, (1, 2))


@pytest.mark.usefixtures("emulated")
def test_the_first_of_equal_logits_is_taken():
    h, norm, weight, _ = given(130, (1, 3), (0, 1, 2), mx.float32)
    for choices in ((0, 1, 2), (2, 1, 0)):
        equal = mx.broadcast_to(weight[:1], weight.shape)
        assert (np.array(fused.decide(h, norm, equal, mx.zeros(3), choices)[1]) == choices[0]).all()
        offsets = mx.array([0.0, 1.0, 1.0])
        assert (np.array(fused.decide(h, norm, equal, offsets, choices)[1]) == choices[1]).all()


@pytest.mark.usefixtures("emulated")
def test_offsets_decide_alone_if_they_are_large():
    h, norm, weight, _ = given(16, (1, 2), (1, 2), mx.float32)
    for offsets, route in (([1e6, 0.0], 1), ([0.0, 1e6], 2)):
        assert (np.array(fused.decide(h, norm, weight, mx.array(offsets), (1, 2))[1]) == route).all()


MUTATIONS = {
    "no first barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);\nsquare", "square"),
    "no second barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);\nif (group", "if (group"),
    "the last of equals": ("logit > best", "logit >= best"),
    "no offsets": (" + offsets[choice]", ""),
    "one simdgroup's sum": ("lane < GROUPS ? parts", "lane < 1 ? parts"),
    "an early return before a barrier": ("const float factor", "if (group != 0) return;\nconst float factor"),
    "one weight for all": ("weight[choice * hidden + i]", "weight[i]"),
    "no eps": (" + eps[0]", ""),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_noticed(emulated, emulator, mutation):
    old, new = MUTATIONS[mutation]

    def change(source):
        assert source.count(old) == 1
        return source.replace(old, new)

    emulated.change = change
    h, norm, weight, offsets = given(300, (1, 8), (0, 1, 2), mx.float32)
    h = h * mx.array([1.0, 1e-3] * 4)[:, None]  # eps counts in every second row
    with pytest.raises((AssertionError, emulator.KernelError)):
        verify(emulated, h, norm, weight, offsets * 20, (0, 1, 2))
        verify(emulated, h, norm, mx.broadcast_to(weight[:1], weight.shape), mx.zeros(3), (0, 1, 2))
