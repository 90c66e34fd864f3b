"""Routers' training: each objective against what it is defined to be, PyTorch and NumPy."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten

from duo_mlx import checkpoint, threshold
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.errors import DuoError
from duo_mlx.routed import RoutedModel, ask
from duo_mlx.router import Recorder
from duo_mlx.routes import LETTERS
from duo_mlx.training import calibration
from duo_mlx.training.gains import Gains
from duo_mlx.training.labels import Labels
from duo_mlx.training.mixture import WEIGHTS, Mixture
from duo_mlx.training.passes import Passes, cross_entropy

LAYERS = 4
RANDOM = np.random.default_rng(5)
INPUTS = RANDOM.integers(2, 30, (6, 12))


def common(choices="sB", budget=0.5, **passes):
    return tuple(LETTERS.index(letter) for letter in choices), LAYERS, budget, 0, Passes(**passes)


def mixture(choices="sB", weights="soft", steps=20, alpha=2.0, temperatures=(1.0, 0.25), **more):
    return Mixture(*common(choices, **more), steps, alpha, temperatures, weights)


def labels(choices="sB", inputs=INPUTS, routes=None):
    routes = RANDOM.integers(1, 3, (*inputs.shape, LAYERS)).astype(np.uint8) if routes is None else routes
    return Labels(*common(choices), inputs, routes)


STAGES = {
    "soft": mixture(),
    "straight-through": mixture(weights="straight-through"),
    "gumbel": mixture("-sB", weights="gumbel"),
    "text": Gains(*common(), "text"),
    "big": Gains(*common("-B"), "big"),
    "explored": Gains(*common("-sB"), "text", 0.4),
    "labels": labels(),
}
CASES = {name: (stage, False) for name, stage in STAGES.items()}
CASES |= {f"{name} ahead": (STAGES[name], True) for name in ("text", "big", "labels")}


@pytest.fixture
def routed(trainer):
    """``routed(stage, **changes)``: a trainer of a model with routers that is the test's own, and its first state."""

    def make(stage, **changes):
        choices = "".join(LETTERS[choice] for choice in stage.choices)
        return trainer(stage, router_choices=choices, router_bias=True, **changes)

    return make


@pytest.mark.parametrize(("stage", "ahead"), CASES.values(), ids=CASES)
def test_nothing_but_routers_changes_and_the_loss_falls(routed, settings, stage, ahead):
    trained, state = routed(stage, settings=settings(decay=0.0), router_looks_ahead=ahead)
    before = {name: np.array(each) for name, each in checkpoint.parameters(trained.model).items()}
    assert len(state.moments.learned) == 2 * LAYERS
    windows, drawn = trained.batch(0)
    losses = []
    for _ in range(2):
        losses.append(float(trained.gradients(state.moments.learned, windows, drawn)[0]))
        for _ in range(20):
            state, _ = trained.step(state)
    found = trained.validate(state.moments.learned, trained.spread(4))
    assert list(found) == list(stage.columns) and set(stage.text_losses) <= set(stage.columns)
    assert losses[1] < losses[0]
    for name, each in checkpoint.parameters(trained.model).items():
        assert np.array_equal(np.array(each), before[name]) != (".mlp.router." in name), name


@pytest.mark.parametrize(("stage", "ahead"), CASES.values(), ids=CASES)
def test_a_batch_may_be_cut(routed, stage, ahead):
    trained, _ = routed(stage, router_looks_ahead=ahead)
    windows, drawn = trained.batch(3)
    whole = np.array(stage.loss(trained.model, mx.array(windows), drawn))
    parts = []
    for row in range(len(windows)):
        one = {name: each[row : row + 1] for name, each in drawn.items()}
        parts.append(np.array(stage.loss(trained.model, mx.array(windows[row : row + 1]), one)))
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=2e-5)


