"""What a conversion starts from: a checkpoint under a Duo's names, its configuration in ours, and what does not fit.

Nothing is loaded here but a head beside an embedding of which nobody says whether they are one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from duo_mlx import shards
from duo_mlx.config import Config
from duo_mlx.convert import dense, keymaps, matformer, packing, plan, readers, settings
from duo_mlx.convert.readers.text import shown
from duo_mlx.convert.rope_settings import LIKE_LLAMA
from duo_mlx.convert.sanitised import sanitised
from duo_mlx.convert.tensors import DTYPES, Checkpoint, Tensor, Tensors
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.transformers_config import flattened

OWN = re.compile(r"(.+?)\.(big|small|router)\.(.+)")  # a module of a Duo's layer, in an FFN
EXPERTS = re.compile(r".+\.experts\.(gate_up|down)_proj")  # of gpt-oss in float, as transformers saves them
WRAPPED = "transformer."  # before the names of GPT-2 and its kin, where transformers saved it with a head


@dataclass(frozen=True)
class Source:
    """A Duo model's checkpoint, or a dense model's that is to become one."""

    name: Path  # as the user named it
    checkpoint: Checkpoint
    config: dict[str, Any]  # a Duo's, see `duo_mlx.convert.settings.settings`; of a dense model without small FFNs
    tensors: dict[str, Tensor]  # what is to be written, by a Duo's names; a dense model's FFN is ``big``
    expected: dict[str, tuple[int, ...]]
    dense: bool
    cast: bool = False  # whether weights get another type than they have in the source

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth a line."""
        window = settings.unread_window(self.config)
        kind = self.config["base_model_type"]
        line = (
            f"mlx-lm's {kind} sees whole texts, so beyond {window} tokens it differs from transformers', which slides"
        )
        return () if window is None else (line,)

    @property
    def stock(self) -> Path | None:
        """The directory of a dense model whose tensors are written as they are, if it is one that mlx-lm may load."""
        directory = self.checkpoint.files[0].parent
        untouched = self.dense and not self.cast and self.checkpoint.format == "safetensors"
        return directory if untouched and (directory / "config.json").is_file() else None

    def table(self) -> str:
        """Source, target, shape and type of each tensor, and what does not fit; see `duo_mlx.convert.plan.table`."""
        return plan.table(plan.plan(self.checkpoint.tensors, self.tensors, self.expected))

    def check(self) -> None:
        """Check that weights and configuration agree.

        Raises:
            DuoError: a tensor is of a type that is not written; `MisfitError`: tensors do not fit the configuration.
        """
        kinds = tuple(shards.TYPES) if packing.is_quantised(self.config) else DTYPES
        for name, tensor in self.tensors.items():
            if tensor.dtype not in kinds:
                raise DuoError(
                    f"{self.name}: {shown(tensor.name or name)} is {tensor.dtype}; weights must be {', '.join(DTYPES)} "
                    "(a rule of --key-map with drop = true leaves a tensor out)"
                )
        if misfits := plan.misfits(self.tensors, self.expected):
            raise plan.MisfitError(self.name, misfits)


def open_source(
    source: str | Path,
    *,
    graft: bool = False,
    config: Path | None = None,
    revision: str | None = None,
    key_map: str | None = None,
    rope: str | None = None,
    dtype: str | None = None,
    default_route: str | None = None,
    router_choices: str | None = None,
    slicing: str | None = None,
) -> Source:
    """Open a checkpoint and see what it is.

    Args:
        source, config, revision: see `duo_mlx.convert.readers.open_checkpoint`.
        graft: a dense model is wanted, not a Duo.
        key_map: one of `duo_mlx.convert.keymaps.NAMES` or a file of rules; None: what the names look like.
        rope: the layout of q and k, one of `duo_mlx.convert.keymaps.LAYOUTS`; None: what goes with the names.
        dtype: of all weights, one of `duo_mlx.convert.tensors.DTYPES`; None: as stored.
        default_route, router_choices: go into the configuration in place of what that says.
        slicing: the slicing of a dense Gemma 3n, see `duo_mlx.convert.matformer`.

    Raises:
        DuoError: it cannot be read or mapped, is not supported, or is not what ``graft`` says. What does not fit the
            configuration is left to `Source.check`.
    """
    name = Path(source)

    def judge(said: dict[str, Any]) -> None:
        _judge(said, name, graft, dtype, default_route, router_choices, slicing)

    checkpoint = readers.open_checkpoint(source, config=config, revision=revision, judge=judge)
    _refuse_quantised(checkpoint.config, name, dtype)
    found = _open(checkpoint, name, graft, key_map, rope, default_route, router_choices, slicing)
    return found if dtype is None else _cast(found, dtype)


