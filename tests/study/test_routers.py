"""Routers on an oracle's text: what a pass by hand finds, tables that are read as they were written, and refusals."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.checkpoint import parameters
from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs
from duo_mlx.router import Router
from duo_mlx.routes import Route
from duo_mlx.study import results, routers, search
from duo_mlx.threshold import of_big
from duo_mlx.training.calibration import curve

LAYERS, SEQUENCES, LENGTH = 4, 3, 9
WINDOWS = np.random.default_rng(4).integers(0, 32, (SEQUENCES, LENGTH + 1))
ROUTER = {"router_choices": "sB", "router_bias": True}


@pytest.fixture(scope="module")
def make(tiny_model, tiny_config):
    """``make(change, **config)``: a model with a router that was measured on the text; ``change(name, weight)``."""
    base = tiny_model(**ROUTER)
    offsets = curve(base, WINDOWS[:, :-1])

    def make(change=lambda _, weight: weight, **config):
        model = Model(ModelArgs.from_dict(tiny_config(**ROUTER | {"router_offsets": offsets} | config)))
        wanted = parameters(model)
        model.load_weights([(name, change(name, each)) for name, each in parameters(base).items() if name in wanted])
        return model

    return make


@pytest.fixture(scope="module")
def oracle(make, tmp_path_factory):
    """``oracle(windows, sha256, budgets, **config)``: a finished oracle of that model."""

    def oracle(windows=WINDOWS, sha256="one", budgets=("none", "0", "1", "2", "3", "4"), **config):
        folder = tmp_path_factory.mktemp("oracle")
        asked = search.Question("sB", "shared", budgets, 0, {"source": "made"}, {"name": "tiny", "sha256": sha256})
        search.run(make(**config), windows, asked, folder, "typed", 1 << 24)
        return results.read(folder)

    return oracle


@pytest.fixture(scope="module")
def found(oracle):
    return oracle()


@pytest.fixture(scope="module")
def measured(make, found):
    return routers.measure("mine", make(), found)


class Kept(Router):
    """Another router, with what it says of each layer."""

    def __init__(self, router):
        self.router, self.said = router, {}

    def routes(self, layer, x):
        self.said[layer] = self.router.routes(layer, x)
        return self.said[layer]


def by_hand(model, k, window):
    """Losses ``[length]`` and routes ``[length, layers]`` of a sequence: asked first, and then passed as numbers."""
    offset = np.interp(k / LAYERS, *np.array(model.config.router_offsets).T)
    kept, inputs = Kept(model.router(of_big(model.config, float(offset)))), mx.array(window[None, :-1])
    mx.eval(model(inputs, routes=kept))
    routes = np.stack([np.array(kept.said[layer])[0] for layer in range(LAYERS)], axis=-1)
    logits = np.array(model(inputs, routes=routes[None]))[0].astype(np.float64)
    return np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(logits)), window[1:]], routes


def test_losses_and_routes_are_those_of_a_pass_by_hand(make, measured):
    assert (measured.name, measured.ks) == ("mine", (1, 2, 3))
    for place, k in enumerate(measured.ks):
        for sequence, window in enumerate(WINDOWS):
            losses, routes = by_hand(make(), k, window)
            np.testing.assert_array_equal(measured.routes[place, sequence], routes)
            np.testing.assert_allclose(measured.loss[place, sequence], losses, atol=1e-5)
    assert measured.loss.shape == (3, SEQUENCES, LENGTH) and measured.routes.dtype == np.uint8


def test_the_share_is_that_of_all_tokens_and_layers(measured):
    shares = [sum(int(route) == Route.BIG for route in each.ravel()) / each.size for each in measured.routes]
    assert measured.share.tolist() == pytest.approx(shares)
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.1)  # its threshold was measured on this very text
    loss, routes = measured.at(2)
    assert (loss == measured.loss[1]).all() and (routes == measured.routes[1]).all() and measured.at(4) is None


def test_one_token_has_routes_of_all_layers(make):
    model = make()
    losses, routes = routers.run(model, model.router(), WINDOWS[0, :1], WINDOWS[0, 1:2])
    whole, all_routes = routers.run(model, model.router(), WINDOWS[0, :-1], WINDOWS[0, 1:])
    assert losses.shape == (1,) and losses[0] == pytest.approx(whole[0], abs=1e-5)
    np.testing.assert_array_equal(routes, all_routes[:1], strict=True)


def test_routes_are_what_was_computed(make, oracle):
    config = {"small_layers": [0, 2]}
    measured = routers.measure("mine", make(**config), oracle(budgets=("2", "3"), **config))
    assert (measured.routes[..., [1, 3]] == Route.BIG).all() and (measured.routes[..., [0, 2]] == Route.SMALL).any()


def test_skips_are_kept(make, found):
    measured = routers.measure("mine", make(router_choices="-B"), found)
    assert set(np.unique(measured.routes)) == {Route.SKIP, Route.BIG}


def test_budgets_out_of_reach_are_left_out(make, found):
    calls, offsets = [], [[0.4, -0.5], [0.8, 0.5]]
    measured = routers.measure("mine", make(router_offsets=offsets), found, lambda *done: calls.append(done))
    assert measured.ks == (2, 3) and calls == [(1, 2), (2, 2)]
    ends = routers.measure("mine", make(router_offsets=[[0.25, -0.5], [0.5, 0.5]]), found)
    assert ends.ks == (1, 2)


def test_half_precision_is_the_same_model(make, found):
    model = make()
    model.set_dtype(mx.bfloat16)
    assert routers.measure("mine", model, found).ks == (1, 2, 3)


def refused(line, act, *arguments):
    with pytest.raises(DuoError) as caught:
        act(*arguments)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_models_that_do_not_fit(make, oracle, found, tiny_model):
    def other(part):
        return lambda name, weight: weight * 1.5 if part in name else weight

    no_router = {"router_choices": "", "router_bias": None}
    for model, line in (
        (tiny_model(num_hidden_layers=2, **ROUTER), "mine: has 2 layers, and the oracle's model 4"),
        (make(other(".big.")), "mine: all big's or all small's losses are not the oracle's"),
        (make(other(".small.")), "mine: all big's or all small's losses are not the oracle's"),
        (make(lambda _, weight: weight * np.nan), "mine: all big's or all small's losses are not the oracle's"),
        (tiny_model(vocab_size=8, **ROUTER), "mine: all big's or all small's losses are not the oracle's"),
        (make(router_offsets=None, **no_router), "mine: has no measured router; duo-mlx train router"),
        (make(router_offsets=None), "mine: has no measured router; duo-mlx train router"),
        (make(router_offsets=[[0.3, 0], [0.45, 1]]), "no budgets of k big layers within reach, 0.30 to 0.45"),
    ):
        refused(line, routers.measure, "mine", model, found)
    refused(
        "no budgets of k big layers", routers.measure, "mine", make(), oracle(budgets=("none", "0", "4", "at-most:2"))
    )


def test_a_router_of_the_same_model_is_measured_though_its_own_weights_are_others(make, found, measured):
    other = routers.measure("other", make(lambda name, each: -each if "router.weight" in name else each), found)
    assert (other.routes != measured.routes).any()


def test_what_was_written_is_read(tmp_path, measured, found):
    other = replace(measured, name="0.3", ks=(2,), loss=measured.loss[1:2], routes=measured.routes[1:2])
    out = tmp_path / "deep" / "routers"
    routers.write(out, [measured, other], found, {"any": "thing"}, False)
    assert {file.name for file in out.iterdir()} == {"mine.npz", "0.3.npz", "routers.json"}
    assert [file.name for file in out.parent.iterdir()] == ["routers"]
    assert (out / "routers.json").read_text() == '{\n "any": "thing"\n}\n'
    for read, wrote in zip(routers.read_folder(out, found), (other, measured), strict=True):
        assert (read.name, read.ks) == (wrote.name, wrote.ks)
        np.testing.assert_array_equal(read.loss, wrote.loss, strict=True)
        np.testing.assert_array_equal(read.routes, wrote.routes, strict=True)


def test_a_folder_is_replaced_only_by_force_and_only_if_it_is_one(tmp_path, measured, found):
    out, mine = tmp_path / "routers", tmp_path / "mine"
    routers.write(out, [measured, replace(measured, name="old")], found, {}, False)
    refused(f"--out {out}: exists already; give --force", routers.write, out, [measured], found, {}, False)
    routers.write(out, [measured], found, {"new": 1}, True)
    assert {file.name for file in out.iterdir()} == {"mine.npz", "routers.json"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        routers.write(out, [measured], found, {"loss": float("nan")}, True)
    (out / "notes.txt").write_text("mine")
    refused("holds notes.txt, which is no router's", routers.write, out, [measured], found, {}, True)
    refused("is a file; give the name of a folder", routers.write, out / "notes.txt", [measured], found, {}, True)
    assert {file.name for file in out.iterdir()} == {"mine.npz", "routers.json", "notes.txt"}
    mine.mkdir()
    (mine / "tokens.npz").write_bytes(b"an oracle's")
    refused("holds no routers.json, so --force does not replace it", routers.write, mine, [measured], found, {}, True)
    assert (mine / "tokens.npz").read_bytes() == b"an oracle's"
    (mine / "tokens.npz").unlink()
    routers.write(mine, [measured], found, {}, True)
    assert len(list(mine.iterdir())) == 2


@pytest.fixture
def table(tmp_path, measured, found):
    """The file of a router's table."""
    routers.write(tmp_path / "routers", [measured], found, {}, False)
    return tmp_path / "routers" / "mine.npz"