# --- mixtures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["ffn", "layer"])
@pytest.mark.parametrize("choices", ["sB", "-B", "-sB"])
def test_a_mixture_and_its_gradient_are_pytorchs(routed, tiny_config, choices, scope):
    """The paper's mixture, written once more over the layers of the PyTorch reference."""
    stage = mixture(choices)
    trained, state = routed(stage, skip_scope=scope)
    windows, drawn = trained.batch(7)
    weights = {name: np.array(each) for name, each in checkpoint.parameters(trained.model).items()}
    config = DuoConfig.from_dict(tiny_config(router_choices=choices, router_bias=True, skip_scope=scope))
    reference = DuoModel(config)
    loaded = reference.load_state_dict({name: torch.tensor(each) for name, each in weights.items()}, strict=False)
    assert set(loaded.missing_keys) <= {"lm_head.weight"} and not loaded.unexpected_keys
    tokens, targets = torch.tensor(windows[:, :-1].astype(np.int64)), torch.tensor(windows[:, 1:].astype(np.int64))
    x, shares = reference.model.embed_tokens(tokens), []
    angles = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None] * reference.frequencies
    temperature = torch.tensor(drawn["temperature"])[:, None, None]
    for layer in reference.model.layers:
        normed = layer.input_layernorm(x)
        attended = layer.self_attn(normed, angles)
        if scope == "layer":
            shared = torch.softmax(layer.mlp.router(normed) / temperature, -1)
            if "-" in choices:
                attended = attended * (1 - shared[..., [choices.index("-")]])
        h = x + attended
        normed = layer.post_attention_layernorm(h)
        if scope == "ffn":
            shared = torch.softmax(layer.mlp.router(normed) / temperature, -1)
        out = shared[..., [choices.index("B")]] * layer.mlp.big(normed)
        if "s" in choices:
            out = out + shared[..., [choices.index("s")]] * layer.mlp.small(normed)
        x = h + out
        shares.append(shared[..., choices.index("B")].mean(-1))
    x = reference.model.norm(x)
    head = reference.model.embed_tokens.weight if config.tie_word_embeddings else reference.lm_head.weight
    losses = torch.nn.functional.cross_entropy((x @ head.T).transpose(1, 2), targets, reduction="none").mean(-1)
    losses = losses + 2.0 * (torch.stack(shares).mean(0) - 0.5) ** 2
    losses.mean().backward()
    ours = np.array(stage.loss(trained.model, mx.array(windows), drawn))
    np.testing.assert_allclose(ours, losses.detach(), atol=1e-4)
    _, gradients = trained.gradients(state.moments.learned, windows, drawn)
    theirs = dict(reference.named_parameters())
    for name, each in gradients.items():
        np.testing.assert_allclose(np.array(each), theirs[name].grad.numpy(), atol=1e-4)
        assert np.abs(np.array(each)).max() > 1e-6, name


def test_the_temperature_falls_from_the_first_to_the_last():
    stage = mixture(steps=5, temperatures=(2.0, 0.125))
    found = [float(stage.draw(np.random.default_rng(0), 8, step)["temperature"]) for step in range(5)]
    assert found == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.125])


@pytest.mark.parametrize("choices", ["sB", "-sB"])
def test_straight_through_computes_what_the_router_decides(routed, choices):
    stage = mixture(choices, "straight-through", alpha=0.0)
    trained, state = routed(stage)
    windows, drawn = trained.batch(1)
    by_routes = cross_entropy(
        trained.model(mx.array(windows[:, :-1]), routes=trained.model.router()), mx.array(windows[:, 1:])
    )
    np.testing.assert_allclose(
        np.array(stage.loss(trained.model, mx.array(windows), drawn)), np.array(by_routes), atol=1e-4
    )
    _, gradients = trained.gradients(state.moments.learned, windows, drawn)
    assert all(np.abs(np.array(each)).max() > 0 for each in gradients.values())


def test_gumbel_takes_routes_as_often_as_they_are_likely(routed):
    """With noise the likeliest of two is not always taken: its share is the softmax of the logits at temperature 1."""
    stage = mixture(weights="gumbel", temperatures=(1.0, 1.0), alpha=0.0)
    trained, _ = routed(stage)
    windows = trained.batch(0)[0][:1]
    taken, likely = [], []

    def watch(model, tokens, choices, weigh):
        x = mx.array(RANDOM.standard_normal((1, 400, 16)).astype(np.float32))
        taken.append(np.array(weigh(model.ffns[0], x)[0]))
        likely.append(np.array(mx.softmax(model.router().logits(0, x), axis=-1)))
        return Passes.mixture(stage.passes, model, tokens, choices, weigh)

    class Watched(Passes):
        mixture = staticmethod(watch)

    watched = mixture(weights="gumbel", temperatures=(1.0, 1.0), alpha=0.0)
    object.__setattr__(watched, "passes", Watched())
    for step in range(30):
        drawn = {name: each[None] for name, each in watched.draw(np.random.default_rng(step), 8, step).items()}
        watched.loss(trained.model, mx.array(windows), drawn)
    found, expected = np.concatenate(taken, 1)[..., 1], np.concatenate(likely, 1)[..., 1]
    assert set(np.round(np.unique(found), 5)) <= {0.0, 1.0}
    error = np.sqrt((expected * (1 - expected)).mean() / found.size)
    assert abs(found.mean() - expected.mean()) < 5 * error and 0.05 < expected.mean() < 0.95