def _judge(
    config: dict[str, Any],
    name: Path,
    graft: bool,
    dtype: str | None,
    default_route: str | None,
    router_choices: str | None,
    slicing: str | None,
) -> None:
    """Refuse what a config.json alone shows to be no source, before weights are downloaded."""
    config = flattened(config)
    _refuse_quantised(config, name, dtype)
    if packing.is_translated(config):  # only the weights show whether mlx-lm takes them
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    made = settings.settings(config, name)
    _check_kind(config, {}, name, graft, _is_cut(made, config, graft, slicing))
    if default_route is not None:
        made["default_route"] = default_route
    if router_choices is not None:
        made["router_choices"] = router_choices
    _empty(made, name)


def _open(
    checkpoint: Checkpoint,
    name: Path,
    graft: bool,
    key_map: str | None = None,
    rope: str | None = None,
    default_route: str | None = None,
    router_choices: str | None = None,
    slicing: str | None = None,
) -> Source:
    made = settings.settings(checkpoint.config, name)
    if default_route is not None:
        made["default_route"] = default_route
    if rope is not None and checkpoint.format == "GGUF":
        raise DuoError(f"--rope {rope}: a GGUF file says by its architecture how its rows lie; leave the option out")
    mapped = _mapped(checkpoint, made, key_map, rope, name)
    cut = _is_cut(made, checkpoint.config, graft, slicing)
    _check_kind(checkpoint.config, mapped, name, graft, cut)
    mapped = plan.kept(mapped, tied=False)
    routers = mapped if settings.is_duo(checkpoint.config) else {}
    made = settings.settle_router(made, router_choices, routers, name)
    made = settings.settle_head(made, mapped, name)
    mapped = plan.kept(mapped, made.get("tie_word_embeddings") is True)
    model = _empty(made, name)
    tensors = in_duo(model, mapped, name, sanitise="model_file" not in checkpoint.config)
    if cut:
        made, tensors = matformer.sliced(model, made, tensors, slicing)
        model = dense.empty(Config.from_dict(made))
    if packing.is_quantised(made):
        if not settings.is_duo(checkpoint.config):
            how = made["quantization"].items()
            made["quantization"] = {
                model.big_name(key) if isinstance(value, dict | bool) else key: value for key, value in how
            }
        dense.pack(model, made["quantization"], tensors)
    return Source(name, checkpoint, made, tensors, plan.shapes_of(model), graft or cut)


def _is_cut(made: Mapping[str, Any], config: Mapping[str, Any], graft: bool, slicing: str | None) -> bool:
    """Whether a dense model becomes a Duo by a slicing."""
    if graft:
        return False
    return slicing is not None or (made["base_model_type"] == matformer.KIND and not settings.is_duo(config))


def _empty(config: Mapping[str, Any], source: Path) -> Model:
    try:
        return dense.empty(Config.from_dict(dict(config)))
    except DuoError as error:
        raise DuoError(f"{source}: {error}") from None


def describe(checkpoint: Checkpoint, name: Path, graft: bool) -> Source:
    """Return what `open_source` makes of an open checkpoint, in the names and the settings that are its own."""
    return _open(checkpoint, name, graft)


