"""The embedded model: it loads by default, all three routes work, and it orders them as its card says.

tests/data/held_out.txt is from the end of Emma, which the model was not trained on.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

import duo_mlx
from duo_mlx.checkpoint import EMBEDDED
from duo_mlx.cli import main
from duo_mlx.policies import parse_route

HELD_OUT = (Path(__file__).parent / "data" / "held_out.txt").read_text(encoding="utf-8")
PROMPT = "It is a truth universally acknowledged"


@pytest.fixture(scope="module")
def embedded():
    return duo_mlx.load()


def loss(model, tokenizer, spec, length=256):
    tokens = tokenizer.encode(HELD_OUT)
    windows = np.array([tokens[at : at + length + 1] for at in range(0, len(tokens) - length, length)])
    routes = parse_route(spec, model.config.num_hidden_layers).routes(0, length, len(windows))
    logits = model(mx.array(windows[:, :-1]), routes=routes)
    return nn.losses.cross_entropy(logits, mx.array(windows[:, 1:]), reduction="mean").item()


def test_losses_order_as_the_routes_cost(embedded):
    big, mixed, small, skip = (loss(*embedded, spec) for spec in ("big", "random:0.5,0.4,0.1", "small", "skip"))
    assert big + 0.02 < mixed and mixed + 0.05 < small and small + 1 < skip
    assert big < 4.3


def test_strategies_agree_on_it(embedded):
    model, tokenizer = embedded
    tokens = mx.array([tokenizer.encode(HELD_OUT)[:64]])
    routes = parse_route("random:0.4,0.3,0.3", 12).routes(0, 64)
    dense = model(tokens, routes=routes, strategy="dense")
    for strategy in ("planned", "sorted", "sync", "auto"):
        assert mx.abs(model(tokens, routes=routes, strategy=strategy) - dense).max().item() < 1e-4


def test_its_text_is_read_as_it_was_written(embedded):
    _, tokenizer = embedded
    text = " ".join(HELD_OUT.split())
    assert tokenizer.decode(tokenizer.encode(HELD_OUT)) == text


def test_half_big_half_small_counts():
    done = CliRunner().invoke(main, ["generate", PROMPT, "--route", "BBBBBBssssss", "--json", "--max-tokens", "40"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["generation_tokens"] == 40 and found["finish_reason"] == "length"
    assert found["routes"] == {"big": 240, "small": 240, "skip": 0}
    assert (
        found["routes_per_layer"] == [{"big": 40, "small": 0, "skip": 0}] * 6 + [{"big": 0, "small": 40, "skip": 0}] * 6
    )
    known = set(HELD_OUT.lower().replace(",", " ").replace(".", " ").split())
    words = found["text"].lower().replace(",", " ").replace(".", " ").split()
    assert len(words) > 20 and sum(word in known for word in words) / len(words) > 0.5


def test_it_ships_its_card_and_stays_small():
    assert (EMBEDDED / "README.md").read_text(encoding="utf-8").startswith("# ")
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 12_000_000
