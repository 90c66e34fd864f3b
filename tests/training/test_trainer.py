"""The loop and its passes: against PyTorch step by step, and however a batch is cut, the same steps."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from duo_mlx import checkpoint
from duo_mlx.convert import reference as reference_module
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.errors import DuoError
from duo_mlx.processes import Processes
from duo_mlx.training.optimizer import Schedule
from duo_mlx.training.passes import Passes
from duo_mlx.training.routing import RandomRouting
from duo_mlx.training.trainer import LossError, Trainer

LAYERS = 4  # of a tiny model
STAGE = RandomRouting(LAYERS, 0.5, 0.3, 0.2, whole_big=0.1)


@pytest.fixture(autouse=True)
def _one_thread():
    """PyTorch's threads wait for one another longer than tiny models take, where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps(trainer, state, count):
    """The state after ``count`` steps, and their losses."""
    losses = []
    for _ in range(count):
        state, loss = trainer.step(state)
        losses.append(loss)
    return state, losses


def assert_close(state, other, atol):
    for name, each in state.moments.learned.items():
        np.testing.assert_allclose(
            np.array(each), np.array(other.moments.learned[name]), rtol=0, atol=atol, err_msg=name
        )


def twin(trainer, config):
    """The PyTorch reference with the same weights, and AdamW as examples/train_pytorch.py sets it up."""
    model = DuoModel(DuoConfig.from_dict(config))
    weights = checkpoint.parameters(trainer.model)
    model.load_state_dict({name: torch.from_numpy(np.array(each)) for name, each in weights.items()})
    of, parameters = trainer.settings, list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": of.decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))


def torch_step(model, optimizer, trainer, step):
    windows, drawn = trainer.batch(step)
    tokens = torch.from_numpy(windows.astype(np.int64))
    logits = model(tokens[:, :-1], torch.from_numpy(drawn["routes"].astype(np.int64)))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for group in optimizer.param_groups:
        group["lr"] = trainer.settings.schedule.rate(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.settings.clip)
    optimizer.step()
    return loss.item(), norm.item()


@pytest.mark.parametrize(
    "changes",
    [{}, {"skip_scope": "layer", "small_layers": [1, 3], "small_bias": True, "tie_word_embeddings": False}],
    ids=["plain", "all else"],
)
def test_twenty_steps_are_those_of_pytorch(trainer, tiny_config, changes):
    trained, state = trainer(STAGE, **changes)
    model, optimizer = twin(trained, tiny_config(**changes))
    norms = []
    for step in range(20):
        expected, norm = torch_step(model, optimizer, trained, step)
        state, loss = trained.step(state)
        assert loss == pytest.approx(expected, abs=1e-4), step
        norms.append(norm)
    assert min(norms) > 1.0  # so that all of them were clipped
    for name, parameter in model.named_parameters():
        found = np.array(state.moments.learned[name])
        np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=0, atol=1e-3, err_msg=name)


def test_gradients_that_are_small_enough_are_not_clipped(trainer, settings, tiny_config):
    trained, state = trainer(STAGE, settings(clip=1e3))
    model, optimizer = twin(trained, tiny_config())
    expected = [torch_step(model, optimizer, trained, step)[0] for step in range(4)]
    assert steps(trained, state, 4)[1] == pytest.approx(expected, abs=1e-4)


def test_dropout_is_the_reference_s(trainer, tiny_config, monkeypatch):
    """Both branches of every layer lose what the keys say, and the rest grows: in PyTorch by the same masks."""
    rate = 0.4
    stage = RandomRouting(LAYERS, 0.5, 0.3, 0.2, passes=Passes(dropout=rate))
    for scope in ("ffn", "layer"):
        trained, _ = trainer(stage, skip_scope=scope)
        windows, drawn = trained.batch(0)
        shape = (windows.shape[1] - 1, tiny_config()["hidden_size"])
        masks = [
            np.stack([np.array(mx.random.bernoulli(1 - rate, shape, mx.array(row))) for row in keys])
            for layer in range(LAYERS)
            for keys in (drawn["keys"][:, layer, branch] for branch in range(2))
        ]
        left = iter(masks)
        dropped = SimpleNamespace(**vars(F))
        dropped.dropout = lambda x, p, _, left=left: x * torch.from_numpy(next(left)) / (1 - p)
        monkeypatch.setattr(reference_module, "F", dropped)
        model, _ = twin(trained, tiny_config(skip_scope=scope))
        for layer in model.model.layers:
            layer.dropout = rate
        tokens, routes = (torch.from_numpy(each.astype(np.int64)) for each in (windows, drawn["routes"]))
        with torch.no_grad():
            expected = model(tokens[:, :-1], routes).numpy()
        found = stage.passes.logits(trained.model, mx.array(windows[:, :-1]), drawn["routes"], drawn["keys"])
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-4)
        assert not list(left)
        kept = np.mean(masks)
        assert kept == pytest.approx(1 - rate, abs=0.05)