@pytest.mark.parametrize("weights", WEIGHTS)
def test_recomputing_layers_changes_nothing(routed, weights):
    results = []
    for recompute in (False, True):
        stage = mixture(weights=weights, recompute=recompute)
        trained, state = routed(stage)
        loss, gradients = trained.gradients(state.moments.learned, *trained.batch(2))
        results.append([np.array(loss), *map(np.array, gradients.values())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_budget_draws_the_share_of_big(routed, settings):
    """With a large alpha the soft share is the budget's, whatever the text wants."""
    for budget in (0.2, 0.8):
        stage = mixture(alpha=1000.0, budget=budget, temperatures=(1.0, 1.0))
        trained, state = routed(stage, settings=settings(decay=0.0))
        for _ in range(20):
            state, _ = trained.step(state)
        found = trained.validate(state.moments.learned, trained.spread(4))
        assert found["soft_share"] == pytest.approx(budget, abs=0.06)


# --- gains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["text", "big"])
def test_what_gains_are_fitted_to(routed, target):
    """The difference of two passes' losses, and the router's logits of the routes that they took."""
    stage = Gains(*common(), target)
    trained, _ = routed(stage)
    model = trained.model
    windows, drawn = trained.batch(4)
    tokens = mx.array(windows[:, :-1])
    weights = np.array(mx.softmax(model(tokens, routes=[2] * LAYERS), axis=-1))
    losses, sums = [], []
    for which in range(2):
        routes, seen = drawn["routes"][:, which], []

        class Seeing(Recorder):
            def decide(self, layer, x, in_one_kernel=False, routes=routes, seen=seen):  # noqa: ARG002
                seen.append(np.array(self.router.logits(layer, x)))
                return mx.array(routes[..., layer])

        logits = np.array(model(tokens, routes=Seeing(model.router()), strategy="dense"), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        true = np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
        losses.append(-true if target == "text" else -(weights * logits).sum(-1))
        said = [np.take_along_axis(each, routes[..., layer, None] - 1, -1)[..., 0] for layer, each in enumerate(seen)]
        sums.append(np.sum(said, axis=0))
    expected = np.square((losses[1] - losses[0]) - (sums[0] - sums[1])).mean(-1)
    np.testing.assert_allclose(np.array(stage.loss(model, mx.array(windows), drawn)), expected, rtol=1e-3)
    found = stage.measure(model, mx.array(windows), 0)
    assert np.array(found["explained"]).max() <= 1


def test_what_is_not_explored_is_the_routers_own(routed):
    """Of each sequence, the largest gains take big, as many as the budget allows."""
    stage = Gains(*common("-sB", budget=0.3), "text", explore=0.25)
    trained, _ = routed(stage)
    windows, drawn = trained.batch(2)
    found = stage.chosen(trained.model, mx.array(windows), drawn)
    _, said = ask(trained.model, mx.array(windows[:, :-1]), drawn["routes"][:, 0])
    said = np.array(said)
    explored = drawn["explored"]
    assert abs(explored.mean() - 0.25) < 0.05
    for row, each in enumerate(said):
        gains, flat = each[..., 2] - each[..., :2].max(axis=-1), found[row]
        count = gains.size - int(0.7 * gains.size)
        big = np.zeros(gains.size, bool)
        big[np.argsort(-gains, axis=None)[:count]] = True
        own = np.where(big.reshape(gains.shape), 2, each[..., :2].argmax(axis=-1))
        np.testing.assert_array_equal(flat, np.where(explored[row], drawn["routes"][row], own))


def test_two_passes_differ_in_half_of_all_layers_at_a_budget_of_a_half():
    drawn = Gains(*common(), "text").draw(np.random.default_rng(0), 2000, 0)["routes"]
    assert (drawn == 2).mean() == pytest.approx(0.5, abs=0.02)
    assert (drawn[0] != drawn[1]).mean() == pytest.approx(0.5, abs=0.02)
    three = Gains(*common("-sB", budget=0.2), "text").draw(np.random.default_rng(0), 2000, 0)["routes"]
    assert [(three == route).mean() for route in range(3)] == pytest.approx([0.4, 0.4, 0.2], abs=0.02)


# --- labels ------------------------------------------------------------------------------------------------------


def test_labels_that_a_router_made_are_learnt(routed, settings, tiny_model):
    """An oracle that is a router itself: all of its choices can be told from what a router sees."""
    teacher = tiny_model(seed=9, router_choices="sB", router_bias=True)
    inputs = np.random.default_rng(1).integers(2, 30, (40, 12))
    own = routed(labels())[0].model
    routers = [(name, each) for name, each in checkpoint.parameters(teacher).items() if ".router." in name]
    own.update(tree_unflatten(routers))
    recorder = Recorder(own.router())
    mx.eval(own(mx.array(inputs), routes=recorder))
    routes = np.stack([np.array(each) for each in recorder.taken], axis=-1).astype(np.uint8)
    assert 0.1 < (routes == 2).mean() < 0.9
    trained, state = routed(labels(inputs=inputs, routes=routes), settings=settings(decay=0.0))
    before = trained.validate(state.moments.learned, trained.spread(4))
    for _ in range(3):
        for step in range(20):
            state, _ = trained.step(state if step else type(state)(0, state.moments))
    after = trained.validate(state.moments.learned, trained.spread(4))
    assert after["agreement"] > max(0.85, before["agreement"] + 0.1)
    assert after["label_loss"] < before["label_loss"] / 1.5


def test_routes_that_a_router_cannot_take_are_refused():
    with pytest.raises(DuoError, match="the oracle took -, which this router cannot; give --choices"):
        labels(routes=RANDOM.integers(0, 3, (*INPUTS.shape, LAYERS)).astype(np.uint8))


# --- thresholds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True], ids=["in layers", "ahead"])
@pytest.mark.parametrize("choices", ["sB", "-B", "-sB"])
def test_a_share_is_realised_by_the_curve(tiny_model, choices, ahead):
    model = tiny_model(seed=2, router_choices=choices, router_bias=True, router_looks_ahead=ahead)
    windows = np.random.default_rng(0).integers(0, 32, (8, 64))
    found = calibration.curve(model, windows)
    shares, moved = np.array(found).T
    assert (np.diff(shares) > 0).all() and (np.diff(moved) > 0).all() and len(found) > 12
    model.config.__dict__["router_offsets"] = tuple(found)
    try:
        for wanted in (0.25, 0.5, 0.7):
            routed = RoutedModel(model, model.router(threshold.offsets(model.config, f"router:{wanted}")))
            mx.eval(routed(mx.array(windows)))
            assert (routed.taken(0, 64, 8) == 2).mean() == pytest.approx(wanted, abs=0.02)
    finally:
        model.config.__dict__["router_offsets"] = ()


def test_biases_settle_where_the_budget_is_met(routed):
    trained, state = routed(Gains(*common(), "text"))
    windows = np.random.default_rng(0).integers(0, 32, (8, 64)).astype(np.int32)
    kept, follows = calibration.settle((1, 2), 0.3)(trained.model, state.moments.learned, windows)
    trained.use(kept)
    recorder = Recorder(trained.model.router())
    mx.eval(trained.model(mx.array(windows), routes=recorder))
    assert np.mean([np.array(each) == 2 for each in recorder.taken]) == pytest.approx(0.3, abs=0.02)
    shares, moved = np.array(follows["router_offsets"]).T
    assert np.interp(0.3, shares, moved) == pytest.approx(0, abs=1e-3)
    for name, each in kept.items():
        assert np.array_equal(np.array(each), np.array(state.moments.learned[name])) != name.endswith(".bias")


def test_without_a_budget_biases_stay(routed):
    trained, state = routed(mixture())
    windows = np.random.default_rng(0).integers(0, 32, (2, 32)).astype(np.int32)
    kept, follows = calibration.settle((1, 2), None)(trained.model, state.moments.learned, windows)
    assert kept is state.moments.learned and len(follows["router_offsets"]) > 5


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("router:2", "comes a share of big from 0 to 1"),
        ("router:half", "comes a share of big from 0 to 1"),
        ("router:nan", "comes a share of big from 0 to 1"),
        ("router:0.9", "was measured from 0.20 to 0.80 of big; for none or all of it use small or big"),
    ],
)
def test_shares_that_cannot_be_had(tiny_config, spec, line):
    from duo_mlx.model import ModelArgs

    args = ModelArgs.from_dict(tiny_config(router_choices="sB", router_offsets=[[0.2, -1], [0.8, 1]]))
    with pytest.raises(DuoError, match=line):
        threshold.offsets(args, spec)
    assert np.array(threshold.offsets(args, "router:0.65")) == pytest.approx([0, 0.5])


@pytest.mark.parametrize("given", ["x", [1], [[0.1, 1], [0.1, 2]], [[0.1, 2], [0.2, 1]], [[0.1, 1], [1.2, 2]]])
def test_offsets_that_are_none(tiny_config, given):
    from duo_mlx.model import ModelArgs

    with pytest.raises(DuoError, match="config.json: router_offsets must be a list of pairs"):
        ModelArgs.from_dict(tiny_config(router_choices="sB", router_offsets=given))
