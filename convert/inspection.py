"""``duo-mlx convert inspect``: what a checkpoint is, from its headers and its configuration; no tensor is loaded."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from duo_mlx.config import Config
from duo_mlx.convert import keymaps, matformer, packing, plan, settings
from duo_mlx.convert import source as sources
from duo_mlx.convert.readers import gguf_header, open_checkpoint
from duo_mlx.convert.readers.text import read_object
from duo_mlx.convert.tensors import Checkpoint, Tensors
from duo_mlx.convert.tokenizer import write_tokenizer
from duo_mlx.errors import DuoError

LAYER = re.compile(r"[^0-9]+\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint; None where neither its tensors nor its configuration say."""

    source: str
    kind: str  # "Duo", "dense" or "unknown"
    architecture: str | None  # config.json's model_type
    format: str  # "safetensors", "PyTorch" or "GGUF"
    files: tuple[str, ...]
    bytes: int  # of the files
    tensors: int
    parameters: int
    dtypes: dict[str, int]  # how many tensors are stored in which type
    quantised: str | None  # as MLX does it
    key_map: str | None  # that fits the names
    layers: int | None
    small_layers: int | None  # that have a small FFN
    hidden_size: int | None
    attention_heads: int | None
    key_value_heads: int | None
    head_dim: int | None
    intermediate_size: int | None  # big's, or a dense FFN's
    small_intermediate_size: int | tuple[int, ...] | None  # one for all layers, or one a layer
    vocab_size: int | None
    tied_head: bool | None
    attention_bias: bool
    mlp_bias: bool
    router: bool
    tokenizer: str | None
    problems: tuple[str, ...]  # why it cannot be converted as it is
    commands: tuple[str, ...]  # what can be done with it

    def lines(self) -> list[str]:
        """For a reader."""
        heads = None
        if self.attention_heads is not None:
            heads = f"{self.attention_heads}, {self.key_value_heads} of keys and values, {self.head_dim} wide"
        ffn = None if self.intermediate_size is None else f"{self.intermediate_size} wide"
        if self.kind == "Duo":
            ffn = f"big {self.intermediate_size} wide, small {_range(self.small_intermediate_size)} wide"
            if self.small_layers not in (self.layers, None):
                ffn += f" in {self.small_layers} layers"
        biases = [name for name, there in (("attention", self.attention_bias), ("FFN", self.mlp_bias)) if there]
        rows = {
            "is": f"{self.kind}{f', {self.architecture}' if self.architecture else ''}",
            "format": f"{self.format}, {self.bytes / 1e6:.1f} MB",
            "files": f"{self.files[0]} ... {self.files[-1]}, {len(self.files)} in all"
            if self.files[2:]
            else ", ".join(self.files),
            "tensors": f"{self.tensors}, {self.parameters / 1e6:.1f} million parameters",
            "stored as": ", ".join(f"{name} ({count})" for name, count in self.dtypes.items()),
            "quantised": self.quantised,
            "names": self.key_map,
            "layers": self.layers,
            "hidden": self.hidden_size,
            "heads": heads,
            "FFN": ffn,
            "router": "yes" if self.router else None,
            "biases": " and ".join(biases) or None,
            "vocabulary": self.vocab_size,
            "head": {True: "tied to the embedding", False: "its own", None: None}[self.tied_head],
            "tokenizer": self.tokenizer or "none",
        }
        lines = [f"{name:<11} {value}" for name, value in rows.items() if value is not None]
        lines += [f"{'problem':<11} {problem}" for problem in self.problems]
        return lines + [f"{'command':<11} {command}" for command in self.commands]


def describe(source: str | Path, *, config: Path | None = None, revision: str | None = None) -> Inspection:
    """What the checkpoint ``source`` is; see `duo_mlx.convert.readers.open_checkpoint` for the arguments.

    Raises:
        DuoError: there is none, or it is damaged.
    """
    return inspect(open_checkpoint(source, config=config, revision=revision, bare=True), str(source))


