"""Routers between PyTorch and a model directory: bit for bit, in anyone's names, with the same routes, and refused."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.convert import keymaps, parity, stored
from duo_mlx.convert.directory import Bits, DisagreementError, convert
from duo_mlx.convert.export import export
from duo_mlx.convert.inspection import describe
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.convert.tensors import Tensor, to_mlx, to_torch
from duo_mlx.router import Recorder

LAYERS, HIDDEN = 4, 16
ROUTED = {"router_choices": "-sB", "router_bias": True, "router_offsets": [[0.1, -2.5], [0.5, 0], [0.9, 1.25]]}
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12))
WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}
ROUTER = re.compile(r"(model\.layers\.(\d+)\.mlp\.)router\.(weight|bias)")


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def bits(array):
    return np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size]))


def assert_same(found, expected):
    """Bit for bit, routers among them."""
    assert found.keys() == expected.keys() and any(ROUTER.fullmatch(name) for name in found)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        np.testing.assert_array_equal(bits(tensor.load()), bits(expected[name].load()), err_msg=name)


@pytest.fixture
def made(tiny_config, write_tokenizer, tmp_path):
    """``made(rename, said, **changes)``: a directory as a PyTorch user has it, and its weights by canonical names.

    ``rename`` gives a router's tensors another name; of the keys that are about routers config.json has ``said`` alone.
    """

    def make(rename=lambda name: name, said=("router_choices",), **changes):
        config = tiny_config(**{"router_choices": "sB"} | changes)
        torch.manual_seed(0)
        model = DuoModel(DuoConfig.from_dict(config))
        model.initialise(0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                torch.nn.init.normal_(parameter)
        state = {rename(name) if ROUTER.fullmatch(name) else name: value for name, value in model.state_dict().items()}
        directory = tmp_path / "source"
        directory.mkdir()
        kept = {key: value for key, value in config.items() if not key.startswith("router_") or key in said}
        (directory / "config.json").write_text(json.dumps(kept))
        write_tokenizer(directory)
        torch.save(state, directory / "duo.pt")
        return directory, {name: Tensor.of(to_mlx(value)) for name, value in model.state_dict().items()}

    return make


def in_layer(template):
    """A router's name by ``template``, with the layer for N and weight or bias at the end."""
    return lambda name: f"{template.replace('N', ROUTER.fullmatch(name)[2])}.{ROUTER.fullmatch(name)[3]}"


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", ["canonical", "llama", "fused"])
@pytest.mark.parametrize("destination", ["exported", "duo.pt"])
def test_mlx_to_torch_to_mlx_is_bit_for_bit(saved, write_tokenizer, tmp_path, destination, names, dtype):
    convert(saved(**ROUTED)[0], tmp_path / "model", dtype=dtype)
    export(tmp_path / "model", tmp_path / destination, names=names)
    config = tmp_path / "model" / "config.json" if destination == "duo.pt" else None
    write_tokenizer(tmp_path)  # beside duo.pt
    convert(tmp_path / destination, tmp_path / "again", config=config)
    assert_same(stored.weights(tmp_path / "again"), stored.weights(tmp_path / "model"))
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")
    assert ROUTED.items() <= config_of(tmp_path / "again").items()


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("choices", ["sB", "-B", "-sB"])
def test_an_exported_router_takes_the_same_routes_in_pytorch(saved, tmp_path, choices, skip_scope):
    directory, model = saved(router_choices=choices, skip_scope=skip_scope)
    export(directory, tmp_path / "exported", names="canonical")
    reference = DuoModel(DuoConfig.from_file(tmp_path / "exported" / "config.json")).eval()
    found = open_checkpoint(tmp_path / "exported").tensors
    reference.load_state_dict({name: to_torch(tensor.load()) for name, tensor in found.items()})
    with torch.no_grad():
        logits, routes = reference.routed(torch.from_numpy(TOKENS))
    recorder = Recorder(model.router())
    ours = np.array(model(mx.array(TOKENS), routes=recorder))
    np.testing.assert_array_equal(np.stack([np.array(taken) for taken in recorder.taken], axis=-1), routes.numpy())
    np.testing.assert_allclose(ours, logits.numpy(), rtol=0, atol=1e-4)


