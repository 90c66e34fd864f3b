"""The grid of bench run: presets that fit the model and name routes that it has, and cells without room refused."""

import json
import re
from itertools import pairwise

import pytest

from duo_mlx import checkpoint
from duo_mlx.bench import grid
from duo_mlx.bench.grid import Grid
from duo_mlx.errors import DuoError
from duo_mlx.generation import policy_of
from duo_mlx.model import ModelArgs

PRESETS = ("quick", "paper", "full")
FALLING = [{"pattern": "B" * big + "s" * (12 - big), "loss": 4.0 - big / 12} for big in range(12, -1, -1)]
SHAPES = {
    "plain": {},
    "12 layers": {"num_hidden_layers": 12, "router_choices": "sB", "best_patterns": FALLING},
    "a measured router": {"router_choices": "sB", "router_offsets": [[0.1, -1.0], [0.6, 1.0]]},
    "30 layers": {"num_hidden_layers": 30},
    "3 layers": {"num_hidden_layers": 3},
    "a short context": {"num_hidden_layers": 12, "max_position_embeddings": 400, "router_choices": "-sB"},
    "a very short one": {"max_position_embeddings": 96},
    "sliding": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 400},
    "few small ones": {"num_hidden_layers": 12, "small_layers": [1, 2, 4], "best_patterns": FALLING},
}


@pytest.fixture
def args(tiny_config):
    """``args(**changes)``: the arguments of a tiny model."""
    return lambda **changes: ModelArgs.from_dict(tiny_config(**changes))


def bigs(routes):
    """How many layers are big in those of the routes that are patterns without skip."""
    return [route.count("B") for route in routes if set(route) == {"B", "s"}]


def test_a_cell_keeps_its_id():
    whole = Grid(("big", "random"), ("auto", "dense"), (grid.STORED, 4), (8,), (16,), (2,), (0, 32))
    groups = whole.groups("bfloat16", peer=True)
    assert [[cell.id for cell in group] for group in (groups[0], groups[-1])] == [
        [
            "duo-mlx big auto bfloat16 p8 g16 b2 c0",
            "duo-mlx big dense bfloat16 p8 g16 b2 c0",
            "duo-mlx random auto bfloat16 p8 g16 b2 c0",
            "duo-mlx random dense bfloat16 p8 g16 b2 c0",
            "mlx-lm big auto bfloat16 p8 g16 b2 c0",
        ],
        [
            *(
                f"duo-mlx {route} {strategy} 4-bit p8 g16 b2 c32"
                for route in ("big", "small", "skip")
                for strategy in ("auto", "dense")
            ),
            "mlx-lm big auto 4-bit p8 g16 b2 c32",
        ],
    ]
    assert [group[0].positions for group in groups] == [24, 56] * 2


def test_drafts_are_cells_of_single_sequences_beside_what_verifies():
    drafted = Grid(
        ("router", "Bs-B", "big"), ("dense", "auto"), batches=(1, 4), contexts=(0, 32), drafts=("-s-B", "small")
    )
    ids = [[cell.id for cell in group if cell.speculate] for group in drafted.groups("float32", peer=True)]
    single = [
        [f"duo-mlx {route} auto float32 p64 g32 b1 c{context} speculate {draft} auto" for draft in ("-s-B", "small")]
        for context, route in ((0, "Bs-B"), (32, "big"))
    ]
    assert ids == [*single, [], []]
    group = drafted.groups("float32", peer=True)[0]
    assert [cell.speculate for cell in group[-3:]] == ["-s-B", "small", ""] and group[-1].engine == "mlx-lm"
    fixed = Grid(("big",), drafts=("small",), draft_tokens="3").groups("float32", peer=False)
    assert [cell.id for group in fixed for cell in group][1:] == [
        "duo-mlx big auto float32 p64 g32 b1 c0 speculate small 3"
    ]
    assert len(Grid(("router", "router:0.5"), drafts=("small",)).groups("float32", peer=False)[0]) == 2


def test_presets_draft_as_the_model_does(args):
    def drafts(name, **changes):
        made = grid.preset(name, args(**changes))
        return {cell.speculate for group in made.groups("float32", peer=False) for cell in group} - {""}

    assert [drafts(name, default_draft="Bss-") for name in PRESETS] == [set(), {"Bss-"}, {"Bss-"}]
    assert drafts("paper") == set()


@pytest.mark.parametrize(("made", "line"), [
    ({"batches": (2, 4)}, "--speculate small: speculation is measured one sequence at a time; add --batch 1"),
    ({"routes": ("router", "router:0.5")}, "--speculate small: a router cannot verify; add a route that is known"),
    ({"deep_routes": ("router",)}, "--speculate small: a router cannot verify"),
])  # fmt: skip
def test_drafts_without_a_cell_are_refused(made, line):
    with pytest.raises(DuoError, match=re.escape(line)):
        grid.check_drafts(Grid(**{"routes": ("big",), "drafts": ("small",)} | made))
    grid.check_drafts(Grid(("big",), drafts=("small",)))


