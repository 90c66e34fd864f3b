"""Gemma 3n's slicings: which of its weights are a smaller model that was trained along with them (MatFormer).

A slicing says how many of big's first neurons each layer's small FFN has, and which layers the small route skips.
Google's notebook "MatFormer Lab" cuts models by the published ones, which are in the dataset
google/gemma3n-slicing-configs on Hugging Face. Nothing is trained or fitted here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duo_mlx.convert import plan
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError
from duo_mlx.model import Model

KIND = "gemma3n"  # the base that has them
DEFAULT = "E2B"
WIDTH = 8192  # of the letter s below
# One letter a layer: s small (8,192 of 16,384 neurons), B big, - skipped. Names say the effective parameters, and
# whether widths differ by layer or by block of four local layers and a global one.
PUBLISHED = {
    "E2B": "sssss sssss sssss sssss ----- sssss sssss",
    "E1.96B-layer": "ssssB sssss sssss sssss ----- sssss sssss",
    "E2.54B-layer": "ssssB sssss sssss sssss BBBBB sssss sssss",
    "E2.69B-layer": "ssssB ssssB ssssB ssssB BBBBB sssss sssss",
    "E2.98B-layer": "sssss sssss sssss BBBBB BBBBB sssss BBBBB",
    "E3.18B-layer": "ssssB ssssB BBBBB BBBBB BBBBB ssssB ssssB",
    "E3.39B-layer": "ssssB ssssB BBBBB BBBBB BBBBB BBBBB ssssB",
    "E3.59B-layer": "ssssB BBBBB BBBBB BBBBB BBBBB BBBBB ssssB",
    "E3.79B-layer": "ssssB BBBBB BBBBB BBBBB BBBBB BBBBB BBBBB",
    "E2.49B-block": "sssss sssss sssss sssss BBBBB sssss sssss",
    "E2.73B-block": "sssss sssss sssss BBBBB BBBBB sssss sssss",
    "E2.98B-block": "sssss sssss BBBBB BBBBB BBBBB sssss sssss",
    "E3.24B-block": "sssss sssss BBBBB BBBBB BBBBB BBBBB sssss",
    "E3.49B-block": "sssss BBBBB BBBBB BBBBB BBBBB BBBBB sssss",
    "E3.79B-block": "sssss BBBBB BBBBB BBBBB BBBBB BBBBB BBBBB",
}


class Slicing(NamedTuple):
    """Widths and skipped layers."""

    widths: tuple[int, ...]  # one a layer; 0 where small is big, or skips
    skips: tuple[int, ...]  # layers

    @property
    def keys(self) -> dict[str, Any]:
        """What config.json says of it."""
        skipped = {layer: width for layer, width in enumerate(self.widths) if layer not in self.skips}
        same = len(set(skipped.values())) == 1
        widths = next(iter(skipped.values())) if same else list(self.widths)
        made = {"small_kind": "nested", "small_intermediate_size": widths, "skip_scope": "layer"}
        return made | ({"small_skips": list(self.skips)} if self.skips else {})


def sliced(
    model: Model, config: Mapping[str, Any], tensors: Tensors, spec: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a Duo's config.json and tensors, whose small FFNs are parts of a dense model's.

    Args:
        model: an empty one of the dense model.
        config: the dense model's, as a Duo's without small FFNs.
        tensors: by the Duo's names.
        spec: a name of `PUBLISHED` or a JSON file; None: `DEFAULT`.

    Raises:
        DuoError: there is no such slicing, or it does not fit the model.
    """
    if model.kind != KIND:
        raise DuoError(f"--slicing {spec}: is for {KIND} alone, and this is a {model.kind}; --graft makes a Duo of it")
    shapes = plan.shapes_of(model)
    neurons = [shapes[f"{path}.big.gate_proj.weight"][0] for path in model.ffn_paths]
    found = read(DEFAULT if spec is None else spec, neurons)
    _check_sharing(found.skips, model.config.base["text_config"])
    smalls: dict[str, Tensor] = {}
    for path, width, whole in zip(model.ffn_paths, found.widths, neurons, strict=True):
        down = f"{path}.big.down_proj."
        for name, tensor in tensors.items() if width else ():
            if name.startswith(down):
                smalls[f"{path}.small.down_proj.{name.removeprefix(down)}"] = _first_columns(tensor, width, whole)
    made = {key: value for key, value in config.items() if key != "small_layers"}
    return made | found.keys, {**tensors, **smalls}


