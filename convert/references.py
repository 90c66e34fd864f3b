"""What ``--verify`` compares with: a Duo in PyTorch, and why there is none for some.

transformers' own model of the base, hosted by `duo_mlx.convert.torch_host`, is the reference of every architecture that
it has. The readable model of `duo_mlx.convert.reference` stands in for a Llama whose heads rotate neighbours, which
transformers does not know.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from duo_mlx import bases
from duo_mlx.config import Config
from duo_mlx.convert import plan
from duo_mlx.convert.tensors import Tensor, Tensors, to_torch
from duo_mlx.errors import DuoError

if TYPE_CHECKING:
    import torch

TRANSFORMERS = "transformers"  # the names of an export that it loads


class Reference(Protocol):
    """A Duo in PyTorch."""

    def routed(
        self, tokens: "torch.Tensor", routes: "torch.Tensor | None" = None
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return logits ``[batch, tokens, vocab]`` and the routes that were taken; None: its routers decide."""


def lacking(config: Mapping[str, Any]) -> str:
    """Say why PyTorch has no reference for a Duo; empty: it has one. Nothing of weights is needed.

    Raises:
        DuoError: PyTorch or transformers is not installed.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise DuoError("--verify needs PyTorch and transformers: pip install 'duo-mlx[torch]'") from None
    config = _plain(config)
    try:
        if config.get("rope_traditional"):
            _readable(config)
        else:
            _rehearse(config)
    except (DuoError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def note(config: Mapping[str, Any]) -> str:
    """Return a line on a check that is less than that of all routes; empty: it is not less.

    Raises:
        DuoError: as `lacking`.
    """
    reason = lacking(config)
    return f"--verify compares all big with mlx-lm's own model, and no other routes: {reason}" if reason else ""


def made(config: Mapping[str, Any], weights: Tensors) -> Reference:
    """Return the reference with ``weights``, by canonical names.

    Raises:
        DuoError: it does not take them.
    """
    config = _plain(config)
    if config.get("rope_traditional"):
        reference = _readable(config)
        state = {name: to_torch(tensor.load()).float() for name, tensor in weights.items()}
        try:
            reference.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise DuoError(f"--verify: the weights do not fit the reference: {' '.join(str(error).split())}") from None
        return reference
    try:
        return of_transformers(config, transformers_names(config, weights))
    except DuoError as error:
        raise DuoError(f"--verify: the weights do not fit the reference: {error}") from None


def of_transformers(config: Mapping[str, Any], weights: Tensors) -> Reference:
    """Return transformers' model as a Duo, with ``weights`` by the names of `transformers_names`.

    Raises:
        DuoError: it does not take them.
    """
    from duo_mlx.convert.torch_reference import TorchDuo, split

    config = _plain(config)
    own, parts = split(weights, bool(config.get("router_choices")))
    loaded = ({name: to_torch(tensor.load()) for name, tensor in group.items()} for group in (own, parts))
    return TorchDuo(config, *loaded)


def transformers_names(config: Mapping[str, Any], weights: Tensors) -> dict[str, Tensor]:
    """Return canonical ``weights`` under transformers' names, see `duo_mlx.convert.torch_names.to_transformers`.

    Raises:
        DuoError: transformers lacks the base, or what mlx-lm did to its weights cannot be undone.
    """
    from duo_mlx.convert.torch_names import to_transformers

    config = _plain(config)
    base = Config.from_dict(config).base
    model, args = bases.classes(base)
    return to_transformers(config, weights, lambda: model(args.from_dict(base)))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of weights in float, in which a Llama that only slides is a Mistral, as in transformers."""
    made = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    made["base_model_type"] = Config.from_dict(made).base["model_type"]
    slides = set(made.get("layer_types") or ()) == {"sliding_attention"}
    biases = made.get("attention_bias") or made.get("mlp_bias")
    if made["base_model_type"] == "llama" and slides and not biases:
        made["base_model_type"] = "mistral"
    return made


def _rehearse(config: dict[str, Any]) -> None:
    """Make the reference of shapes alone.

    Raises:
        DuoError: there is none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from duo_mlx.convert.torch_host import host
    from duo_mlx.convert.torch_reference import config_type, quiet, transformers_config

    if config_type(config) == "llama" and "sliding_attention" in (config.get("layer_types") or ()):
        raise DuoError("transformers' llama has no sliding_attention")

    def unread() -> mx.array:
        raise AssertionError("a rehearsal reads no weights")

    shapes = plan.expected_shapes(Config.from_dict(config))
    if transformers_config(config, ()).tie_word_embeddings:  # where some bases have a head until they see the weights
        shapes.pop("lm_head.weight", None)
    names = transformers_names(config, {name: Tensor(shape, "float32", unread) for name, shape in shapes.items()})
    with quiet(), torch.device("meta"):
        host(AutoModelForCausalLM.from_config(transformers_config(config, names)), 0)


def _readable(config: dict[str, Any]) -> Any:
    """Return the readable model.

    Raises:
        DuoError, ValueError: it lacks an option of this configuration.
    """
    from duo_mlx.convert.reference import DuoConfig, DuoModel
    from duo_mlx.convert.torch_reference import config_type

    if (kind := config_type(config)) != "llama":
        raise DuoError(f"transformers' {kind} has no rope_traditional")
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise DuoError("a Llama with rope_traditional and sliding_attention has no reference")
    if config.get("small_skips"):
        raise DuoError("a Llama with rope_traditional has no reference for small_skips")
    if config.get("small_activation", "silu") != "silu" or config.get("small_kind", "own") != "own":
        raise DuoError("a Llama with rope_traditional has no reference for nested small FFNs or other gates than silu")
    if not isinstance(config.get("small_intermediate_size", 0), int):
        raise DuoError("a Llama with rope_traditional has no reference for small FFNs of different widths")
    return DuoModel(DuoConfig.from_dict(config)).eval()