def test_bits_that_the_model_is_stored_in_are_measured_once():
    groups = Grid(("big",), bits=(grid.STORED, 8, 8)).groups("8-bit", peer=False)
    assert [cell.id for group in groups for cell in group] == ["duo-mlx big auto 8-bit p64 g32 b1 c0"]


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_presets_fit_the_model_and_name_routes_that_it_has(tiny_model, shape, preset, peer):
    model = tiny_model(**SHAPES[shape])
    found = grid.preset(preset, model.config)
    assert found.groups("float32", peer) == grid.preset(preset, model.config).groups("float32", peer)
    assert len(set(found.routes)) == len(found.routes)
    for route in (*found.routes, *found.deep_routes):
        policy_of(model, route)
    groups = found.groups("float32", peer)
    grid.check(groups, model.config)
    ids = [cell.id for group in groups for cell in group]
    assert len(set(ids)) == len(ids)
    for group in groups:
        assert len({(cell.quantisation, cell.prompt_tokens, cell.batch, cell.context) for cell in group}) == 1
        assert (group[0].engine, group[0].route, group[0].strategy) == ("duo-mlx", "big", "auto")
        assert [cell.engine for cell in group] == ["duo-mlx"] * (len(group) - peer) + ["mlx-lm"] * peer
    assert ("router" in found.routes) == bool(model.config.router_choices)
    assert groups[0][0].context == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_the_embedded_model(preset):
    args = ModelArgs.from_dict(json.loads((checkpoint.EMBEDDED / "config.json").read_text()))
    found = grid.preset(preset, args)
    grid.check(found.groups("float32", peer=True), args)
    assert {"quick": (0,), "paper": (0, 256), "full": (0,)}[preset] == found.contexts


def test_a_router_is_measured_at_the_shares_within_its_reach(args):
    def routes(**changes):
        return [route for route in grid.preset("paper", args(**changes)).routes if route.startswith("router")]

    reach = [[0.1, -1.0], [0.6, 1.0]]
    assert routes(router_choices="sB", router_offsets=reach) == ["router", "router:0.25", "router:0.5"]
    assert routes(router_choices="sB") == ["router"] and routes() == []


def test_paper_spends_every_number_of_big_layers_where_there_are_few(args):
    routes = grid.preset("paper", args(num_hidden_layers=12)).routes
    assert routes[0] == "big" and routes[12:14] == ("small", "skip")
    assert bigs(routes[1:12]) == list(range(11, 0, -1))
    assert routes[14:] == ("B-" * 6, "Bs-" * 4, "random:0.5,0.5,0", "random:0.5,0.25,0.25")


def test_paper_spreads_numbers_and_layers_evenly_where_there_are_many(args):
    routes = grid.preset("paper", args(num_hidden_layers=30)).routes
    counts = [30, *bigs(routes[1:12]), 0]
    assert routes[0] == "big" and routes[12] == "small"
    assert {a - b for a, b in pairwise(counts)} == {2, 3}
    for route in routes[1:12]:
        places = [layer for layer, letter in enumerate(route) if letter == "B"]
        gaps = {b - a for a, b in pairwise(places)}
        assert max(gaps) - min(gaps) <= 1 and (places[0], places[-1]) == (0, 29)


def test_budgets_are_those_that_the_model_knows_a_pattern_for(args):
    def budgets(**changes):
        routes = grid.preset("paper", args(num_hidden_layers=12, **changes)).routes
        return [route for route in routes if route.startswith("budget")]

    assert budgets() == []
    assert budgets(best_patterns=FALLING) == ["budget:9", "budget:6", "budget:3"]
    assert budgets(best_patterns=FALLING[:5]) == ["budget:9"]  # of 8 big layers and more
    assert budgets(best_patterns=FALLING, small_layers=[0, 1, 2, 3]) == ["budget:9"]  # small is big in eight


@pytest.mark.parametrize(
    ("changes", "paper", "full", "prompts"),
    [
        ({}, (0, 256, 1024, 4096), (0, 256, 1024, 4096), (64, 256)),
        ({"max_position_embeddings": 4096 + 96}, (0, 256, 1024, 4096), (0, 256, 1024), (64, 256)),
        ({"max_position_embeddings": 4096 + 95}, (0, 256, 1024), (0, 256, 1024), (64, 256)),
        ({"max_position_embeddings": 287}, (0,), (0,), (64,)),
        ({"max_position_embeddings": 352}, (0, 256), (0,), (64, 256)),
        (SHAPES["sliding"], (0, 256), (0,), (64, 256)),
    ],
)
def test_presets_go_as_deep_as_there_is_room(args, changes, paper, full, prompts):
    made, window = args(**changes), changes.get("sliding_window")
    assert grid.preset("paper", made, window).contexts == paper
    deep = grid.preset("full", made, window)
    assert (deep.contexts, deep.prompts) == (full, prompts)


def test_full_is_the_papers_question_in_more_ways(args):
    paper, full = (grid.preset(name, args()) for name in ("paper", "full"))
    assert full.routes == paper.routes
    assert (full.strategies, full.bits, full.batches) == (("auto", "dense"), (grid.STORED, 8, 4), (1, 4))


def test_cells_without_room_are_refused(args):
    def refused(made, **sizes):
        with pytest.raises(DuoError) as caught:
            grid.check(Grid(("big",), **sizes).groups("float32", peer=False), args(**made), made.get("sliding_window"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    limited = {"max_position_embeddings": 100}
    grid.check(Grid(("big",), prompts=(68,)).groups("float32", peer=True), args(**limited))
    message = refused(limited, prompts=(8, 69))
    assert "--prompt-tokens 69" in message and "101 positions; the model has 100" in message
    assert "with 61 tokens of context" in refused(limited, prompts=(8,), contexts=(0, 61))
    sliding = {"layer_types": ["sliding_attention"] * 4, "sliding_window": 100}
    grid.check(Grid(("big",), prompts=(68,)).groups("float32", peer=True), args(**sliding), 100)
    assert "101 positions: this model's attention slides over 100" in refused(sliding, prompts=(69,))
