"""Back to PyTorch: a model directory as a state dict, or as a directory of safetensors, in names of one's choice."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.convert import references, stored, tokenizer
from duo_mlx.convert.keymaps import named
from duo_mlx.convert.tensors import Tensor, Tensors, to_torch
from duo_mlx.convert.writer import write_weights
from duo_mlx.errors import DuoError
from duo_mlx.files import output_directory, output_file, refuse_overlap, write_text

PICKLES = (".pt", ".pth", ".bin")
OURS = ("model_file", "quantization", "quantization_config")  # keys of config.json that mean nothing to PyTorch


def export(
    source: Path,
    destination: Path,
    *,
    names: str = references.TRANSFORMERS,
    dequantise: bool = False,
    force: bool = False,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Write a model directory's weights for PyTorch.

    With the names "transformers", that package loads the base, and the small FFNs lie beside it; with canonical names
    `duo_mlx.convert.reference` loads a Llama.

    Args:
        source: a model directory.
        destination: a name in ``.pt``, ``.pth`` or ``.bin`` becomes a state dict, every other a directory with
            config.json, safetensors and the tokenizer. It must not exist, unless ``force`` is given.
        names: "transformers", or a key map's, see `duo_mlx.convert.keymaps.NAMES`.
        dequantise: let a quantised model become the numbers that it stands for, in the type of its scales.
        force: replace what is there.
        verify: is called with what was written, before it gets its name; what it raises leaves nothing written.

    Raises:
        DuoError: the source is no Duo model, damaged, or quantised without ``dequantise``; the destination exists or
            cannot be written; or PyTorch is not installed, which a state dict needs.
    """
    refuse_overlap(source, destination)
    if destination.suffix == ".safetensors":
        raise DuoError(f"{destination}: give a directory, or a name in {', '.join(PICKLES)}")
    config = checkpoint.read_config(source)
    weights: Mapping[str, Tensor] = stored.weights(source, dequantise="stored" if dequantise else None)
    plain = {key: value for key, value in sorted(config.items()) if key not in OURS}
    if names == references.TRANSFORMERS:
        weights = _for_transformers(source, config, weights)
        plain["model_type"] = plain.pop("base_model_type", "llama")
    else:
        weights = named(names).from_canonical(weights, config)
    if destination.suffix in PICKLES:
        with output_file(destination, force) as file:
            _save_state(file, weights)
            if verify is not None:
                verify(file)
        return
    with output_directory(destination, force) as directory:
        write_text(directory / "config.json", json.dumps(plain, indent=2, sort_keys=True) + "\n")
        write_weights(directory, weights, metadata={"format": "pt"}, allow_nonfinite=True)
        tokenizer.write(source, directory, Config.from_dict(config).vocab_size)
        if verify is not None:
            verify(directory)


def _for_transformers(source: Path, config: dict[str, Any], weights: Tensors) -> Tensors:
    try:
        return references.transformers_names(config, weights)
    except ImportError:
        raise DuoError(
            "the names of transformers need it: pip install 'duo-mlx[torch]'; --names canonical does not"
        ) from None
    except DuoError as error:
        raise DuoError(f"{source}: {error}; --names canonical writes it in mlx-lm's names") from None


def _save_state(file: Path, weights: Tensors) -> None:
    try:
        import torch
    except ImportError:
        raise DuoError(
            f"{file.suffix}: writing it needs PyTorch: pip install 'duo-mlx[torch]'; a directory does not"
        ) from None
    state = {name: to_torch(tensor.load()) for name, tensor in weights.items()}
    try:
        torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise DuoError(f"{file}: cannot be written: {' '.join(str(error).split())}") from error
