"""The kernel of router and argmax, emulated."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.kernels import fused

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
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
    x = mx.array(random.standard_normal((*shape, hidden)) * 3, dtype)
    weight = mx.array(random.standard_normal((len(choices), hidden)), dtype)
    return x, weight, mx.array(random.standard_normal(len(choices)), mx.float32)


def verify(emulated, x, weight, offsets, choices):
    route = fused.decide(x, weight, offsets, choices)
    counts = emulated.runs[-1].counts
    assert route.dtype == mx.uint32 and route.shape == x.shape[:-1]
    assert counts["route"].writes == counts["route"].touched == counts["route"].elements
    assert counts["weight"].reads == weight.size * route.size
    assert counts["x"].reads == counts["x"].touched == x.size
    values, columns = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, weight))
    logits = values @ columns.T + np.array(offsets)
    assert np.array(route).tolist() == np.array(choices)[logits.argmax(-1)].tolist()
    for order in ("reverse", "shuffled"):
        emulated.order = order
        assert mx.array_equal(fused.decide(x, weight, offsets, choices), route)
    emulated.order = "forward"
    return route


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "shape", "choices"), SHAPES)
def test_the_largest_logit_names_the_route(emulated, hidden, shape, choices, dtype):
    taken = set()
    for seed in range(3):
        route = verify(emulated, *given(hidden, shape, choices, dtype, seed), choices)
        taken |= set(np.array(route).ravel().tolist())
    assert len(taken) > 1 or hidden == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_router_in_more_precision_than_the_model_keeps_it(emulated, dtype):
    x, weight, offsets = given(40, (1, 4), (1, 2), dtype)
    weight = weight.astype(mx.float32) + mx.array([[0.0], [1e-4]])
    verify(emulated, x, weight, offsets, (1, 2))


@pytest.mark.usefixtures("emulated")
def test_the_first_of_equal_logits_is_taken():
    x, weight, _ = given(130, (1, 3), (0, 1, 2), mx.float32)
    for choices in ((0, 1, 2), (2, 1, 0)):
        equal = mx.broadcast_to(weight[:1], weight.shape)
        assert (np.array(fused.decide(x, equal, mx.zeros(3), choices)) == choices[0]).all()
        offsets = mx.array([0.0, 1.0, 1.0])
        assert (np.array(fused.decide(x, equal, offsets, choices)) == choices[1]).all()


@pytest.mark.usefixtures("emulated")
def test_offsets_decide_alone_if_they_are_large():
    x, weight, _ = given(16, (1, 2), (1, 2), mx.float32)
    for offsets, route in (([1e6, 0.0], 1), ([0.0, 1e6], 2)):
        assert (np.array(fused.decide(x, weight, mx.array(offsets), (1, 2))) == route).all()


MUTATIONS = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);\nif (group", "if (group"),
    "the last of equals": ("logit > best", "logit >= best"),
    "no offsets": (" + offsets[choice]", ""),
    "one simdgroup's sum": ("lane < GROUPS ? parts", "lane < 1 ? parts"),
    "an early return before a barrier": ("threadgroup_barrier", "if (group != 0) return;\nthreadgroup_barrier"),
    "one weight for all": ("weight[choice * hidden + i]", "weight[i]"),
    "a step too short": ("i += GROUPS * duo::LANES", "i += duo::LANES"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_is_noticed(emulated, emulator, mutation):
    old, new = MUTATIONS[mutation]

    def change(source):
        assert source.count(old) == 1
        return source.replace(old, new)

    emulated.change = change
    x, weight, offsets = given(300, (1, 8), (0, 1, 2), mx.float32)
    with pytest.raises((AssertionError, emulator.KernelError)):
        verify(emulated, x, weight, offsets * 20, (0, 1, 2))
        verify(emulated, x, mx.broadcast_to(weight[:1], weight.shape), mx.zeros(3), (0, 1, 2))
