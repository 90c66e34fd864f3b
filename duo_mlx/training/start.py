"""What training starts from: a new model's weights, or those of a model directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx import checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.model import Config, Model
from duo_mlx.training.stage import randomness

STD = 0.02  # of new weights
WEIGHTS = 2  # where their random numbers are, beside those of training and validation
TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """A new model: Llama's shape with a big and a small FFN in every layer, one embedding for input and output."""

    layers: int = 12
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    big: int = 896
    small: int = 56
    skip_scope: str = "ffn"

    def config(self, vocabulary: int, length: int) -> dict[str, Any]:
        """The config.json of a model with that many ids and that context.

        Raises:
            DuoError: sizes do not go together.
        """
        config = {
            "model_type": "duo",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.big,
            "small_intermediate_size": self.small,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": length,
            "vocab_size": vocabulary,
            "tie_word_embeddings": True,
            "skip_scope": self.skip_scope,
            "default_route": "big",
        }
        Config.from_dict(config)
        return config


def initialised(model: Model, seed: int) -> dict[str, mx.array]:
    """New weights by name: normal with `STD`, into the residual stream less by sqrt(2 layers), norms 1 and biases 0."""
    shrunk = (2 * model.config.num_hidden_layers) ** -0.5
    found = {}
    for number, (name, each) in enumerate(sorted(checkpoint.parameters(model).items())):
        if each.ndim < 2:
            found[name] = mx.zeros(each.shape) if name.endswith("bias") else mx.ones(each.shape)
            continue
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        key = mx.array(randomness(seed, WEIGHTS, number).integers(1 << 32, size=2, dtype="uint32"))
        found[name] = mx.random.normal(each.shape, scale=STD * (shrunk if into_residual else 1), key=key)
    return found


def weights_of(directory: Path, changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The configuration and the weights, unread, of a model directory to train.

    ``changes`` are put over the configuration. Parameters that it has only by them begin with zeros, and so do routers
    that they are about.

    Raises:
        DuoError: it is no Duo model, or a quantised one.
    """
    config = checkpoint.read_config(directory)
    if config.get("quantization"):
        raise DuoError(
            f"{directory}: is quantised; train the model in floating point and quantise the result with convert --bits"
        )
    weights = checkpoint.parameters(checkpoint.read_model(directory))
    changed = {key: value for key, value in (config | dict(changes)).items() if key != "quantization_config"}
    if changes:
        shapes = checkpoint.parameters(Model(Config.from_dict(changed)))
        anew = "router_choices" in changes
        same = {
            name: each
            for name, each in weights.items()
            if name in shapes and each.shape == shapes[name].shape and not (anew and ".router." in name)
        }
        weights = {name: same.get(name, mx.zeros(each.shape)) for name, each in shapes.items()}
    return changed, weights


def learn(model: Model, names: set[str]) -> None:
    """Let the parameters of these names learn, and no others."""
    model.freeze()
    for path, module in model.named_modules():
        if own := [key for key in module if f"{path}.{key}".removeprefix(".") in names]:
            module.unfreeze(recurse=False, keys=own)
