"""Model directories: what loads, what is refused with which line, and outputs that are whole or not there."""

import io
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.files import output_directory
from duo_mlx.routes import parse_pattern


@pytest.fixture
def copy(saved, tmp_path):
    """A model directory of its own, to be damaged."""
    shutil.copytree(saved()[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("lazy", [False, True])
def test_what_was_saved_is_loaded(saved, lazy):
    directory, model = saved()
    loaded, tokenizer = duo_mlx.load(directory, lazy=lazy)
    ours, theirs = checkpoint.parameters(model), checkpoint.parameters(loaded)
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(value, theirs[name]).item() for name, value in ours.items())
    assert tokenizer.encode("w1 w2") == [3, 4] and tokenizer.eos_token_ids == {1}


def test_a_rotation_that_transformers_cannot_make_of_an_unknown_architecture(copy):
    """Llama 3's, say: the tokenizer is read without the model's configuration."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    change_config(copy, rope_scaling=scaling, rope_theta=500000.0)
    loaded, tokenizer = duo_mlx.load(copy)
    assert loaded.args.rope_scaling == scaling
    assert tokenizer.encode("w1 w2") == [3, 4] and tokenizer.eos_token_ids == {1}


def test_half_precision_computes_in_float32_on_the_cpu_unless_told_otherwise(tiny_model, tiny_config, copy):
    weights = {name: value.astype(mx.bfloat16) for name, value in checkpoint.parameters(tiny_model()).items()}
    checkpoint.save(copy, tiny_config(), weights)
    for dtype, expected in ((None, mx.float32), (mx.bfloat16, mx.bfloat16), (mx.float16, mx.float16)):
        loaded, _ = duo_mlx.load(copy, dtype=dtype)
        for name, value in checkpoint.parameters(loaded).items():
            assert value.dtype == expected
            assert mx.array_equal(value, weights[name].astype(expected)).item()


def test_code_in_the_directory_is_not_run(copy, tmp_path):
    ran = tmp_path / "ran"
    payload = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
    (copy / checkpoint.MODEL_FILE).write_text(payload)
    (copy / "evil.py").write_text(payload)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    duo_mlx.load(copy)
    config["tokenizer_class"] = "Unheard"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        duo_mlx.load(copy)
    except DuoError as error:
        assert "tokenizer cannot be read" in str(error)
    assert not ran.exists()


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (lambda d: cut(d / "config.json", 20), "config.json: is no JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "another architecture": (
        lambda d: change_config(d, model_type="llama"),
        "model_type is 'llama', so it is a dense model, not a Duo",
    ),
    "a key is missing": (lambda d: change_config(d, small_intermediate_size=None), "lacks small_intermediate_size"),
    "a routing key is unknown": (lambda d: change_config(d, skip_scoop="ffn"), "not known: skip_scoop"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no model\\*.safetensors"),
    "weights cut short": (lambda d: cut(d / "model.safetensors", -8), "model.safetensors: is damaged"),
    "header cut short": (lambda d: cut(d / "model.safetensors", 100), "model.safetensors: is damaged"),
    "weights empty": (lambda d: cut(d / "model.safetensors", 0), "model.safetensors: is damaged"),
    "wrong shape": (lambda d: change_config(d, intermediate_size=40), "config.json and weights disagree.*mlp.big"),
    "too few layers in the weights": (lambda d: change_config(d, num_hidden_layers=9), "disagree.*model.layers.8"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "the tokenizer cannot be read"),
    "tokenizer cut short": (lambda d: cut(d / "tokenizer.json", 40), "the tokenizer cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(copy, damage):
    spoil, line = DAMAGES[damage]
    spoil(copy)
    with pytest.raises(DuoError, match=line) as refused:
        duo_mlx.load(copy)
    assert str(copy) in str(refused.value) and "\n" not in str(refused.value)


def test_a_path_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(DuoError, match="is a file; a model is a directory"):
        duo_mlx.load(tmp_path / "file")
    with pytest.raises(DuoError, match="no such directory, and it is no hub id"):
        duo_mlx.load(tmp_path / "absent" / "model")


def test_a_hub_id_loads_from_the_cache_and_only_data_is_asked_for(saved, monkeypatch):
    directory, _ = saved()
    calls = []

    def snapshot(repository, **kwargs):
        calls.append((repository, kwargs))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    loaded, _ = duo_mlx.load("owner/name", revision="v1")
    assert loaded.config.num_hidden_layers == 4
    assert calls[0] == ("owner/name", {"revision": "v1", "allow_patterns": ["config.json"]})
    name, asked = calls[1]
    assert (name, asked["revision"]) == ("owner/name", directory.name)  # the commit, by its folder in the cache
    assert not any(pattern.endswith((".py", "*")) and pattern != "tokenizer*" for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DuoError, match="owner/absent: there is no such directory, and the hub does not give it"
    ) as error:
        duo_mlx.load("owner/absent")
    assert "\n" not in str(error.value)


def test_an_output_directory_appears_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with output_directory(target) as directory:
        (directory / "config.json").write_text("{}")
        assert not target.exists()
    assert (target / "config.json").read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), output_directory(target) as directory:
        (directory / "config.json").write_text("{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(RuntimeError), output_directory(target, force=True):
        raise RuntimeError
    assert (target / "config.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_existing_output_needs_force_and_must_be_a_model_directory(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("precious")
    with pytest.raises(DuoError, match="exists already; give --force"), output_directory(target):
        pass
    with pytest.raises(DuoError, match="is no model directory, so --force"), output_directory(target, force=True):
        pass
    assert (target / "notes.txt").read_text() == "precious"
    (target / "config.json").write_text("old")
    with output_directory(target, force=True) as directory:
        (directory / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_the_index_names_every_tensor(saved):
    directory, model = saved()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weights = checkpoint.parameters(model)
    assert index["weight_map"] == dict.fromkeys(sorted(weights), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(np.array(value).nbytes for value in weights.values())


# --- what is read ------------------------------------------------------------------------------------------------


def unread(model):
    """The FFNs whose weights are still unevaluated reads of a file, ``layer.module``."""
    left = set()
    for index, layer in enumerate(model.layers):
        for name in ("big", "small"):
            file = io.StringIO()
            mx.export_to_dot(file, layer.mlp[name].up_proj.weight)
            if "shape=rectangle" in file.getvalue():
                left.add(f"{index}.{name}")
    return left


def test_a_fingerprint_is_of_what_a_model_computes_by_given_routes(saved, tmp_path):
    directory, model = saved(router_choices="sB")
    config, weights = checkpoint.read_config(directory), checkpoint.parameters(model)
    expected = checkpoint.fingerprint(directory)

    def of(changes, changed, limit=1 << 30, **which):
        made = tmp_path / str(len(list(tmp_path.iterdir())))
        made.mkdir()
        checkpoint.save(made, config | changes, weights | changed, limit=limit)
        return checkpoint.fingerprint(made, **which)

    router, norm = "model.layers.1.mlp.router.weight", "model.norm.weight"
    choosing = {"router_choices": "Bs", "default_route": "small", "best_patterns": [{"pattern": "BBBB", "loss": 1.0}]}
    assert of(choosing, {router: weights[router] + 1}) == of({}, {}, limit=1000) == expected
    others = [
        of({"rms_norm_eps": 1e-6}, {}),
        of({}, {norm: weights[norm] + 2**-20}),
        of({}, {norm: weights[norm].astype(mx.float16)}),
        of({}, {"model.layers.0.mlp.big.up_proj.weight": weights["model.layers.0.mlp.big.gate_proj.weight"]}),
    ]
    assert len({expected, *others}) == 5
    chosen = [
        of(config, weights, choosing=True)
        for config, weights in (
            ({}, {}),
            ({"rms_norm_eps": 1e-6}, {norm: weights[norm] + 1}),
            *(({key: value}, {}) for key, value in choosing.items()),
            ({}, {router: weights[router] + 1}),
        )
    ]
    assert chosen[0] == chosen[1] != expected and len(set(chosen)) == len(chosen) - 1


@pytest.mark.parametrize("fuse", [False, True])
def test_weights_that_no_route_uses_stay_unread(saved, fuse):
    everything = {f"{layer}.{name}" for layer in range(4) for name in ("big", "small")}
    model, tokenizer = duo_mlx.load(saved()[0], lazy=True, fuse=fuse)
    assert unread(model) == everything
    checkpoint.read_weights(model, parse_pattern("Bs-s", 4))
    assert unread(model) == everything - {"0.big", "1.small", "3.small"}
    duo_mlx.generate(model, tokenizer, [3, 5], route="Bs-s", max_tokens=3)
    assert unread(model) == everything - {"0.big", "1.small", "3.small"}
    checkpoint.read_weights(model)
    assert unread(model) == set()


def test_small_reads_big_where_there_is_no_small(saved):
    model, _ = duo_mlx.load(saved(small_layers=[1])[0], lazy=True)
    checkpoint.read_weights(model, parse_pattern("ss--", 4))
    file = io.StringIO()
    mx.export_to_dot(file, model.layers[0].mlp.big.up_proj.weight)
    assert "shape=rectangle" not in file.getvalue()
