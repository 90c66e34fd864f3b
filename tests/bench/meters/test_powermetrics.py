"""A stream of powermetrics, in both formats and in pieces, cut and damaged."""

import plistlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx.bench.meters import Unavailable
from duo_mlx.bench.meters.powermetrics import Parser, PowermetricsMeter, Sample

TEXT = """
*** Sampled system activity (Fri Sep 11 13:41:46 2026 -0700) ({ms:.2f}ms elapsed) ***


**** Processor usage ****

E-Cluster HW active frequency: 1248 MHz
E-Cluster HW active residency:  77.43% (600 MHz:   0% 912 MHz:  54% 2424 MHz: 8.7%)
CPU 0 frequency: 1359 MHz

{powers}Combined Power (CPU + GPU + ANE): 9999 mW


**** GPU usage ****

GPU HW active frequency: 1398 MHz
GPU idle residency:  22.57%
GPU Power: {gpu} mW
"""
PREAMBLE = "Machine model: Mac14,2\nOS version: 25C56\nBoot arguments: \nBoot time: Thu Sep 10 23:42:17 2026\n\n\n"


def plist(seconds, watts, **gpu):
    """A document of the stream with the NUL that ends it."""
    powers = {f"{rail}_power": value * 1000 for rail, value in watts.items()}
    document = {
        "is_delta": True,
        "elapsed_ns": int(seconds * 1e9),
        "hw_model": "Mac14,2",
        "timestamp": datetime(2026, 1, 22, tzinfo=UTC).replace(tzinfo=None),
        "processor": {"clusters": [{"name": "E-Cluster", "freq_hz": 1.2e9}], "combined_power": 9999.0} | powers,
        "gpu": {"freq_hz": 1398.0, "idle_ratio": 0.2, "gpu_energy": 12} | gpu,
    }
    return plistlib.dumps(document) + b"\0"


def text(seconds, watts):
    powers = "".join(f"{rail.upper()} Power: {value * 1000:.0f} mW\n" for rail, value in watts.items())
    return TEXT.format(ms=seconds * 1000, powers=powers, gpu=f"{watts.get('gpu', 0) * 1000:.0f}").encode()


FORMATS = {"plist": plist, "text": text}
WATTS = {"cpu": 4.0, "gpu": 21.0, "ane": 0.5}


@pytest.mark.parametrize("form", FORMATS)
def test_a_sample_has_its_elapsed_time_and_rails(form):
    (sample,) = Parser().feed(FORMATS[form](1.00293, WATTS))
    assert sample.seconds == pytest.approx(1.00293, abs=1e-5)
    assert sample.watts == WATTS  # the text's second GPU Power line adds nothing, nor does the combined one


def test_the_gpus_frequency_is_in_megahertz():
    """Whatever its name says."""
    assert Parser().feed(plist(1, WATTS))[0].gpu_mhz == 1398.0


def test_a_gpu_power_printed_twice_counts_once():
    """Also where both lines come before the sample's last."""
    block = text(1, WATTS).replace(b"CPU Power", b"GPU Power: 21000 mW\nCPU Power")
    assert block.count(b"GPU Power: 21000 mW") == 3
    assert [sample.watts for sample in Parser().feed(block)] == [WATTS]


@pytest.mark.parametrize("form", FORMATS)
def test_missing_rails_are_missing(form):
    (sample,) = Parser().feed(FORMATS[form](1, {"cpu": 1.0}))
    assert sample.watts == {"cpu": 1.0}


@given(form=st.sampled_from(sorted(FORMATS)), cuts=st.lists(st.integers(1, 400), max_size=60), skip=st.integers(0, 300))
def test_pieces_of_any_size_give_the_same_samples(form, cuts, skip):
    """From the middle of a document on, as when a stream is joined late."""
    make = FORMATS[form]
    seconds = (1.01, 0.99, 1.5)
    stream = make(2.0, WATTS)[skip:] + b"".join(make(each, WATTS) for each in seconds)
    parser, samples = Parser(), []
    for cut in (*cuts, len(stream)):
        piece, stream = stream[:cut], stream[cut:]
        samples += parser.feed(piece)
    assert [sample.seconds for sample in samples if sample.seconds != 2.0] == pytest.approx(seconds, abs=1e-5)
    assert all(sample.watts == WATTS for sample in samples)


def test_a_cut_document_does_not_take_its_neighbour_with_it():
    """Powermetrics was stopped and started again into the same file; the last document is cut too."""
    stream = plist(1, WATTS) + plist(2, WATTS)[:700] + plist(3, WATTS) + plist(4, WATTS)[:-40]
    assert [sample.seconds for sample in Parser().feed(stream)] == [1, 3]


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.replace(b"<integer>", b"<integer>x", 1),
        lambda document: document.replace(b"elapsed_ns", b"elapsed"),
        lambda document: document.replace(b"<real>4000.0</real>", b"<real>nan</real>"),
        lambda document: document.replace(b"<real>4000.0</real>", b"<real>-4000.0</real>"),
        lambda document: document.replace(b"Mac14,2", b"Mac\x01\xff"),
        lambda document: document.replace(b"<key>processor</key>", b"<key>gpu</key>"),
        lambda document: document.replace(b"<dict>", b"<array>", 1),
    ],
)
def test_a_damaged_document_is_left_out_or_whole(damage):
    samples = Parser().feed(damage(plist(1, WATTS)) + plist(2, WATTS))
    assert samples[-1] == Sample(2.0, WATTS, 1398.0)
    assert all(sample.watts in ({}, WATTS) for sample in samples)


