"""Stock mlx-lm with a saved model directory: loading, streaming, batches, its benchmark, and the trust flag."""

import json
import re
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import mlx_lm.benchmark
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duo_mlx import checkpoint

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [12], [30, 2, 30, 2, 30]]


def greedy(model, prompt, count):
    """Tokens by the plain definition: a whole pass without a cache for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
    return tokens[len(prompt) :]


def test_without_the_trust_flag_it_is_refused(saved):
    directory, _ = saved()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        mlx_lm.load(str(directory))


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("default_route", ["big", "small", "skip", "Bs-B"])
def test_it_loads_and_runs_its_default_route(saved, default_route, skip_scope):
    directory, model = saved(default_route=default_route, skip_scope=skip_scope)
    loaded, tokenizer = mlx_lm.load(str(directory), trust_remote_code=True)
    assert tokenizer.encode("w1 w2") == [3, 4] and tokenizer.eos_token_ids == {1}
    ours, theirs = dict(tree_flatten(model.parameters())), dict(tree_flatten(loaded.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(value, theirs[name]).item() for name, value in ours.items())
    tokens = mx.array([PROMPTS[1]])
    ours = model(tokens, routes=model.config.default_pattern)
    assert mx.allclose(loaded(tokens), ours, rtol=0, atol=1e-5).item()
    if default_route != "big":
        assert not mx.allclose(loaded(tokens), model(tokens, routes=[2] * 4), atol=1e-3).item()


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("default_route", ["big", "Bs-B"])
def test_stream_generate_says_the_greedy_tokens(saved, default_route, skip_scope):
    directory, model = saved(default_route=default_route, skip_scope=skip_scope)
    loaded, tokenizer = mlx_lm.load(str(directory), trust_remote_code=True)
    tokenizer._eos_token_ids = set()
    for prompt in PROMPTS:
        responses = list(mlx_lm.stream_generate(loaded, tokenizer, prompt, max_tokens=8, prefill_step_size=2))
        assert [response.token for response in responses] == greedy(model, prompt, 8)
        assert responses[-1].prompt_tokens == len(prompt) and responses[-1].finish_reason == "length"
        text = "".join(response.text for response in responses)
        assert text == tokenizer.decode([response.token for response in responses])


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("default_route", ["big", "Bs-B", "--s-"])
def test_a_batch_says_what_each_prompt_says_alone(saved, default_route, skip_scope):
    directory, model = saved(default_route=default_route, skip_scope=skip_scope)
    loaded, tokenizer = mlx_lm.load(str(directory), trust_remote_code=True)
    tokenizer._eos_token_ids = set()
    batch = mlx_lm.batch_generate(loaded, tokenizer, PROMPTS, max_tokens=8, return_token_ids=True)
    assert batch.token_ids == [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in batch.token_ids}) > 1


def check_benchmark(printed):
    assert re.findall(r"^Trial (\d):", printed, re.MULTILINE) == ["1", "2"]
    averages = re.search(
        r"^Averages: prompt_tps=([\d.]+), generation_tps=([\d.]+), peak_memory=", printed, re.MULTILINE
    )
    assert averages and float(averages[1]) > 0 and float(averages[2]) > 0


BENCHMARK = ["--trust-remote-code", "-p", "16", "-g", "8", "-n", "2"]


def test_its_benchmark_runs_in_a_process_that_knows_mlx_lm_alone(saved):
    directory, _ = saved(default_route="Bs-B")
    command = [sys.executable, "-m", "mlx_lm", "benchmark", "--model", str(directory), *BENCHMARK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check_benchmark(done.stdout)


def test_its_benchmark_runs_with_a_batch(saved, monkeypatch, capsys):
    directory, _ = saved(default_route="Bs-B")
    monkeypatch.setattr(sys, "argv", ["mlx_lm.benchmark", "--model", str(directory), *BENCHMARK, "-b", "3"])
    mlx_lm.benchmark.main()
    check_benchmark(capsys.readouterr().out)


def test_shards_load_as_one(tiny_model, tiny_config, write_tokenizer, tmp_path):
    model = tiny_model()
    checkpoint.save(tmp_path, tiny_config(), dict(tree_flatten(model.parameters())), limit=1)  # a file a tensor
    write_tokenizer(tmp_path)
    files = sorted(file.name for file in tmp_path.glob("model*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    loaded, _ = mlx_lm.load(str(tmp_path), trust_remote_code=True)
    tokens = mx.array([PROMPTS[1]])
    np.testing.assert_allclose(np.array(loaded(tokens)), np.array(model(tokens)), rtol=0, atol=1e-5)