def read(spec: str, neurons: Sequence[int]) -> Slicing:
    """Return the slicing that ``spec`` names, for layers with so many ``neurons``.

    Raises:
        DuoError: it is neither a name nor a file, or does not fit.
    """
    if spec in PUBLISHED:
        letters = PUBLISHED[spec].replace(" ", "")
        skips = [layer for layer, letter in enumerate(letters) if letter == "-"]
        wide = max(neurons)
        widths = [WIDTH if letter == "s" else wide for letter in letters if letter != "-"]
        hint = "; --slicing FILE takes other widths" if len(letters) != len(neurons) else ""
    else:
        widths, skips = _from_file(Path(spec))
        hint = ""
    kept = [layer for layer in range(len(neurons)) if layer not in skips]
    if len(widths) != len(kept) or any(layer >= len(neurons) for layer in skips):
        raise DuoError(
            f"--slicing {spec}: is for {len(widths) + len(skips)} layers, {len(skips)} of them skipped, and the model "
            f"has {len(neurons)}{hint}"
        )
    found = [0] * len(neurons)
    for layer, width in zip(kept, widths, strict=True):
        if width > neurons[layer]:
            raise DuoError(f"--slicing {spec}: layer {layer} has {neurons[layer]} neurons, not {width}")
        found[layer] = width if width < neurons[layer] else 0
    if not any(found):
        raise DuoError(f"--slicing {spec}: no layer has fewer neurons than it has in the model, so nothing is small")
    return Slicing(tuple(found), tuple(skips))


def _from_file(file: Path) -> tuple[list[int], list[int]]:
    """Widths of the layers that stay, and the layers that are skipped, under the names that Google's notebook has."""
    if not file.is_file():
        raise DuoError(f"--slicing {file}: is no file, and no slicing that is known: {', '.join(PUBLISHED)}")
    wanted = f'{file}: must be JSON like {{"ffn_hidden_dims": [8192, 16384], "layers_to_skip": [1]}}'
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DuoError(f"{wanted} ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict) or given.keys() - {"layers_to_skip"} != {"ffn_hidden_dims"}:
        raise DuoError(wanted)
    widths, skips = given["ffn_hidden_dims"], given.get("layers_to_skip", [])
    if not all(isinstance(each, list) and all(type(number) is int for number in each) for each in (widths, skips)):
        raise DuoError(f"{wanted}, with lists of whole numbers")
    if any(width < 1 for width in widths) or any(layer < 0 for layer in skips) or len(set(skips)) < len(skips):
        raise DuoError(f"{wanted}, with widths of at least 1, and each skipped layer once")
    return widths, sorted(skips)


def _check_sharing(skips: Sequence[int], text: Mapping[str, Any]) -> None:
    """Refuse to skip the layers whose keys and values later ones read: then these would read another layer's."""
    own = text["layer_types"][: text["num_hidden_layers"] - text["num_kv_shared_layers"]]
    read = {len(own) - 1 - own[::-1].index(kind) for kind in set(own)} if text["num_kv_shared_layers"] else set()
    if reserved := read & set(skips):
        raise DuoError(f"--slicing: later layers read the keys and values of layer {min(reserved)}, so it must stay")


def _first_columns(tensor: Tensor, width: int, whole: int) -> Tensor:
    """The columns of a down projection, or of its scales, that belong to the first ``width`` of ``whole`` neurons."""
    rows, columns = tensor.shape
    count, rest = divmod(columns * width, whole)
    if rest:
        raise DuoError(f"{tensor.name}: {width} neurons end within a group of quantised weights; convert a float model")
    return tensor.apply(lambda array: array[:, :count], (rows, count))