def test_a_cut_text_sample_has_no_rails_of_its_neighbour():
    stream = text(1, WATTS) + text(2, WATTS)[:150] + text(3, WATTS)
    assert [(sample.seconds, bool(sample.watts)) for sample in Parser().feed(stream)] == [
        (1, True),
        (2, False),
        (3, True),
    ]


def test_garbage_gives_nothing():
    assert Parser().feed(b"powermetrics must be invoked as the superuser\n") == []


class Stream:
    """powermetrics writing to a file: asked for 1 s, it samples each ``interval`` s.

    ``alter`` gets a sample's number and may change its bytes.
    """

    def __init__(self, clock, path, make, watts, interval=1.037):
        self.clock, self.path, self.make, self.watts, self.interval = clock, path, make, watts, interval
        self.alter = lambda _number, data: data
        self.number = 0
        path.write_bytes(PREAMBLE.encode() if make is text else b"")
        self.next = clock.now
        self.write()

    def write(self):
        """What was written by now."""
        while self.next <= self.clock.now:
            self.number += 1
            with self.path.open("ab") as file:
                file.write(self.alter(self.number, self.make(self.interval, self.watts(self.number))))
            self.next += self.interval


@pytest.fixture
def stream_of(clock, tmp_path, monkeypatch):
    """``stream_of(make, watts)``: a stream that goes on whenever the clock moves, and its meter."""

    def make_stream(make, watts=lambda _number: WATTS):
        stream = Stream(clock, tmp_path / "stream", make, watts)
        move = clock.sleep

        def sleep(seconds):
            move(seconds)
            stream.write()

        monkeypatch.setattr(clock, "sleep", sleep)
        return stream, PowermetricsMeter(stream.path, clock, wall=lambda: stream.path.stat().st_mtime + 1)

    return make_stream


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_gives_its_known_joules(stream_of, measure, form):
    stream, meter = stream_of(FORMATS[form])
    energy = measure(meter)
    assert stream.number > 55
    for rail, watts in WATTS.items():
        assert energy.joules[rail] == pytest.approx(watts * energy.seconds, rel=0.01)
    assert energy.mean_w == pytest.approx(25.5, rel=0.01)
    assert energy.label == "SoC estimate by powermetrics (cpu, gpu, ane)" and energy.why == {}
    assert energy.flags == ("its manual says not to compare devices by it",)
    assert meter.latest.seconds == pytest.approx(1.037)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fault", ["lost", "cut"])
def test_a_sample_that_is_lost_is_a_gap(stream_of, measure, form, fault):
    stream, meter = stream_of(FORMATS[form])
    stream.alter = lambda number, data: data if number != 30 else b"" if fault == "lost" else data[:200]
    energy = measure(meter)
    assert energy.total_j is None
    assert "a gap" in energy.why["total"] or "not reported" in energy.why["total"]


@pytest.mark.parametrize("fault", ["stops", "vanishes"])
def test_a_stream_that_ends_is_a_gap(stream_of, measure, fault):
    stream, meter = stream_of(plist)
    stream.alter = lambda number, data: data if number < 50 else b""

    def vanish(gone):
        if fault == "vanishes" and gone > 45:
            stream.path.unlink(missing_ok=True)

    energy = measure(meter, during=vanish)
    assert energy.total_j is None and energy.why["total"]


def test_a_rail_missing_from_one_sample_is_not_given(stream_of, measure):
    _, meter = stream_of(plist, lambda number: WATTS if number != 30 else {"cpu": 4.0, "gpu": 21.0})
    energy = measure(meter)
    assert energy.joules["ane"] is None and energy.total_j is None
    assert energy.joules["gpu"] == pytest.approx(21 * energy.seconds, rel=0.01)


def test_without_the_gpu_sampler_there_is_no_total(stream_of, measure):
    _, meter = stream_of(plist, lambda _number: {"cpu": 4.0})
    energy = measure(meter)
    assert energy.label == "SoC estimate by powermetrics (cpu)"
    assert energy.total_j is None and energy.joules["cpu"] == pytest.approx(4 * energy.seconds, rel=0.01)


def test_a_cpu_at_zero_is_not_available_and_the_gpu_is(stream_of, measure):
    _, meter = stream_of(plist, lambda _number: WATTS | {"cpu": 0.0})
    energy = measure(meter)
    assert energy.joules["cpu"] is None and "0 J under load" in energy.why["cpu"]
    assert energy.joules["gpu"] == pytest.approx(21 * energy.seconds, rel=0.01)


def test_a_stream_started_anew_is_seen(stream_of, measure):
    stream, meter = stream_of(plist)

    def restart(gone):
        if 30 < gone < 30.01:
            stream.path.write_bytes(b"")

    energy = measure(meter, during=restart)
    assert energy.total_j is None and "a gap" in energy.why["cpu"]
    assert meter.read().epoch == 1


@pytest.mark.parametrize(
    ("content", "age", "says"),
    [
        (None, 0, "cannot be read: No such file or directory"),
        (b"", 0, "no whole sample"),
        (plist(1, WATTS)[:500], 0, "no whole sample"),
        (b"powermetrics must be invoked as the superuser\n", 0, "no whole sample"),
        (plist(1, WATTS), 60, "nobody has written to it"),
    ],
    ids=["absent", "empty", "cut", "refused", "stale"],
)
def test_no_stream_is_a_reason_that_names_the_command(tmp_path, content, age, says):
    path = tmp_path / "stream"
    now = 0.0
    if content is not None:
        path.write_bytes(content)
        now = path.stat().st_mtime
    with pytest.raises(Unavailable, match=says) as caught:
        PowermetricsMeter(path, wall=lambda: now + age)
    assert str(path) in str(caught.value) and "sudo powermetrics" in str(caught.value)
