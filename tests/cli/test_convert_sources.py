"""``duo-mlx convert --graft`` on what people have: GGUF files of other bases, PyTorch's shards; notes are printed."""

import json
import shutil
import sys
import types
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import torch

import duo_mlx
from duo_mlx import guard
from duo_mlx.generation import stream_generate
from tests.convert import dense_kinds
from tests.convert.gguf_kinds import CASES, Kind, made, write


@dataclass(frozen=True)
class Graft:
    """Stands in for the solving of small FFNs, which has tests of its own: theirs are random."""

    kind: str = "own"
    small_ratio: float | None = None
    small_layers: tuple[int, ...] | None = None
    tokens: int = 20000
    seed: int = 0


@pytest.fixture
def grafted(monkeypatch, text, tmp_path, succeed):
    """``grafted(source, *options)``: the Duo that the command makes, and the lines that it says."""
    solver = types.ModuleType("duo_mlx.convert.graft")
    solver.Graft, solver.graft = Graft, dense_kinds.small_ffns
    monkeypatch.setitem(sys.modules, solver.__name__, solver)

    def run(source, *options):
        done = succeed(
            source, tmp_path / "duo", "--graft", "--calibrate", text, "--measure-tokens", 0, "--force", *options
        )
        assert done.stdout == ""
        *notes, last = done.stderr.splitlines()
        assert last.startswith(f"wrote {tmp_path / 'duo'} (peak memory")
        return tmp_path / "duo", [note.removeprefix("duo-mlx: ") for note in notes]

    return run


def check(duo, theirs, vocabulary=32):
    """Check that a Duo's logits by all big are transformers', and that it generates by them."""
    tokens = np.random.default_rng(1).integers(0, vocabulary, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        first = theirs(torch.tensor([[3, 4]])).logits[0, -1, :32].argmax().item()
    model, tokenizer = duo_mlx.load(duo)
    np.testing.assert_allclose(np.array(guard.all_big(model, mx.array(tokens))), expected, rtol=0, atol=1e-4)
    found = [each.token for each in stream_generate(model, tokenizer, [3, 4], max_tokens=2, route="big")]
    assert found[0] == first


GRAFTED_ON = "the texts have 700 tokens: 700 are grafted on (of 20000)"


@pytest.mark.parametrize("case", ["llama 3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_a_gguf_file_becomes_a_duo(case, grafted, write_tokenizer, tmp_path):
    name, changes, options = CASES[case]
    theirs = made(name, changes)
    folder = tmp_path / "gguf"
    folder.mkdir()
    write(folder / "x.gguf", theirs, more=options.get("more", dict)(), add=options.get("add"))
    write_tokenizer(folder)
    duo, notes = grafted(folder / "x.gguf")
    check(duo, theirs, 64)
    fewer = f"{folder / 'tokenizer.json'}: has tokens 0 to 31 of 64 embeddings; the others are never generated"
    own = {
        "llama 3": ["rope_freqs.weight is RoPE scaling of type llama3 by 8.0"],
        "gemma2": ["mlx-lm's gemma2 sees whole texts, so beyond 64 tokens it differs from transformers', which slides"],
    }
    assert notes == [*own.get(case, []), fewer, GRAFTED_ON]
    kind = theirs.config.model_type
    assert json.loads((duo / "config.json").read_text())["base_model_type"] == kind


def test_a_quantised_gguf_file_says_what_became_of_its_weights(grafted, write_tokenizer, tmp_path):
    write(tmp_path / "x.gguf", made("Qwen3", {"head_dim": 32}), Kind.Q8_0)
    write_tokenizer(tmp_path)
    duo, notes = grafted(tmp_path / "x.gguf", "--bits", 8, "--small-bits", 4, "--group-size", 32)
    assert notes[0] == "Q8_0 become float32; --bits quantises again" and "bits per weight" in notes[-1]
    weights = dense_kinds.weights_of(duo)
    assert weights["model.layers.0.mlp.big.up_proj.weight"].dtype == mx.uint32
    assert weights["model.layers.0.mlp.small.up_proj.weight"].shape == (32, 64 * 4 // 32)


@pytest.fixture
def shards(write_tokenizer, tmp_path):
    """``shards(kind, dtype, index)``: a directory of PyTorch's shards, with or without their index; and the model."""

    def make(kind, dtype=torch.float32, index=True):
        theirs = dense_kinds.save(tmp_path / "safetensors", kind, dtype)
        directory = tmp_path / "pytorch"
        directory.mkdir(exist_ok=True)
        state = {name: value.clone() for name, value in theirs.state_dict().items()}
        weight_map = {}
        for number in range(3):
            file = f"pytorch_model-0000{number + 1}-of-00003.bin"
            part = {name: value for place, (name, value) in enumerate(state.items()) if place % 3 == number}
            torch.save(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        if index:
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        shutil.copy(tmp_path / "safetensors" / "config.json", directory)
        write_tokenizer(directory)
        return directory, theirs

    return make


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gpt2"])
def test_pytorchs_shards_become_a_duo(kind, index, grafted, shards):
    directory, theirs = shards(kind, index=index)
    duo, notes = grafted(directory)
    check(duo, theirs)
    assert notes == [GRAFTED_ON]


def test_bfloat16_in_pytorchs_shards_is_kept_bit_for_bit(grafted, shards, tmp_path):
    directory, _ = shards("qwen3", torch.bfloat16)
    duo, _ = grafted(directory)
    ours, theirs = (dense_kinds.weights_of(each) for each in (duo, tmp_path / "safetensors"))
    for name, value in theirs.items():
        found = ours[name.replace(".mlp.", ".mlp.big.")]
        assert found.dtype == mx.bfloat16 and mx.array_equal(found, value).item()


def test_an_adapter_beside_a_base_is_named(dense, grafted):
    directory = dense()
    (directory / "adapter_config.json").write_text("{}")
    _, notes = grafted(directory)
    left_out = f"{directory / 'adapter_config.json'}: the adapter is left out; merge it into its base to have it"
    assert notes == [left_out, GRAFTED_ON]
