"""``duo-mlx convert``: options that go together, what it says that it would do, and what it says while it works."""

import io
import json
import shutil
import sys

import mlx.core as mx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx import checkpoint
from duo_mlx.cli import convert as command
from duo_mlx.cli import convert_options, progress
from duo_mlx.convert import calibration, export, keymaps, quantise, references, tensors
from duo_mlx.convert import directory as converting

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


# options


def test_the_choices_are_what_the_library_knows():
    assert command.DTYPES == tensors.DTYPES and command.LAYOUTS == keymaps.LAYOUTS
    assert set(command.NAMES) == {references.TRANSFORMERS, *keymaps.NAMES}
    assert (*quantise.BITS, quantise.FLOAT) == command.BITS and command.GROUP_SIZES == quantise.GROUP_SIZES
    assert convert_options.FLOAT == quantise.FLOAT and convert_options.LEAST == calibration.LEAST - 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--small-ratio 8", "--small-ratio goes with --graft"),
        ("--small-layers 1-2", "--small-layers goes with --graft"),
        ("--calibration-tokens 500 --calibrate t", "--calibration-tokens goes with --graft"),
        ("--seed 0", "--seed goes with --graft"),
        ("--measure-tokens 500", "--measure-tokens goes with --calibrate"),
        ("--calibrate t --measure-tokens 0", "--measure-tokens 0 declines"),
        ("--calibrate t --measure-tokens 100", "it must be 0 or at least 128"),
        ("--graft", "--graft needs a text that the small FFNs are fitted to: --calibrate TEXT"),
        ("--graft --calibrate t --small-layers 4-2", "'4-2' is no list of layers such as 1-28 or 0,2,4-9"),
        ("--graft --calibrate t --small-layers big", "'big' is no list of layers"),
        ("--group-size 32", "--group-size goes with --bits or --small-bits"),
        ("--bits 16", "with 16 bits everywhere nothing is quantised"),
        ("--bits 16 --small-bits 16", "with 16 bits everywhere nothing is quantised"),
        ("--bits 7", "'7' is not one of"),
        ("--bits 4 --group-size 48", "'48' is not one of"),
        ("--names llama", "--names goes with --to torch"),
        ("--dequantise", "--dequantise goes with --to torch"),
        *(
            (f"--to torch {option}", f"{option.split()[0]} does not go with --to torch")
            for option in (
                *("--config c", "--key-map llama", "--rope half", "--dtype float16", "--default-route big"),
                *("--dry-run", "--graft", "--calibrate t", "--seed 1", "--bits 4", "--small-bits 4", "--group-size 64"),
                *("--allow-nonfinite", "--measure-tokens 0", "--small-ratio 8", "--calibration-tokens 200"),
            )
        ),
        ("--to gguf", "'gguf' is not one of"),
        ("--rope diagonal", "'diagonal' is not one of"),
    ],
)
def test_options_that_do_not_go_together_are_said_before_anything_is_read(tmp_path, arguments, line, fails):
    done = fails(line, tmp_path / "absent", tmp_path / "model", *arguments.split())
    assert "absent" not in done.stderr and names(tmp_path) == []


@given(st.sets(st.integers(0, 200), min_size=1), st.randoms())
def test_a_spec_of_layers_is_read_as_it_is_written(layers, random):
    parts = []
    for layer in layers:
        last = next(number for number in range(layer, 999) if number + 1 not in layers)
        parts.append(f"{layer}-{random.randint(layer, last)}" if random.random() < 0.5 else str(layer))
    random.shuffle(parts)
    assert convert_options.parse_layers(None, None, ",".join(parts)) == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--key-map", "hugging"), "there is no key map 'hugging'; known are canonical, llama, fused, or a file"),
        (("--revision", "v1"), "is no hub id (OWNER/NAME)"),
        (("--default-route", "BB"), "config.json: default_route: route 'BB' has 2 characters"),
        (("--calibrate", "gone.txt"), "--calibrate gone.txt: cannot be read (No such file or directory)"),
    ],
)
def test_options_that_the_model_does_not_take(saved, tmp_path, options, line, fails):
    fails(line, saved()[0], tmp_path / "model", *options)
    assert names(tmp_path) == []


# what it says that it would do


@pytest.fixture
def in_llamas_names(saved, tmp_path):
    """A state dict under original-Llama names, its configuration, and the weights under canonical names."""
    directory, model = saved()
    export.export(directory, tmp_path / "llama.pt", names="llama")
    return tmp_path / "llama.pt", directory / "config.json", checkpoint.parameters(model)


def test_a_dry_run_prints_what_becomes_what_and_writes_nothing(in_llamas_names, tmp_path, succeed):
    source, config, weights = in_llamas_names
    done = succeed(source, tmp_path / "model", "--config", config, "--dtype", "float16", "--dry-run")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["source", "target", "shape", "dtype"] and done.stderr == ""
    assert ["layers.0.attention.wq.weight", "model.layers.0.self_attn.q_proj.weight", "16x16", "float16"] in rows
    assert {row[1] for row in rows[1:]} == set(weights) and len(rows) == len(weights) + 1
    assert names(tmp_path) == ["llama.pt"]


def test_a_dry_run_shows_what_does_not_fit_and_fails(in_llamas_names, tmp_path, invoke):
    source, _, weights = in_llamas_names
    config = config_of(in_llamas_names[1].parent) | {"num_hidden_layers": 3, "small_intermediate_size": 6}
    (tmp_path / "other.json").write_text(json.dumps(config))
    done = invoke(source, tmp_path / "model", "--config", tmp_path / "other.json", "--dry-run")
    assert done.exit_code == 2 and len(done.stdout.splitlines()) == len(weights) + 1
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert sum(line.endswith("left over") for line in lines) == 12
    theirs, ours = "layers.2.feed_forward.small.w1.weight", "model.layers.2.mlp.small.gate_proj.weight"
    assert f"{theirs} {ours} 8x16 float32 wrong shape, config.json implies [6, 16]" in lines
    assert done.stderr.endswith("21 tensors do not fit config.json; nothing was written\n")
    assert names(tmp_path) == ["llama.pt", "other.json"]