def test_a_quantised_model_keeps_its_router_in_float(saved, tmp_path):
    directory, _ = saved(**WIDE, **ROUTED)
    convert(directory, tmp_path / "model", bits=Bits(4, 8, 32), verify=True)
    export(tmp_path / "model", tmp_path / "exported", dequantise=True, names="canonical")
    ours, exported = stored.weights(directory), open_checkpoint(tmp_path / "exported").tensors
    routers = [name for name in ours if ROUTER.fullmatch(name)]
    assert_same({name: exported[name] for name in routers}, {name: ours[name] for name in routers})
    assert ROUTED.items() <= config_of(tmp_path / "exported").items()


# --- made in PyTorch ---------------------------------------------------------------------------------------------

NAMES = [
    *("model.layers.N.mlp.router", "model.layers.N.mlp.gate", "model.layers.N.router", "layers.N.mlp.router"),
    *("layers.N.router", "model.routers.N", "routers.N"),
    *("model.layers.N.mlp.router.linear", "model.layers.N.mlp.router.layer", "model.layers.N.mlp.router.classifier"),
    *("model.layers.N.mlp.router.proj", "model.layers.N.mlp.gate.proj", "routers.N.linear"),
]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("template", NAMES)
def test_a_router_is_known_by_name_and_its_bias_is_seen(made, tmp_path, template, bias):
    directory, weights = made(in_layer(template), router_bias=bias)
    convert(directory, tmp_path / "model", verify=True)
    assert_same(stored.weights(tmp_path / "model"), weights)
    assert config_of(tmp_path / "model").get("router_bias", False) is bias


LLAMAS = [("llama", f"layers.N.feed_forward.{name}") for name in ("router", "gate", "router.linear", "gate.proj")]


@pytest.mark.parametrize(("names", "template"), [(n, name) for n in ("llama", "fused") for name in NAMES] + LLAMAS)
def test_a_router_is_known_among_other_names(made, tmp_path, names, template):
    directory, weights = made(router_bias=True)
    theirs = keymaps.named(names).from_canonical(weights, config_of(directory))
    router = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:mlp|feed_forward)\.router\.(\w+)")

    def renamed(name):
        match = router.fullmatch(name)
        return f"{template.replace('N', match[1])}.{match[2]}" if match else name

    torch.save({renamed(name): to_torch(tensor.load()) for name, tensor in theirs.items()}, directory / "duo.pt")
    convert(directory, tmp_path / "model")
    assert_same(stored.weights(tmp_path / "model"), weights)


def test_a_router_that_looks_ahead_is_known_by_its_width(made, tmp_path):
    directory, weights = made(router_looks_ahead=True)
    convert(directory, tmp_path / "model", verify=True)
    assert config_of(tmp_path / "model")["router_looks_ahead"] is True
    assert_same(stored.weights(tmp_path / "model"), weights)


@pytest.mark.parametrize("choices", ["sB", "Bs", "-B", "B-", "-s"])
def test_what_rows_stand_for_is_the_users_to_say(made, tmp_path, choices):
    directory, weights = made(said=())
    arguments = ["convert", directory, tmp_path / "model", "--router-choices", choices, "--verify"]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()][-1] == "router"
    assert_same(stored.weights(tmp_path / "model"), weights)
    assert config_of(tmp_path / "model")["router_choices"] == choices


def test_what_is_said_counts_in_place_of_config_json(made, tmp_path):
    directory, _ = made()
    convert(directory, tmp_path / "model", router_choices="-B")
    assert config_of(tmp_path / "model")["router_choices"] == "-B"


