"""Stock mlx-lm's and transformers' tools with written directories: tokenizers, batches, LoRA training and the server.

`tests/test_architectures.py` compares batches and LoRA training with the base's own for every architecture.
"""

import json
import socket
import subprocess
import sys
from http.client import HTTPConnection

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tuner import linear_to_lora_layers
from mlx_lm.tuner.trainer import grad_checkpoint

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.model import Model
from duo_mlx.transformers_config import CHECKED, NESTED
from tests.architectures import ARCHITECTURES

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [12]]
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' w7 ' }}{% endfor %}"
HOSTED = [kind for kind, row in ARCHITECTURES.items() if not row.refused]


def duo_config(kind, **changes):
    own = {"model_type": "duo", "base_model_type": kind, "small_intermediate_size": 32}
    return ARCHITECTURES[kind].config | own | changes


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def directory(request, tmp_path_factory, write_tokenizer):
    """A Duo's model directory."""
    config = duo_config(request.param, default_route="B-s", vocab_size=32)
    mx.random.seed(0)
    made = tmp_path_factory.mktemp("model")
    checkpoint.save(made, config, checkpoint.parameters(Model(Config.from_dict(config))))
    write_tokenizer(made)
    return made


@pytest.fixture
def loaded(directory):
    """A saved Duo and its tokenizer, as mlx-lm loads them."""
    model, tokenizer = mlx_lm.load(str(directory), trust_remote_code=True)
    tokenizer._eos_token_ids = set()
    return model, tokenizer


def gradients(model):
    """The loss and the gradients of one prompt."""
    tokens = mx.array([PROMPTS[1]])

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    return nn.value_and_grad(model, loss)(model)


def test_a_batch_says_what_each_prompt_says_alone(loaded):
    model, tokenizer = loaded
    batch = mlx_lm.batch_generate(model, tokenizer, PROMPTS, max_tokens=6, return_token_ids=True)
    for prompt, said in zip(PROMPTS, batch.token_ids, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
        assert said == tokens[len(prompt) :]


def test_lora_trains_its_own_weights_alone(loaded):
    model, _ = loaded
    model.freeze()
    linear_to_lora_layers(model, 3, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    before = dict(tree_flatten(model.parameters()))
    first, found = gradients(model)
    optim.SGD(0.01).update(model, found)
    after = dict(tree_flatten(model.parameters()))
    changed = {name for name, value in after.items() if not mx.array_equal(value, before[name]).item()}
    assert changed and all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in changed)
    assert {".0.mlp.big." in name for name in changed} == {True, False}
    assert any(".2.mlp.small." in name for name in changed) and not any(".0.mlp.small." in name for name in changed)
    assert gradients(model)[0].item() < first.item()


def test_gradient_checkpointing_keeps_the_default_route(loaded, monkeypatch):
    model, _ = loaded
    expected = dict(tree_flatten(gradients(model)[1]))
    block = type(model.layers[0])
    monkeypatch.setattr(block, "__call__", block.__call__)  # which mlx-lm replaces for good
    grad_checkpoint(model.layers[0])
    found = dict(tree_flatten(gradients(model)[1]))
    for name, value in expected.items():
        assert mx.allclose(found[name], value, rtol=0, atol=1e-6).item(), name
    assert mx.abs(found["model.layers.2.mlp.small.up_proj.weight"]).max().item() > 0


ALONE = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
for directory in sorted(Path(sys.argv[1]).iterdir()):
    print(directory.name, *AutoTokenizer.from_pretrained(directory).encode("w1 w2"))
assert "duo_mlx" not in sys.modules
"""


def test_transformers_alone_reads_every_tokenizer(tmp_path, write_tokenizer):
    for kind in HOSTED:
        (tmp_path / kind).mkdir()
        checkpoint.save_config(tmp_path / kind, duo_config(kind))
        write_tokenizer(tmp_path / kind)
    command = [sys.executable, "-W", "error::FutureWarning", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kind} 3 4" for kind in sorted(HOSTED)]


@pytest.mark.parametrize("kind", [kind for kind in HOSTED if set(CHECKED) & set(ARCHITECTURES[kind].config)])
def test_keys_that_transformers_would_check_may_stand_anywhere(kind, tmp_path, write_tokenizer):
    config = duo_config(kind)
    checkpoint.save_config(tmp_path, config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written[NESTED]) == set(CHECKED) & set(config) and not set(CHECKED) & set(written)
    assert Config.from_dict(written) == Config.from_dict(checkpoint.read_config(tmp_path)) == Config.from_dict(config)
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))  # as earlier versions wrote it
    assert load_tokenizer(tmp_path).encode("w1 w2") == [3, 4]


@pytest.fixture(scope="module")
def server():
    """mlx-lm's own server in a process of its own: its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--port", str(port), "--chat-template", TEMPLATE]
    with subprocess.Popen([*command, "--trust-remote-code"], stderr=subprocess.PIPE, text=True) as process:
        while "Starting httpd" not in (line := process.stderr.readline()):
            assert line, "the server ended"
        yield port
        process.terminate()


def answer(port, path, **request):
    """The first choice of the server's answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found["choices"][0]


def test_the_server_says_what_generate_says(directory, server):
    model, tokenizer = mlx_lm.load(str(directory), {"chat_template": TEMPLATE}, trust_remote_code=True)
    request = {"model": str(directory), "max_tokens": 8, "temperature": 0.0}
    said = answer(server, "/v1/completions", prompt="w1 w2 w9", **request)["text"]
    assert said and said == mlx_lm.generate(model, tokenizer, "w1 w2 w9", max_tokens=8)
    messages = [{"role": "user", "content": "w5 w3"}]
    said = answer(server, "/v1/chat/completions", messages=messages, **request)["message"]["content"]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert said and said == mlx_lm.generate(model, tokenizer, prompt, max_tokens=8)