def inspect(checkpoint: Checkpoint, source: str) -> Inspection:
    """What ``checkpoint``, which a user calls ``source``, is."""
    problems: list[str] = []
    config = checkpoint.config
    keymap, tensors = None, dict(checkpoint.tensors)
    try:
        keymap = sources.detect(checkpoint, str(settings.named_base(config)))
        # how many heads to permute, only a configuration says; here rows need not be in their places
        tensors = keymaps.named(keymap.name, None if config else "half").to_canonical(checkpoint.tensors, config)
    except DuoError as error:  # unknown names, or a configuration without what this map needs
        problems.append(_unsupported(checkpoint) or str(error))
    tensors = plan.kept(tensors, tied=False)
    rows, kind = _rows(tensors), _kind(config, tensors)
    known: Config | None = None
    if keymap is not None and not problems:
        known, problems = _understood(checkpoint, kind)
    quantised = _quantised(config)
    problems += _tokenizer_problems(checkpoint, known.vocab_size) if known and kind != "unknown" else []
    tied, queries = config.get("tie_word_embeddings"), rows.get("self_attn.q_proj.weight")
    heads = known.num_attention_heads or None if known else config.get("num_attention_heads")
    head_dim = known.head_dim or None if known else config.get("head_dim")
    if head_dim is None and queries is not None and type(heads) is int and heads > 0:
        head_dim = queries // heads
    width = known.intermediate_size or None if known else None
    embedded = rows.get("model.embed_tokens.weight", config.get("vocab_size"))
    return Inspection(
        source=source,
        kind=kind,
        architecture=config.get("base_model_type", config.get("model_type")),
        format=checkpoint.format,
        files=tuple(file.name for file in checkpoint.files),
        bytes=sum(file.stat().st_size for file in checkpoint.files),
        tensors=len(checkpoint.tensors),
        parameters=_parameters(checkpoint),
        dtypes=dict(Counter(tensor.stored or tensor.dtype for tensor in checkpoint.tensors.values()).most_common()),
        quantised=quantised,
        key_map=None if keymap is None else keymap.name,
        layers=known.num_hidden_layers if known else config.get("num_hidden_layers") or _layers(tensors, "") or None,
        small_layers=_layers(tensors, ".small.down_proj.weight") or None,
        hidden_size=known.hidden_size if known else config.get("hidden_size", rows.get("model.norm.weight")),
        attention_heads=heads,
        key_value_heads=known.num_key_value_heads or None if known else config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate_size=width or rows.get("mlp.big.gate_proj.weight", rows.get("mlp.gate_proj.weight")),
        small_intermediate_size=known.small_intermediate_size or None
        if known
        else next((rows[name] for name in rows if name.endswith(".small.gate_proj.weight")), None),
        vocab_size=known.vocab_size if known else embedded,
        tied_head=("lm_head.weight" not in tensors if rows else None) if tied is None else bool(tied),
        attention_bias=any(name.endswith("q_proj.bias") for name in tensors),
        mlp_bias=any(name.endswith("gate_proj.bias") and ".small." not in name for name in tensors),
        router=kind == "Duo" and any(settings.ROUTER.match(name) for name in tensors),
        tokenizer=_tokenizer(checkpoint),
        problems=tuple(problems),
        commands=_commands(source, checkpoint, kind, quantised is not None, keymap is not None, bool(problems)),
    )


def _range(width: int | tuple[int, ...] | None) -> str:
    """A width, or those from the narrowest to the widest."""
    return f"{min(width)} to {max(width)}" if isinstance(width, tuple) else str(width)


def _rows(tensors: Tensors) -> dict[str, int]:
    """How many rows a tensor has, by its name in a layer (of the first layer that has it) or in the model."""
    rows: dict[str, int] = {}
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if tensor.shape:
            rows.setdefault(match[2] if match else name, tensor.shape[0])
    return rows


def _kind(config: Mapping[str, Any], tensors: Tensors) -> str:
    if settings.is_duo(config) or any(".small." in name for name in tensors):
        return "Duo"
    named = config.get("model_type") is not None or any(name.endswith(".mlp.gate_proj.weight") for name in tensors)
    return "dense" if named else "unknown"


def _layers(tensors: Tensors, ending: str) -> int:
    matches = (LAYER.fullmatch(name) for name in tensors if name.endswith(ending))
    return len({match[1] for match in matches if match})


