"""Stock mlx-lm's batches and LoRA training with Duos in three bases."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import linear_to_lora_layers

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.model import Model
from tests.architectures import ARCHITECTURES

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [12]]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def loaded(request, tmp_path_factory, write_tokenizer):
    """A saved Duo and its tokenizer, as mlx-lm loads them."""
    own = {"model_type": "duo", "base_model_type": request.param, "small_intermediate_size": 32}
    config = ARCHITECTURES[request.param].config | own | {"default_route": "B-s"}
    config.pop("rope_scaling", None)  # transformers' tokenizer loading checks it, and fails for an unknown model_type
    mx.random.seed(0)
    directory = tmp_path_factory.mktemp("model")
    checkpoint.save(directory, config, checkpoint.parameters(Model(Config.from_dict(config))))
    write_tokenizer(directory)
    model, tokenizer = mlx_lm.load(str(directory), trust_remote_code=True)
    tokenizer._eos_token_ids = set()
    return model, tokenizer


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
    tokens = mx.array([PROMPTS[1]])

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    first, gradients = nn.value_and_grad(model, loss)(model)
    optim.SGD(0.01).update(model, gradients)
    after = dict(tree_flatten(model.parameters()))
    changed = {name for name, value in after.items() if not mx.array_equal(value, before[name]).item()}
    assert changed and all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in changed)
    assert {".0.mlp.big." in name for name in changed} == {True, False}
    assert any(".2.mlp.small." in name for name in changed) and not any(".0.mlp.small." in name for name in changed)
    assert loss(model).item() < first.item()