DROPPING = RandomRouting(LAYERS, 0.5, 0.3, 0.2, passes=Passes(dropout=0.3))


def test_two_halves_are_the_step_of_the_whole(trainer, settings):
    schedule = Schedule(20, 1e-3, 0.1, 4)
    whole, two = (trainer(DROPPING, settings(accumulate=parts, schedule=schedule)) for parts in (1, 2))
    (state, losses), (other, others) = (steps(*each, 3) for each in (whole, two))
    assert losses == pytest.approx(others, abs=1e-6)
    assert_close(state, other, 1e-6)
    gradients = [of.gradients(first.moments.learned, *of.batch(0))[1] for of, first in (whole, two)]
    for name, each in gradients[0].items():
        np.testing.assert_allclose(np.array(each), np.array(gradients[1][name]), rtol=0, atol=1e-6, err_msg=name)


def test_layers_that_are_computed_twice_give_the_same_losses(trainer):
    again = RandomRouting(LAYERS, 0.5, 0.3, 0.2, passes=Passes(dropout=0.3, recompute=True))
    (state, losses), (other, others) = (steps(*trainer(stage), 3) for stage in (DROPPING, again))
    assert losses == others
    assert_close(state, other, 1e-6)


def test_recomputing_takes_less_memory(trainer, settings):
    peaks = []
    for recompute in (False, True):
        stage = RandomRouting(8, passes=Passes(recompute=recompute))
        trained, state = trainer(stage, settings(batch=64, length=60), intermediate_size=256, num_hidden_layers=8)
        windows, drawn = trained.batch(0)
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(trained.gradients(state.moments.learned, windows, drawn))
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.6 * peaks[0]


def test_bfloat16_computes_in_halves_and_keeps_float32(trainer, settings):
    stage = RandomRouting(LAYERS, 0.5, 0.3, 0.2)
    (_, exact), (state, rounded) = (
        steps(*trainer(stage, settings(dtype=dtype)), 3) for dtype in (mx.float32, mx.bfloat16)
    )
    assert rounded == pytest.approx(exact, abs=0.03) and rounded != exact
    assert all(each.dtype == mx.float32 for each in state.moments.arrays())
    trained, state = trainer(stage, settings(dtype=mx.bfloat16))
    trained.validate(state.moments.learned, trained.spread(2))
    assert trained.model.model.norm.weight.dtype == mx.bfloat16


def test_a_step_is_the_same_whatever_came_before(trainer):
    trained, state = trainer(DROPPING)
    third = steps(trained, state, 3)[0]
    trained.validate(third.moments.learned, trained.spread(4))
    again, _ = trainer(DROPPING)
    (one, loss), (two, other) = trained.step(third), again.step(third)
    assert loss == other
    assert all(mx.array_equal(each, two.moments.learned[name]) for name, each in one.moments.learned.items())


def test_what_a_step_draws_depends_on_seed_step_and_place(trainer, settings):
    trained, _ = trainer(DROPPING)
    windows, drawn = trained.batch(5)
    assert windows.shape == (4, 13) and drawn["routes"].shape == (4, 12, LAYERS) and drawn["keys"].shape == (4, 4, 2, 2)
    text = trained.data.train.tolist()
    assert all(any(text[at : at + 13] == row.tolist() for at in range(len(text))) for row in windows)
    first_two = trainer(DROPPING, settings(batch=2))[0].batch(5)
    assert np.array_equal(first_two[0], windows[:2])
    assert all(np.array_equal(first_two[1][name], each[:2]) for name, each in drawn.items())
    for other in (trained.batch(6), trainer(DROPPING, settings(seed=4))[0].batch(5)):
        assert not np.array_equal(other[0], windows)
        assert not any(np.array_equal(other[1][name], each) for name, each in drawn.items())
    assert len({row.tobytes() for row in drawn["routes"]}) == 4


def test_routes_have_their_probabilities_and_whole_sequences_of_big():
    stage = RandomRouting(6, 0.6, 0.3, 0.1, whole_big=0.25)
    random = np.random.default_rng(0)
    routes = np.stack([stage.draw(random, 50, 0)["routes"] for _ in range(200)])
    whole = (routes == 2).all(axis=(1, 2))
    assert whole.mean() == pytest.approx(0.25, abs=0.08)
    shares = [(routes[~whole] == route).mean() for route in range(3)]
    assert shares == pytest.approx([0.1, 0.3, 0.6], abs=0.01)


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        (RandomRouting(LAYERS, 1.0, 0.0, 0.0), ".mlp.small."),
        (RandomRouting(LAYERS, 0.0, 1.0, 0.0), ".mlp.big."),
        (RandomRouting(LAYERS, 0.5, 0.5, 0.0), ".mlp.router."),
        (RandomRouting(LAYERS, 0.0, 1.0, 0.0, whole_big=0.5), ".mlp.router."),
    ],
)
def test_what_no_route_leads_to_stays(trainer, stage, left):
    trained, state = trainer(stage, router_choices="sB")
    names = checkpoint.parameters(trained.model)
    assert {name for name in names if name not in state.moments.learned} == {
        name for name in names if left in name or ".mlp.router." in name
    }
    before = {name: np.array(each) for name, each in names.items()}
    state, _ = steps(trained, state, 2)
    for name, each in state.moments.learned.items():
        assert not np.array_equal(np.array(each), before[name]), name