def test_a_gate_of_something_else_is_no_router():
    def passes(*names, shape=(2, HIDDEN)):
        given = {name: Tensor.of(mx.zeros(shape)) for name in names}
        return keymaps.named("canonical").to_canonical(given, {}).keys() == given.keys()

    gate, small = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.small.up_proj.weight"
    assert not passes(gate, small)
    assert passes(gate)  # of a dense model
    assert passes(gate, small, "model.layers.0.mlp.experts.0.up_proj.weight")
    assert passes(gate, small, shape=(24, HIDDEN)) and passes(gate, small, shape=(1, HIDDEN))
    assert passes("model.layers.0.mlp.gate_proj.weight", small) and passes("model.layers.0.gate.weight", small)


# --- verified ----------------------------------------------------------------------------------------------------


def swapped(tensors):
    """The routers' rows in another order."""
    return {
        name: tensor.apply(lambda array: array[::-1]) if ROUTER.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("ahead", [False, True], ids=["in layers", "ahead"])
@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_verify_compares_routers_by_what_they_decide(saved, skip_scope, ahead):
    directory, _ = saved(**ROUTED, skip_scope=skip_scope, router_looks_ahead=ahead)
    weights = stored.weights(directory)
    found = parity.measure(directory, config_of(directory), weights)
    assert [row.route for row in found] == ["big", "small", "skip", "random", "router"]
    assert parity.failures(found, identical_argmax=True) == []
    for wrong in (swapped(weights), {**weights, "model.layers.3.mlp.router.bias": Tensor.of(mx.array([0.0, 9, 0]))}):
        found = parity.failures(parity.measure(directory, config_of(directory), wrong))
        assert [row.route for row in found] == ["router"]


def test_decisions_that_hang_on_rounding_are_no_difference(saved, tmp_path):
    directory, _ = saved(router_choices="sB")
    twins = {
        # rows that differ in the last bit
        name: mx.repeat(value.load()[:1], 2, axis=0) * mx.array([[1.0], [1 + 2**-23]])
        if ROUTER.fullmatch(name)
        else value.load()
        for name, value in stored.weights(directory).items()
    }
    checkpoint.save(tmp_path, config_of(directory), twins)
    weights = {name: Tensor.of(value) for name, value in twins.items()}
    for other in (weights, swapped(weights)):
        assert parity.failures(parity.measure(tmp_path, config_of(directory), other)) == []


def test_a_router_that_was_never_trained_is_verified(saved, tmp_path):
    directory, _ = saved(router_choices="sB")
    weights = {
        name: tensor.apply(mx.zeros_like) if ROUTER.fullmatch(name) else tensor
        for name, tensor in stored.weights(directory).items()
    }
    checkpoint.save(tmp_path, config_of(directory), {name: tensor.load() for name, tensor in weights.items()})
    assert parity.failures(parity.measure(tmp_path, config_of(directory), weights)) == []


def test_a_wrong_router_is_not_written(made, tmp_path, monkeypatch):
    exact = parity.measure
    monkeypatch.setattr(
        parity, "measure", lambda where, config, weights, **more: exact(where, config, swapped(weights), **more)
    )
    with pytest.raises(DisagreementError, match="beyond the tolerance"):
        convert(made()[0], tmp_path / "model", verify=True)
    assert not (tmp_path / "model").exists()


# --- refused -----------------------------------------------------------------------------------------------------


def refused(directory, tmp_path, *options):
    """The line with which the command refuses."""
    done = CliRunner().invoke(main, ["convert", str(directory), str(tmp_path / "model"), *options])
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    return done.stderr


@pytest.mark.parametrize(("choices", "fitting"), [("sB", "sB"), ("B-", "sB"), ("-sB", "-sB")])
def test_rows_that_nobody_explains(made, tmp_path, choices, fitting):
    directory, _ = made(in_layer("routers.N"), said=(), router_choices=choices)
    line = refused(directory, tmp_path)
    assert line.count("\n") == 1 and line.endswith(
        f"source: routers.0.weight [{len(choices)}, 16] is a router's and config.json has no router_choices; say which "
        f"routes its rows stand for, in their order, such as --router-choices {fitting}\n"
    )
    assert refused(directory, tmp_path, "--dry-run") == line
    (problem,) = describe(directory).problems
    assert "--router-choices" in problem


@pytest.mark.parametrize(
    ("name", "shape", "options", "line"),
    [
        ("weight", (3, 16), (), "mlp.router.weight [3, 16]: router_choices is 'sB'; it must name a route for each row"),
        ("weight", (2, 16), ("--router-choices", "-sB"), "[2, 16]: router_choices is '-sB'; it must name a route for"),
        ("weight", (4, 16), (), "mlp.router.weight [4, 16]: a router has two or three rows, one for each route"),
        ("weight", (16, 2), (), "mlp.router.weight [16, 2]: a router has two or three rows"),
        ("weight", (), (), "mlp.router.weight []: a router has two or three rows"),
        ("bias", (3,), (), "mlp.router.bias [3]: router_choices is 'sB'; it must name a route for each row"),
        ("0.weight", (8, 16), (), "mlp.router.0.weight [8, 16]: a router is one linear map a layer, with a weight and"),
        ("norm.bias", (2,), (), "mlp.router.norm.bias [2]: a router is one linear map a layer"),
    ],
)
def test_what_is_no_router_of_the_choices(made, tmp_path, name, shape, options, line):
    directory, weights = made()
    weights[f"model.layers.2.mlp.router.{name}"] = Tensor.of(mx.ones(shape))
    torch.save({name: to_torch(tensor.load()) for name, tensor in weights.items()}, directory / "duo.pt")
    said = refused(directory, tmp_path, *options)
    assert line in said and said.count("\n") == 1 and said.startswith(f"duo-mlx: error: {directory}: model.layers.")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"weight": (2, 8)}, ["wrong shape model.layers.2.mlp.router.weight [2, 8], config.json implies [2, 16]"]),
        ({"weight": None}, ["missing     model.layers.2.mlp.router.weight [2, 16]"]),
        (
            {"bias": (2,)},
            [f"missing     model.layers.{layer}.mlp.router.bias [2]" for layer in (0, 1, 3)],
        ),
    ],
)
def test_a_layer_whose_router_is_another(made, tmp_path, change, lines):
    directory, weights = made()
    for kind, shape in change.items():
        name = f"model.layers.2.mlp.router.{kind}"
        weights.pop(name, None)
        weights |= {} if shape is None else {name: Tensor.of(mx.ones(shape))}
    torch.save({name: to_torch(tensor.load()) for name, tensor in weights.items()}, directory / "duo.pt")
    said = refused(directory, tmp_path).splitlines()
    assert said[:-1] == lines and said[-1].endswith(f"{len(lines)} tensors do not fit config.json; nothing was written")


def test_two_names_of_one_router(made, tmp_path):
    directory, weights = made()
    weights["model.layers.1.router.weight"] = weights["model.layers.1.mlp.router.weight"]
    torch.save({name: to_torch(tensor.load()) for name, tensor in weights.items()}, directory / "duo.pt")
    assert "1.router.weight are both model.layers.1.mlp.router.weight" in refused(directory, tmp_path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--router-choices", "sB"), "--router-choices sB: {} has no router\n"),
        (("--router-choices", "big"), "'big' is not one of '-s', '-B', 's-'"),
        (("--router-choices", "sBs"), "'sBs' is not one of"),
        (("--router-choices", "B"), "'B' is not one of"),
        (("--router-choices", "sB", "--to", "torch"), "--router-choices does not go with --to torch"),
    ],
)
def test_choices_that_make_no_sense(made, tmp_path, options, line):
    directory, _ = made(router_choices="")
    said = refused(directory, tmp_path, *options)
    assert line.format(directory) in said and said.count("\n") == 1
