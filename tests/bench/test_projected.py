"""Counted work of a cell on an Apple GPU: what `duo_mlx.work` counts for its routes, and none where that cannot be."""

import numpy as np
import pytest

from duo_mlx.bench.projected import gpu_work
from duo_mlx.routes import Route
from duo_mlx.work import imagined, shares, works

LAYERS = 4


def routes_of(*patterns):
    return np.array(patterns, np.uint8)[:, None]


@pytest.mark.parametrize(("quantisation", "bits"), [("float32", 16), ("float16", 16), ("4-bit", 4)])
@pytest.mark.parametrize(("by_router", "strategy"), [(False, "planned"), (True, "fused")])
def test_it_is_the_mean_over_the_passes(tiny_model, quantisation, bits, by_router, strategy):
    model = tiny_model(hidden_size=64, num_attention_heads=4, router_choices="-sB")
    mixed = routes_of([2, 2, 1, 0], [2, 1, 1, 0])
    found = gpu_work(model, quantisation, mixed, 10, by_router)
    mixes = {str(number): shares(each) for number, each in enumerate(mixed[:, 0])}
    expected = works(imagined(model.config, bits), mixes, 10, [strategy])[strategy].values()
    assert (found["strategy"], found["bits"]) == (strategy, bits)
    for key in ("bytes", "dispatches", "waits"):
        assert found[key] == pytest.approx(np.mean([getattr(each, key) for each in expected]))


def test_there_is_none_for_a_batch_or_a_width_without_groups(tiny_model):
    model = tiny_model()
    big = np.full((3, 1, LAYERS), Route.BIG, np.uint8)
    assert gpu_work(model, "float32", np.repeat(big, 2, axis=1), 10, False) is None
    assert gpu_work(model, "4-bit", big, 10, False) is None  # hidden size 16
    assert gpu_work(model, "float32", big, 10, False)["waits"] == 0