@pytest.mark.parametrize("windows", [1, 3, 7])
def test_validation_is_the_mean_over_windows_by_route(trainer, tiny_config, windows):
    trained, state = trainer(STAGE)
    starts = trained.spread(windows)
    found = trained.validate(state.moments.learned, starts)
    model, _ = twin(trained, tiny_config())
    for name, pattern in {"big": 2, "small": 1, "skip": 0}.items():
        tokens = torch.from_numpy(np.stack([trained.data.held_out[at : at + 13] for at in starts]).astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[:, :-1], torch.full((LAYERS,), pattern))
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert found[name] == pytest.approx(expected, abs=1e-5)
    assert min(found.values()) < found["random"] < max(found.values())
    assert found == trained.validate(state.moments.learned, starts)


def test_windows_of_validation_do_not_cross_texts_and_are_spread(trainer):
    trained, _ = trainer(STAGE)
    assert trained.starts.tolist() == [0, 12, 24, 36, 60, 72, 84]
    assert trained.spread(3).tolist() == [0, 36, 84] and len(trained.spread(100)) == 7


def example():
    file = Path(__file__).parents[2] / "examples" / "train_pytorch.py"
    spec = importlib.util.spec_from_file_location("train_pytorch", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("warmup", [0, 3, 10, 30])
def test_the_learning_rate_is_the_example_s(warmup):
    args = SimpleNamespace(lr=2e-3, final_lr=0.02, warmup=warmup)
    schedule = Schedule(10, args.lr, args.final_lr, warmup)
    expected = [example().learning_rate(step, 10, args) for step in range(10)]
    assert [schedule.rate(step) for step in range(10)] == pytest.approx(expected, rel=1e-12)


def test_rows_and_states_are_kept_at_validations_and_at_the_end(trainer):
    trained, state = trainer(STAGE)
    kept = []
    end = trained.run(state, 12, lambda state, row: kept.append((state, row)))
    assert [row["step"] for _, row in kept] == ["5", "10", "12"] and end.step == 12
    assert all(list(row) == trained.columns for _, row in kept)
    _, losses = steps(trained, state, 12)
    means = [float(np.mean(losses[start:stop])) for start, stop in ((0, 5), (5, 10), (10, 12))]
    assert [float(row["train_loss"]) for _, row in kept] == pytest.approx(means, abs=1e-4)
    assert [row["tokens"] for _, row in kept] == ["240", "480", "576"]


class Broken(RandomRouting):
    """Whose loss is no number in step 3."""

    def draw(self, random, length, step):
        return super().draw(random, length, step) | {"bad": np.float32(math.nan if step == 2 else 0)}

    def loss(self, model, windows, drawn):
        return super().loss(model, windows, drawn) + mx.array(drawn["bad"])


def test_a_loss_that_is_no_number_stops_before_its_step(trainer, settings):
    trained, state = trainer(Broken(LAYERS), settings(every=1))
    kept = []
    with pytest.raises(LossError, match=r"^step 3: the loss is nan$"):
        trained.run(state, 12, lambda state, _: kept.append(state))
    assert [each.step for each in kept] == [1, 2]
    assert all(np.isfinite(np.array(each)).all() for each in kept[-1].moments.arrays())


class Steep(Broken):
    """Whose gradients alone are none."""

    def loss(self, model, windows, drawn):
        norm = model.model.norm.weight
        nothing = (mx.sqrt(mx.square(norm - mx.stop_gradient(norm)).sum()) * mx.array(drawn["bad"] * 0 + 1)).sum()
        return RandomRouting.loss(self, model, windows, drawn) + nothing


def test_gradients_that_are_no_numbers_stop_too(trainer):
    trained, state = trainer(Steep(LAYERS))
    with pytest.raises(LossError, match=r"^step 1: the norm of the gradients is nan$"):
        trained.step(state)


def test_a_batch_that_cannot_be_cut(settings):
    with pytest.raises(DuoError, match=r"--batch 4: must be a multiple of processes x --accumulate, 1 x 3"):
        Trainer(None, STAGE, settings(accumulate=3), None, 0, np.zeros(0), Processes())