def cut(file):
    file.write_bytes(file.read_bytes()[:200])


def changed_inside(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


def text(file):
    file.write_text("ks, loss\n")


def bare_array(file):
    with file.open("wb") as opened:
        np.save(opened, np.zeros(3))


def without_routes(file):
    rewrite(file, routes=None)


def rewrite(file, **changes):
    with np.load(file) as archive:
        arrays = {name: value for name, value in (dict(archive) | changes).items() if value is not None}
    np.savez(file, **arrays)


@pytest.mark.parametrize("damage", [cut, changed_inside, text, bare_array, without_routes])
def test_a_damaged_table(table, found, damage):
    damage(table)
    refused(f"{table}: is no table of a router (", routers.read_folder, table.parent, found)


@pytest.mark.parametrize(
    "arrays",
    [
        {"ks": np.array([1, 2])},
        {"ks": np.array(1)},
        {
            "ks": np.zeros(0, int),
            "loss": np.zeros((0, SEQUENCES, LENGTH)),
            "routes": np.zeros((0, SEQUENCES, LENGTH, 4)),
        },
        {"loss": np.zeros((3, LENGTH, SEQUENCES))},
        {"routes": np.zeros((3, SEQUENCES, LENGTH, 5), np.uint8)},
    ],
    ids=["fewer budgets", "no list", "empty", "turned", "other layers"],
)
def test_arrays_that_do_not_fit(table, found, arrays):
    rewrite(table, **arrays)
    refused(f"{table}: is damaged: its arrays do not fit one another", routers.read, table, found)


def test_a_table_of_another_oracle(table, oracle, tmp_path):
    windows = WINDOWS.copy()
    windows[-1, -2] += 1
    for other in (oracle(windows), oracle(WINDOWS[:2]), oracle(WINDOWS[:, :-1]), oracle(sha256="two")):
        refused(f"{table}: is of another oracle's text or model, not of {other.folder}'s", routers.read, table, other)
    again = oracle(budgets=("2", "none"))  # of the same text and model
    assert routers.read(table, again).ks == (1, 2, 3)
    for folder in (tmp_path, tmp_path / "nowhere", table):
        refused(f"--routers {folder}: holds no table of duo-mlx oracle routers", routers.read_folder, folder, again)


def test_the_record_is_by_budget(measured, found):
    record = routers.record(measured, found)
    assert record["router"] == "mine" and list(record["budgets"]) == ["1", "2", "3"]
    of, big = record["budgets"]["2"], measured.routes[1] == Route.BIG
    assert of["loss"] == pytest.approx(np.mean(of["loss_by_sequence"])) == pytest.approx(measured.loss[1].mean())
    assert of["loss_by_sequence"] == pytest.approx([each.mean() for each in measured.loss[1]])
    assert of["share_by_layer"] == pytest.approx([big[:, :, layer].mean() for layer in range(LAYERS)])
    assert of["share_by_position"] == pytest.approx([big[:, token].mean() for token in range(LENGTH)])
    assert of["skip_by_layer"] == [0] * LAYERS and of["share"] == pytest.approx(big.mean())
    assert {name: of[name] for name in ("oracle", "random", "fixed", "fixed_split")} == {
        name: found.summary["budgets"]["2"][name] for name in ("oracle", "random", "fixed", "fixed_split")
    }


def test_names_are_the_last_parts_of_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert routers.names(["runs/gains", "runs/0.3/", "owner/Mixture"]) == ["gains", "0.3", "Mixture"]
    assert routers.names(["."]) == [tmp_path.name]
    refused("two routers are called gains; give directories of different names", routers.names, ["a/gains", "gains"])
    refused("two routers are called Gains", routers.names, ["a/gains", "b", "Gains"])