def _understood(checkpoint: Checkpoint, kind: str) -> tuple[Config | None, list[str]]:
    """The configuration, and why `duo-mlx convert` would refuse the checkpoint, as far as headers tell."""
    if not checkpoint.config:
        return None, ["there is no config.json; give one with --config FILE"]
    try:
        found = sources.describe(checkpoint, checkpoint.source, graft=kind == "dense")
        found.check()
    except plan.MisfitError:
        pass
    except DuoError as error:
        return None, [str(error)]
    config, misfits = Config.from_dict(found.config), plan.misfits(found.tensors, found.expected)
    if not misfits:
        return config, []
    return config, [f"{len(misfits)} tensors do not fit config.json ({misfits[0]}); --dry-run lists them"]


def _unsupported(checkpoint: Checkpoint) -> str | None:
    """What the configuration alone forbids, which says more than names that fit no key map."""
    if not checkpoint.config or packing.is_quantised(checkpoint.config):
        return None
    try:
        settings.settings(checkpoint.config, checkpoint.source)
    except DuoError as error:
        return str(error)
    return None


def _tokenizer_problems(checkpoint: Checkpoint, size: int) -> list[str]:
    """Why the tokenizer would be refused."""
    with TemporaryDirectory() as made:
        try:
            write_tokenizer(checkpoint, Path(made), size)
        except DuoError as error:
            return [str(error)]
    return []


def _quantised(config: Mapping[str, Any]) -> str | None:
    if not packing.is_quantised(config):
        return settings.foreign_quantisation(config)
    said = config["quantization"]
    special = Counter(value["bits"] for value in said.values() if isinstance(value, dict) and "bits" in value)
    others = "".join(f", {count} modules in {bits} bits" for bits, count in sorted(special.items()))
    return f"by MLX, {said.get('bits')} bits in groups of {said.get('group_size')}{others}"


def _parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the tensors stand for; scales and biases of a quantised module are none of them."""
    if not packing.is_quantised(checkpoint.config):
        return sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    said, total = checkpoint.config["quantization"], 0
    for name, tensor in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        packed = f"{module}.scales" in checkpoint.tensors
        if not packed or kind not in ("weight", "scales", "biases"):
            total += prod(tensor.shape)
        elif kind == "weight":
            own = said.get(module)
            bits = own.get("bits") if isinstance(own, dict) else said.get("bits")
            total += prod(tensor.shape) * 32 // (bits or 32)
    return total


def _tokenizer(checkpoint: Checkpoint) -> str | None:
    source = checkpoint.source
    if checkpoint.format == "GGUF":
        metadata = gguf_header.read(checkpoint.files[0]).metadata
        kind = metadata.get("tokenizer.ggml.model")
        if kind is None:
            return None
        count = len(metadata.get("tokenizer.ggml.tokens", ()))
        chat = ", with a chat template" if "tokenizer.chat_template" in metadata else ""
        return f"in the GGUF file, {kind}, {count} entries{chat}"
    directory = source if source.is_dir() else source.parent
    if (directory / "tokenizer.json").is_file():
        try:
            model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            kind, count = model.get("type"), len(model["vocab"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return "tokenizer.json, which is damaged"
        chat = ", with a chat template" if _has_template(directory) else ""
        return f"tokenizer.json, {kind or 'of an unnamed kind'}, {count} entries{chat}"
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return "vocab.json and merges.txt"
    return "tokenizer.model, sentencepiece" if (directory / "tokenizer.model").is_file() else None


def _has_template(directory: Path) -> bool:
    if any((directory / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json")):
        return True
    try:
        return "chat_template" in read_object(directory / "tokenizer_config.json")
    except (OSError, DuoError):
        return False


def _commands(
    source: str, checkpoint: Checkpoint, kind: str, quantised: bool, named: bool, problems: bool
) -> tuple[str, ...]:
    path = shlex.quote(source)
    convert = f"duo-mlx convert {path}"
    if kind == "Duo" and "model_file" in checkpoint.config and checkpoint.format == "safetensors" and not problems:
        runs = f"duo-mlx generate --model {path} PROMPT"
        if quantised:
            return runs, f"{convert} DST --to torch --dequantise"
        return runs, f"{convert} DST --to torch", f"{convert} DST --bits 4"
    if not named:
        return (f"{convert} DST --key-map FILE --dry-run",)
    given = "" if checkpoint.config else " --config FILE"
    if problems and not given:
        return ()
    if kind == "dense":
        how = "--slicing E2B" if checkpoint.config.get("model_type") == matformer.KIND else "--graft --calibrate TEXT"
        return (f"{convert} DST {how}{given}",)
    return (f"{convert} DST --verify{given}",) if kind == "Duo" else ()
