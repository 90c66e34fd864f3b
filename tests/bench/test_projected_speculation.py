"""Speculation's projection: the sum by hand, its bounds, and where acceptance comes from."""

import json

import numpy as np
import pytest

from duo_mlx import cost, work
from duo_mlx.bench import projected_speculation as bench
from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes
from duo_mlx.projection import SHAPES, Constants, Machine, find_chips
from duo_mlx.routes import parse_pattern

LAYERS = 4
ONCE, PER_ROW = bench.GROWTHS["read once"], bench.GROWTHS["read per row"]
NEVER_WAITS = Constants(bandwidth_bytes_s=1e9, dispatch_s=0.0, read_back_s=0.0)


def pattern(spec, layers=LAYERS):
    return parse_pattern(spec, layers)


def times(model, draft, longest=1, constants=NEVER_WAITS, growth=ONCE):
    return bench.round_seconds(model, pattern("big"), pattern(draft), longest, 10, constants, growth)


@pytest.mark.parametrize("vocabulary", [0, 8])
def test_a_round_is_its_steps_its_pass_and_a_wait(tiny_model, vocabulary):
    model, constants = tiny_model(draft_vocabulary=vocabulary), Constants(1e9, 1e-6, 1e-5)
    big, small = (float(cost.weight_bytes(model).of(pattern(spec))) for spec in ("big", "small"))
    layer = model.layers[0]
    assert big - small == LAYERS * (nbytes(layer.mlp.big) - nbytes(layer.mlp.small))
    cache = LAYERS * 10 * 2 * 2 * 4 * 4
    kernels = float(work.dispatches(model, "planned").of(pattern("big")))
    plain = (big + cache) / 1e9 + kernels * 1e-6
    unread = nbytes(model.table) * (model.config.vocab_size - vocabulary) / model.config.vocab_size if vocabulary else 0
    step = (small - unread + cache) / 1e9 + kernels * 1e-6
    for growth, rows in ((ONCE, 1), (PER_ROW, 3)):
        copies, tokens, results, judged = 3, 2, 3, 2
        verify = (rows * big + cache) / 1e9 + (kernels + copies + tokens + results + judged) * 1e-6 + 1e-5
        found = times(model, "small", 2, constants, growth)
        assert len(found) == 3 and found[0] == pytest.approx(plain) and found[2] == pytest.approx(2 * step + verify)


def test_layers_that_begin_alike_verify_one_token_only(tiny_model):
    model = tiny_model()
    table = cost.weight_bytes(model)
    first = int(table.by_route[:2, 2].sum())
    rest = int(table.of(pattern("big"))) - first
    cache = int(cost.cache_bytes(model, 10).of(pattern("big")))
    step = int(table.of(pattern("BB--"))) + cache
    assert times(model, "BB--", growth=PER_ROW)[1] == pytest.approx((step + first + 2 * rest + cache) / 1e9)


def test_as_many_are_drafted_as_pay():
    acceptance, seconds = [0.9, 0.8, 0.5], [1.0, 1.2, 1.4, 2.0]
    assert bench.expected(acceptance, seconds) == (2, pytest.approx((1 + 0.9 + 0.72) / 1.4))
    assert bench.expected([0.1, 0.1, 0.1], seconds) == (0, 1.0)


def test_the_growths_are_bounds_and_what_lies_between():
    rows = range(1, 9)
    once, reported, per_row = (
        [np.interp(each, list(growth), list(growth.values())) for each in rows] for growth in bench.GROWTHS.values()
    )
    assert once == [1] * 8 and per_row == list(rows)
    assert all(low <= middle <= high for low, middle, high in zip(once, reported, per_row, strict=True))
    assert reported[0] == 1 and 2 < reported[-1] < 3


def test_a_wait_costs_fast_chips_more():
    model = work.imagined(SHAPES["Llama 3.2 1B"], 4)
    chips = [Machine.of_chip(find_chips(name)[0]) for name in ("M1", "M3 Ultra")]
    (row,) = bench.project({"a": model}, pattern("s---"), [0.9] * 7, 512, chips)
    slow, fast = (row["on"][chip.name]["read once"] for chip in chips)
    assert slow["speed_up"] > fast["speed_up"] > 1
    for on in row["on"].values():
        assert list(on) == list(bench.GROWTHS)
        speeds = [of["speed_up"] for of in on.values()]
        assert speeds == sorted(speeds, reverse=True)
        assert all(of["speed_up_range"][0] <= of["speed_up"] <= of["speed_up_range"][1] for of in on.values())
    big, draft = np.full(16, 2, np.uint8), pattern("ssss------------", 16)
    table = cost.weight_bytes(model) + cost.cache_bytes(model, 512)
    assert row["draft_bytes_share"] == table.of(draft) / table.of(big) and row["parameters"] > 1e9


def test_a_pattern_keeps_its_depths_in_other_numbers_of_layers():
    assert bench.stretched(pattern("Bs-B"), 8).tolist() == pattern("BBss--BB", 8).tolist()
    assert bench.stretched(pattern("Bs-B"), 2).tolist() == pattern("B-", 2).tolist()
    assert bench.stretched(pattern("Bs-B"), 4).tolist() == pattern("Bs-B").tolist()


def test_the_large_shapes_are_those_with_a_billion_parameters():
    assert bench.large_shapes() == [
        "Llama 3.2 1B",
        "Duo-LLM 1.4B",
        "SmolLM2 1.7B",
        "Llama 3.2 3B",
        "Llama 3.1 8B",
    ]
    assert bench.parameters(SHAPES["Llama 3.1 8B"]) == pytest.approx(8.03e9, rel=0.01)


def test_acceptance_is_given_or_was_measured(tmp_path):
    assert bench.read_acceptance("0.8,0.5", "small") == [0.8] + [0.5] * 6
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"summary": {"expected": {"small": {"acceptance": [0.7, 0.6]}}}}))
    assert bench.read_acceptance(str(file), "small") == [0.7, 0.6]
    with pytest.raises(DuoError, match=r"--acceptance .*measured.json: has small, but not skip"):
        bench.read_acceptance(str(file), "skip")
    for wrong in ("0.8,much", "1.2", "", "nan"):
        with pytest.raises(DuoError, match="must be shares from 0 to 1 with commas between"):
            bench.read_acceptance(wrong, "small")
    file.write_text("[]")
    for name in (str(file), str(tmp_path / "none.json")):
        with pytest.raises(DuoError, match="cannot be read as what duo_mlx.bench.speculated wrote"):
            bench.read_acceptance(name, "small")
