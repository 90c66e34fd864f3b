"""The projection's sum, ranges, chips and verdicts, by hand."""

import pytest

from duo_mlx import projection, work
from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes
from duo_mlx.kernels.verdicts import Figures
from duo_mlx.projection import MIXES, SHAPES, Constants, Machine, find_chips, machines, outlook

M2_MAX = find_chips("M2 Max")[0]


def test_the_sum_and_its_range():
    token = work.Work(bytes=300e6, dispatches=100, waits=2)
    typical, fastest, slowest = projection.project(token, Machine.of_chip(M2_MAX))
    assert typical == pytest.approx(1e-3 + 0.5e-3 + 0.55e-3)
    assert fastest == pytest.approx(300e6 / 340e9 + 0.5e-3 + 0.4e-3)
    assert slowest == pytest.approx(300e6 / 280e9 + 0.5e-3 + 0.7e-3)


@pytest.mark.parametrize("name", ["M4 Max", "m4max", "Apple M4 Max", "APPLE M4 MAX"])
def test_a_name_means_every_chip_that_is_sold_under_it(name):
    assert [str(chip) for chip in find_chips(name)] == ["M4 Max (410 GB/s)", "M4 Max (546 GB/s)"]


@pytest.mark.parametrize("name", ["M4 Max 546", "m4max546", "M4 Max (546 GB/s)"])
def test_a_bandwidth_tells_them_apart(name):
    assert [chip.peak_gb_s for chip in find_chips(name)] == [546]


def test_unknown_chips_are_refused_with_what_is_close():
    with pytest.raises(DuoError, match=r"^--chip 'M4 Mex' is not in the table; it has M4 Max, M"):
        find_chips("M4 Mex")
    with pytest.raises(DuoError, match="it has M1, M1 Pro, .* M5 Max$"):
        find_chips("banana")


def test_what_the_doctor_measured_here_takes_the_place_of_what_is_reported(monkeypatch):
    assert [each.name for each in machines(["M2 Max", "m1"])] == ["M2 Max (400 GB/s)", "M1 (68 GB/s)"]
    monkeypatch.setattr(projection.verdicts, "figures", lambda: Figures(123e9, 4e-6, 0.1e-3, 1.0))
    monkeypatch.setattr(projection.mx, "device_info", lambda: {"device_name": "Apple M2 Max"})
    here, other = machines(["m1", "M2 Max"])
    assert here.name.startswith("Apple M2 Max") and "measured by the doctor" in here.name
    assert here.constants == (Constants(123e9, 4e-6, 0.1e-3),) * 3
    assert other == Machine.of_chip(find_chips("M1")[0]) == machines(["M1"])[0]
    assert machines()[0] == here and len(machines()) == 1 + len(projection.DEFAULT_CHIPS)


def test_two_megabytes_are_a_dispatch_at_400_gb_s():
    assert projection.smallest_module(Constants(400e9, 5e-6, 0)) == pytest.approx(2e6)


def look(shape, bits, chip=M2_MAX, mix="small"):
    model = work.imagined(SHAPES[shape], bits)
    big = sum(projection_bytes(layer) for layer in model.layers)
    found = work.works(model, MIXES, 512, work.usable(model))
    return outlook(found, big, Machine.of_chip(chip).typical, mix)


def projection_bytes(layer):
    return nbytes(layer.mlp.big)


def test_known_shapes_have_their_known_sizes():
    parameters = {"SmolLM2 135M": 134.5e6, "Llama 3.2 1B": 1.236e9, "Llama 3.1 8B": 8.030e9, "SmolLM2 1.7B": 1.711e9}
    for name, expected in parameters.items():
        args = SHAPES[name]
        big = work.works(work.imagined(args, 16), MIXES, 1, ["planned"])["planned"]["big"].bytes / 2
        # an embedding of its own is not read whole
        unread = 0 if args.base["tie_word_embeddings"] else args.vocab_size * args.hidden_size
        assert big + unread == pytest.approx(expected, rel=0.01)


def test_more_bytes_keep_more_of_the_gain_and_faster_chips_less():
    small_model, large_model = look("SmolLM2 135M", 4), look("Llama 3.1 8B", 4)
    assert small_model.kept < 0.2 and not small_model.pays
    assert 0.5 < large_model.kept < look("Llama 3.1 8B", 16).kept < 1 and large_model.pays
    slow, fast = (look("Llama 3.2 1B", 4, find_chips(chip)[0]) for chip in ("M1", "M3 Ultra"))
    assert slow.pays and not fast.pays
    assert 1 < look("Llama 3.2 1B", 4, mix="half small").on_device < look("Llama 3.2 1B", 4).on_device


def test_no_shape_waits_for_the_host_if_fused_reads_like_mlx():
    for shape in SHAPES:
        found = look(shape, 4, find_chips("M1")[0])
        assert found.strategy == "fused" and found.slack > 1


def test_slack_is_where_sync_and_fused_meet():
    model, constants = work.imagined(SHAPES["Llama 3.1 8B"], 4), Machine.of_chip(M2_MAX).typical
    found = work.works(model, MIXES, 512, ["fused", "sync"])
    read = sum(projection_bytes(layer) for layer in model.layers) / constants.bandwidth_bytes_s
    slower = projection.seconds(found["fused"]["big"], constants) + (look("Llama 3.1 8B", 4).slack - 1) * read
    assert slower == pytest.approx(projection.seconds(found["sync"]["big"], constants))


def test_padding_beats_a_wait_only_for_few_tokens_or_small_models():
    big, small = (projection.padded_limit(SHAPES[shape], 0.275e-3, 10e12) for shape in ("Llama 3.1 8B", "SmolLM2 135M"))
    assert big == pytest.approx(0.275e-3 * 10e12 / (6 * 4096 * 14336)) and big < 10 and small > 500