def test_a_dry_run_of_a_graft_needs_no_text(dense, tmp_path, succeed):
    done = succeed(dense(), tmp_path / "model", "--graft", "--dry-run")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.big.up_proj.weight", "24x16", "float32"] in rows
    assert names(tmp_path) == ["dense"]


RULES = r"""
[[rule]]
from = 'my\.(.*)'
to = '\1'
[[rule]]
from = 'step'
drop = true
"""


def test_names_of_ones_own_by_a_file_of_rules(saved, tmp_path, succeed, fails):
    directory, model = saved()
    weights = checkpoint.parameters(model)
    torch.save(
        {f"my.{name}": tensors.to_torch(value) for name, value in weights.items()} | {"step": torch.ones(1)},
        tmp_path / "my.pt",
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path / name)
    fails("give rules with --key-map FILE", tmp_path / "my.pt", tmp_path / "model")
    (tmp_path / "rules.toml").write_text(RULES)
    succeed(tmp_path / "my.pt", tmp_path / "model", "--key-map", tmp_path / "rules.toml")
    found = checkpoint.parameters(checkpoint.read_model(tmp_path / "model"))
    assert found.keys() == weights.keys()
    assert all(mx.array_equal(value, weights[name]).item() for name, value in found.items())


def test_the_layout_of_q_and_k_can_be_said(in_llamas_names, saved, tmp_path, succeed):
    source, config, weights = in_llamas_names
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved()[0] / name, tmp_path / name)
    succeed(source, tmp_path / "model", "--config", config)
    succeed(source, tmp_path / "other", "--config", config, "--key-map", "llama", "--rope", "half")
    right, wrong = (checkpoint.parameters(checkpoint.read_model(tmp_path / name)) for name in ("model", "other"))
    q = "model.layers.0.self_attn.q_proj.weight"
    assert mx.array_equal(right[q], weights[q]).item() and not mx.array_equal(wrong[q], weights[q]).item()


# what is said while it works


@pytest.mark.parametrize("options", [(), ("--bits", 4), ("--to", "torch")])
def test_without_pytorch_verifying_names_the_extra_before_the_work(saved, tmp_path, monkeypatch, options, fails):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(converting, "open_source", lambda *_, **__: pytest.fail("the source was opened"))
    monkeypatch.setattr(export, "export", lambda *_, **__: pytest.fail("it was exported"))
    fails("--verify needs PyTorch: pip install 'duo-mlx[torch]'", saved()[0], tmp_path / "duo", *options, "--verify")
    assert not list(tmp_path.iterdir())


def test_the_result_and_the_peak_are_said_on_standard_error(saved, tmp_path, succeed):
    done = succeed(saved()[0], tmp_path / "model")
    assert done.stdout == ""
    before, said, after = done.stderr.partition(f"wrote {tmp_path / 'model'} (peak memory ")
    assert before == "" and said and 0.05 < float(after.removesuffix(" GB)\n")) < 20


def test_a_hub_id_goes_to_the_reader_with_its_revision(saved, tmp_path, monkeypatch, succeed):
    asked = []
    opened = converting.open_source

    def open_source(source, **options):
        asked.append((source, options["revision"]))
        return opened(saved()[0], **options | {"revision": None})

    monkeypatch.setattr(converting, "open_source", open_source)
    succeed("owner/name", tmp_path / "model", "--revision", "v1")
    monkeypatch.setattr(checkpoint, "resolve", lambda *arguments: asked.append(arguments) or saved()[0])
    succeed("owner/name", tmp_path / "duo.pt", "--revision", "v2", "--to", "torch")
    assert asked == [("owner/name", "v1"), ("owner/name", "v2")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_each_stage_and_others_nothing(monkeypatch):
    calls = [("grafting", 3, 30), ("writing", 1.5e9, 3e9), ("writing", 3e9, 3e9), ("measuring", 0.25, 1)]
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.shown() as show:
            for call in calls:
                show(*call)
        seen = stream.getvalue()
        if stream.isatty():
            for said in ("grafting", "10%", "writing", "3.00 of 3.00 GB", "measuring", "25%"):
                assert said in seen
        else:
            assert seen == ""


def test_amounts():
    said = [progress.amount(*call) for call in (("writing", 0, 0), ("grafting", 1, 2), ("measuring", 0, 0))]
    assert said == ["0.00 of 0.00 GB", "50%", "100%"]


def test_the_library_tells_of_its_stages(dense, graft, text, tmp_path):
    seen = []
    watch = converting.Watch(lambda *call: seen.append(call))
    options = {"calibrate": calibration.Calibration((text,), 128), "graft": graft.Graft(small_ratio=4), "watch": watch}
    directory = dense(hidden_size=64, intermediate_size=128)
    converting.convert(directory, tmp_path / "model", bits=converting.Bits(4, None, 32), **options)
    stages = list(dict.fromkeys(call[0] for call in seen))
    assert stages == ["writing", "grafting", "measuring", "quantising"]
    for stage in stages:
        done = [call[1:] for call in seen if call[0] == stage]
        assert done == sorted(done) and done[-1][0] == done[-1][1]


def test_the_help_names_inspect(succeed):
    done = succeed("--help")
    assert "duo-mlx convert inspect PATH" in " ".join(done.stdout.split())
