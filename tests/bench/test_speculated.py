"""The benchmark of speculation: all ways give the same tokens, caches and counts are exact. Nothing is timed."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import speculated
from duo_mlx.bench.continuations import DraftModel, Plain, Speculated, by_place, waits
from duo_mlx.bench.interleave import Timings
from duo_mlx.bench.peer import step_bytes
from duo_mlx.bench.speculated_summary import PASSES, expected, of_costs, summary, table
from duo_mlx.errors import DuoError
from duo_mlx.policies import FixedPolicy
from duo_mlx.rounds import Rounds
from duo_mlx.routes import parse_pattern
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import speculate

LAYERS, TOKENS = 4, 14
PROMPTS = [[3, 4, 5, 9, 8, 7], [11], [2, 30, 17]]
BIG, DRAFTS = parse_pattern("big", LAYERS), {spec: parse_pattern(spec, LAYERS) for spec in ("small", "BBBs")}


def likeliest(model, tokens, routes):
    """The next token of a pass over all of them, without a cache."""
    return int(mx.argmax(model(mx.array([tokens]), routes=routes, strategy="dense")[0, -1]).item())


def greedy(model, prompt, routes, count):
    whole = list(prompt)
    for _ in range(count):
        whole.append(likeliest(model, whole, routes))
    return whole[len(prompt) :]


def rounds_of_two_models(model, prompt, draft, draft_tokens):
    """Drafted and accepted in each round where a second model, which has read everything itself, drafts greedily."""
    text, rounds, done = greedy(model, prompt, BIG, TOKENS), [], 0
    while done < TOKENS:
        drafted = min(draft_tokens, TOKENS - done)
        guesses = greedy(model, [*prompt, *text[:done]], draft, drafted)
        agreed = [guess == token for guess, token in zip(guesses, text[done:], strict=False)]
        accepted = (*agreed, False).index(False)
        rounds.append((drafted, accepted))
        done += accepted + 1
    return rounds


def continuations(model, sampling=Sampling(), numbers=("auto", "1", "3")):  # noqa: B008
    return speculated.continuations(model, BIG, DRAFTS, numbers, PROMPTS, TOKENS, sampling, against=True)


def test_all_ways_give_the_greedy_tokens_again_and_again(tiny_model):
    model = tiny_model()
    wanted = [greedy(model, prompt, BIG, TOKENS) for prompt in PROMPTS]
    ways = continuations(model)
    assert len(ways) == 1 + 2 * 3 + 2 * 2
    for _ in range(2):
        texts = {name: way() for name, way in ways.items()}
        assert all(text == wanted for text in texts.values())
    assert speculated.differences(model, BIG, PROMPTS, texts) == []
    drafted_well = [name for name, way in ways.items() if any(accepted for _, accepted in way.rounds)]
    assert {"small, 3", "mlx-lm, small, 3", "BBBs, 1"} <= set(drafted_well)


def test_a_second_model_keeps_twice_the_cache(tiny_model):
    ways = continuations(tiny_model())
    for way in ways.values():
        way()
    position = 2 * 2 * 4 * 4  # keys and values of two heads in float32
    allocated = 256  # positions at least, by mlx-lm's caches
    assert ways["plain"].cache_bytes == len(PROMPTS) * LAYERS * allocated * position
    for spec in DRAFTS:
        assert ways[f"{spec}, auto"].cache_bytes == ways[f"{spec}, 3"].cache_bytes == ways["plain"].cache_bytes
        assert ways[f"mlx-lm, {spec}, 3"].cache_bytes == 2 * ways[f"{spec}, 3"].cache_bytes


@pytest.mark.parametrize("spec", DRAFTS)
@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_rounds_of_a_draft_model_are_those_of_brute_force(tiny_model, spec, draft_tokens):
    model = tiny_model()
    way = DraftModel(model, BIG, DRAFTS[spec], draft_tokens, PROMPTS, TOKENS, Sampling())
    way()
    wanted = [rounds_of_two_models(model, prompt, DRAFTS[spec], draft_tokens) for prompt in PROMPTS]
    assert way.rounds == [each for of_prompt in wanted for each in of_prompt]
    assert any(accepted for _, accepted in way.rounds) and any(accepted < drafted for drafted, accepted in way.rounds)


def test_bytes_and_rounds_of_speculation_are_its_own_counts(tiny_model):
    model = tiny_model()
    way = Speculated(model, BIG, DRAFTS["small"], "3", PROMPTS, TOKENS, Sampling())
    way()
    counts = []
    for prompt in PROMPTS:  # which are read by the first pass here, not before
        options = {"draft_tokens": 3, "max_tokens": TOKENS}
        *_, last = speculate(model, prompt, FixedPolicy(BIG), FixedPolicy(DRAFTS["small"]), **options)
        counts.append(last.speculation)
    record = way.record()
    assert record["verifications"] == len(way.rounds) == sum(each.verifications for each in counts)
    assert record["tokens"] == TOKENS * len(PROMPTS) == sum(each.tokens for each in counts)
    assert record["bytes_per_token"] == sum(each.weight_bytes + each.cache_bytes for each in counts) / record["tokens"]
    for name in ("drafted", "accepted"):
        places = zip(*(getattr(each, name) for each in counts), strict=True)
        assert record[name] == [sum(of_place) for of_place in places]
    way.reset()
    assert way.rounds == [] and way.generated == way.bytes_read == 0


@pytest.mark.parametrize("draft_tokens", ["0", "3", "auto"])
def test_the_device_waits_where_no_step_was_begun_ahead(tiny_model, monkeypatch, draft_tokens):
    ahead, step = [], Rounds.step

    def seen(rounds, history, after=None):
        ahead.append(after is not None)
        return step(rounds, history, after)

    monkeypatch.setattr(Rounds, "step", seen)
    way = Speculated(tiny_model(), BIG, DRAFTS["small"], draft_tokens, PROMPTS[:1], TOKENS, Sampling())
    way()
    nothing_follows = way.rounds[-1][0] == 0  # after it the text is there, as in plain decoding
    assert waits(way.rounds) == len(way.rounds) - sum(ahead) - nothing_follows
    assert way.record()["host_waits_per_token"] * TOKENS == waits(way.rounds) and any(ahead) == (draft_tokens != "3")


def test_plain_decoding_waits_for_nothing_and_reads_all_of_its_pattern(tiny_model):
    model = tiny_model()
    way = Plain(model, BIG, PROMPTS[:1], TOKENS, Sampling())
    way()
    record = way.record()
    assert record["host_waits_per_token"] == 0 and "verifications" not in record
    assert record["bytes_per_token"] == step_bytes(model, BIG, len(PROMPTS[0]) + TOKENS // 2)


def test_sampled_texts_come_from_a_seed(tiny_model):
    ways = continuations(tiny_model(), Sampling(1.0), ["3"])
    texts = {name: way() for name, way in ways.items()}
    assert {name: way() for name, way in ways.items()} == texts
    assert texts["plain"] != continuations(tiny_model(), numbers=[])["plain"]()


def test_what_became_of_drafts_by_place():
    found = by_place([(0, 0), (3, 3), (3, 1), (2, 0)])
    assert found == {
        "drafted": [3, 3, 2],
        "tried": [3, 2, 1],
        "accepted": [2, 1, 1],
        "acceptance": [2 / 3, 1 / 2, 1.0],
    }
    assert by_place([(2, 0)])["acceptance"] == [0.0] and by_place([])["acceptance"] == []


def test_a_text_that_differs_is_found_with_its_logits(tiny_model):
    model = tiny_model()
    plain = [greedy(model, prompt, BIG, TOKENS) for prompt in PROMPTS]
    other = [list(text) for text in plain]
    other[1][5] = (plain[1][5] + 1) % 32
    (found,) = speculated.differences(model, BIG, PROMPTS, {"plain": plain, "small, 3": other})
    logits = np.array(model(mx.array([[*PROMPTS[1], *plain[1][:5]]]), routes=BIG))[0, -1]
    assert (found["name"], found["prompt"], found["token"]) == ("small, 3", 1, 5)
    assert found["logits_apart"] == pytest.approx(logits[plain[1][5]] - logits[other[1][5]]) and logits.any()
    assert found["logits_apart"] > 0


class Way:
    """What a summary asks of a continuation."""

    def __init__(self, passes, rounds, cache_bytes):
        self.passes, self.rounds, self._cache_bytes = passes, rounds, cache_bytes

    def record(self):
        return {"tokens": 9, "bytes_per_token": 1e6, "cache_bytes": self._cache_bytes, "host_waits_per_token": 0.5} | (
            {"verifications": 3, "tokens_per_verification": 3.0, **by_place(self.rounds)} if self.rounds else {}
        )


def test_ratios_are_for_as_many_tokens_and_expectations_from_acceptance_and_passes():
    ways = {
        "plain": Way(10, [], 100),
        "s, auto": Way(9, [(0, 0), (2, 2)], 100),
        "s, 2": Way(9, [(2, 1), (2, 2)], 100),
        "mlx-lm, s, 2": Way(9, [(2, 1)], 200),
        "mlx-lm, s, 4": Way(9, [(4, 1)], 200),
    }
    seconds = {"plain": 10.0, "s, auto": 6.0, "s, 2": 4.5, "mlx-lm, s, 2": 9.0, "mlx-lm, s, 4": 7.2}
    times = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4}
    costs = of_costs(
        Timings({f"pass over {each}": [5 * times[each]] * 2 for each in PASSES} | {"step of s": [1.0, 1.0]})
    )
    assert costs["pass over 4"]["median_s"] == pytest.approx(1.6)
    timings = Timings({name: [value, value] for name, value in seconds.items()})
    result = summary(timings, ways, costs, ["s"])
    medians = {name: of["median"] for name, of in result.items() if "interval_95" in of}
    assert medians == pytest.approx(
        {
            "plain / s, auto": 9 / 6,  # ten passes took ten seconds, so nine tokens take nine
            "plain / s, 2": 2,
            "plain / mlx-lm, s, 2": 1,
            "plain / mlx-lm, s, 4": 9 / 7.2,
            "mlx-lm, s, 4 / s, auto": 1.2,
            "mlx-lm, s, 2 / s, 2": 2,
        }
    )
    assert result["ways"]["s, 2"]["cache_share"] == 0.5
    # of three first drafted tokens all were accepted, of three second ones two
    assert result["expected"]["s"]["acceptance"] == [1.0, pytest.approx(2 / 3)]
    assert result["expected"]["s"]["draft_tokens"] == 2
    assert result["expected"]["s"]["speed_up"] == pytest.approx((1 + 1 + 2 / 3) / (2 * 0.2 + 1.4))
    assert expected([0.1], costs, "s") == {"draft_tokens": 0, "speed_up": 1.0}
    text = table(result, [{"name": "s, 2", "prompt": 1, "token": 7, "logits_apart": 1e-6}], greedy=True)
    assert "plain / s, auto: 1.500 (1.500 to 1.500), goal: >= 0.97" in text
    assert "mlx-lm, s, 2 / s, 2: 2.000 (2.000 to 2.000), goal: >= 1.00" in text
    assert "best: s, 2, 2.000, goal: >= 1.15" in text
    assert "s, 2: prompt 1 differs from token 7, logits 1e-06 apart" in text and "token by token" not in text


def run(*options):
    return CliRunner().invoke(speculated.command, [str(option) for option in options])


def test_the_record(saved, tmp_path):
    directory, _ = saved()
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("w1 w2 w3\n\nw4 w5")
    options = ["--model", directory, "--prompts", prompts, "--count", 2, "--prompt-tokens", 4, "--tokens", 5]
    options += ["--draft", "small", "--draft", "BBBs", "--draft-tokens", "auto", "--draft-tokens", 2, "--rounds", 1]
    done = run(*options, "--out", out)
    assert done.exit_code == 0, done.output
    assert "all texts are those of plain decoding, token by token" in done.output
    record = json.loads(out.read_text())
    ways = [name for spec in ("small", "BBBs") for name in (f"{spec}, auto", f"{spec}, 2", f"mlx-lm, {spec}, 2")]
    passes = [*(f"pass over {each}" for each in PASSES), "step of small", "step of BBBs"]
    assert list(record["runs_s"]) == ["plain", *ways, *passes]
    assert all(len(runs) == 2 for runs in record["runs_s"].values())
    summed = record["summary"]["ways"]
    assert summed["plain"]["tokens"] == 2 * 2 * 5 and summed["small, 2"]["cache_share"] == 0.5
    assert record["patterns"] == {"big": "BBBB", "small": "ssss", "BBBs": "BBBs"} and record["differences"] == []
    assert "--draft BBBs --draft-tokens auto --draft-tokens 2 --count 2" in record["command"]
    refused = run(*options, "--out", out)
    assert isinstance(refused.exception, DuoError) and "exists already" in str(refused.exception)
    alone = run(*options[:-2], "--rounds", 1, "--no-against-mlx-lm", "--temp", 1.0, "--out", tmp_path / "out.csv")
    assert alone.exit_code == 0 and "mlx-lm" not in alone.output and "token by token" not in alone.output
    assert (tmp_path / "out.csv").read_text().startswith("way,run,seconds\nplain,0,")
    fewer = run(*options, "--draft-vocabulary", 9, "--out", tmp_path / "fewer.json")
    assert fewer.exit_code == 0 and "all texts are those of plain decoding, token by token" in fewer.output
    record = json.loads((tmp_path / "fewer.json").read_text())
    assert "--draft-vocabulary 9 " in record["command"]
    rounds = [each["small, 2"] for each in (record["summary"]["ways"], summed)]
    read = [each["bytes_per_token"] * each["tokens"] / each["verifications"] for each in rounds]
    assert read[0] < read[1]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--draft", "random"], "--draft random: must be one pattern for all tokens, such as small, BBss or budget:K"),
        (["--draft", "BBB"], "--draft BBB: route 'BBB' has 3 characters, but the model has 4 layers"),
        (["--route", "router"], "--route router: "),
        (["--route", "small", "--draft", "big"], "--draft big --draft-tokens auto: the draft's routes read .* cheaper"),
        (["--draft-tokens", "few"], "--draft small --draft-tokens few: draft_tokens is few; it must be auto or a"),
        (["--draft-vocabulary", 33], "--draft-vocabulary 33: the model's vocabulary has 32 tokens"),
        (["--tokens", 40], "--prompt-tokens and --tokens come to 72 positions; the model has 64"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(saved, options, line):
    directory, _ = saved(max_position_embeddings=64)
    done = run("--model", directory, *options)
    assert isinstance(done.exception, DuoError)
    with pytest.raises(DuoError, match=f"^{line}"):
        raise done.exception