def in_duo(model: Model, tensors: Tensors, source: Path, sanitise: bool = True) -> dict[str, Tensor]:
    """Return ``tensors`` by the names of the empty Duo ``model``.

    Args:
        model: of the configuration.
        tensors: by the names that the base has in a checkpoint, with ``big``, ``small`` and ``router`` in the FFNs of a
            Duo.
        source: for messages.
        sanitise: bring the base's part into mlx-lm's form; a Duo that this package wrote has it.

    Raises:
        DuoError: the base does not take them.
    """
    if not sanitise:
        return dict(tensors)
    theirs: dict[str, Tensor] = {}  # the base's part
    own: list[tuple[str, str, Tensor]] = []  # what only a Duo has: the FFN, the name in it
    big_of: dict[str, str] = {}  # the FFN that a tensor is big in, by the name in the source
    duo = any(".small." in name for name in tensors)
    for name, tensor in tensors.items():
        match = OWN.fullmatch(name) if duo else None
        if match is None:
            theirs[name] = tensor
        elif match[2] == "big":
            theirs[f"{match[1]}.{match[3]}"] = tensor
            big_of[tensor.name] = match[1]
        else:
            own.append((match[1], f"{match[2]}.{match[3]}", tensor))
    if not any(name.startswith(WRAPPED) for name in plan.shapes_of(model)):
        theirs = {name.removeprefix(WRAPPED): tensor for name, tensor in theirs.items()}
    if model.kind == "gpt_oss":
        theirs = dict(_outputs_first(name, tensor) for name, tensor in theirs.items())
    found: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}  # what the FFNs are called there, and here
    for name, tensor in sanitised(model, theirs, source).items():
        there = big_of.get(tensor.name.partition(" + ")[0])
        here = next((path for path in model.ffn_paths if name.startswith(f"{path}.")), None)
        if there is not None and here is not None:
            renamed[there] = here
        unknown = there is not None and here is None and name.startswith(f"{there}.")
        found[f"{there}.big{name.removeprefix(str(there))}" if unknown else model.big_name(name)] = tensor
    return found | {f"{renamed.get(ffn, ffn)}.{rest}": tensor for ffn, rest, tensor in own}


def _outputs_first(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Experts that lie inputs first, in the layout and under the name that mlx-lm reads."""
    if not EXPERTS.fullmatch(name) or len(tensor.shape) != 3:
        return name, tensor
    count, inputs, outputs = tensor.shape
    return f"{name}.weight", tensor.apply(lambda array: array.swapaxes(1, 2), (count, outputs, inputs))


def _mapped(
    checkpoint: Checkpoint, config: Mapping[str, Any], key_map: str | None, rope: str | None, source: Path
) -> dict[str, Tensor]:
    """The tensors by transformers' names, or by those of a Duo that this package wrote."""
    found: keymaps.KeyMap
    if key_map is None:
        found = detect(checkpoint, config["base_model_type"], source, rope)
    elif key_map in keymaps.NAMES or not Path(key_map).exists():
        found = keymaps.named(key_map, rope)
    else:
        found = keymaps.from_file(Path(key_map), rope)
    return plan.mapped(checkpoint.tensors, found, config, source)


def detect(checkpoint: Checkpoint, kind: str, source: Path | None = None, rope: str | None = None) -> keymaps.KeyMap:
    """The key map that fits the names of a checkpoint of the base ``kind``; most bases have transformers' names alone.

    Raises:
        DuoError: none fits a Llama's names.
    """
    if kind in LIKE_LLAMA and checkpoint.format != "GGUF":
        return keymaps.detect(checkpoint.tensors, source, rope)
    return keymaps.named("canonical", rope)


def _check_kind(config: Mapping[str, Any], tensors: Tensors, source: Path, graft: bool, cut: bool) -> None:
    if settings.is_duo(config):
        if cut:
            raise DuoError(f"{source}: is a Duo model already, so there is nothing to slice; leave out --slicing")
        if graft:
            raise DuoError(f"{source}: is a Duo model already, so there is nothing to graft; leave out --graft")
    elif any(".small." in name for name in tensors):
        raise DuoError(f"{source}: holds small FFNs, but its config.json has no small_intermediate_size")
    elif not graft and not cut:
        raise DuoError(f"{source}: is a dense model, not a Duo; --graft makes a Duo of it")


def _refuse_quantised(config: Mapping[str, Any], source: Path, dtype: str | None) -> None:
    if packing.quantization(config) is None:
        return
    if settings.is_duo(config):
        raise DuoError(
            f"{source}: is a Duo that MLX quantised; only --to torch --dequantise takes it. For other weights "
            "convert the model that it was made of"
        )
    if dtype is not None:
        raise DuoError(f"--dtype {dtype}: {source} is quantised, and its weights stay as they are stored; leave it out")


def _cast(source: Source, dtype: str) -> Source:
    tensors = {
        name: tensor.astype(dtype) if tensor.dtype in DTYPES else tensor for name, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors, config=settings.with_dtype(source.config, dtype), cast=True)
