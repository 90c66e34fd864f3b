"""Model directories: load one (a path, a hub id or the embedded model) and write one.

A model directory is what mlx-lm expects (config.json, model*.safetensors, tokenizer files) plus a ``model_file``, three
lines that hand stock mlx-lm the architecture from this package. `load` never runs that file nor any other code from a
model directory.

mlx-lm, transformers and the hub's library are imported where they are used: they take seconds, and who only writes a
directory does not need them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from duo_mlx import shards
from duo_mlx.config import VERSION
from duo_mlx.device import on_cpu
from duo_mlx.errors import DuoError
from duo_mlx.files import foreign_content, output_file, write_text
from duo_mlx.routes import Route, Routes
from duo_mlx.transformers_config import flattened, nested

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from duo_mlx.model import Model

EMBEDDED = Path(__file__).parent / "embedded"

MODEL_FILE = "duo_model.py"
MODEL_FILE_TEXT = '''"""Lets stock mlx-lm load this directory (trust_remote_code); needs the package duo-mlx."""

from duo_mlx.model import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]
'''

# keys of config.json, beside those of routers
CHOOSING = ("default_route", "default_draft", "draft_vocabulary", "best_patterns")

HUB_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.jinja", "*.txt"]


def load(
    path: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    lazy: bool = False,
    fuse: bool = False,
) -> "tuple[Model, TokenizerWrapper]":
    """Load a Duo model and its tokenizer.

    Args:
        path: a model directory or a Hugging Face hub id; None: the embedded model.
        revision: branch, tag or commit of a hub id.
        dtype: of the floating-point weights. None: as stored, but float32 on the CPU, where MLX computes nothing
            else at speed.
        lazy: leave each weight unread until it is used.
        fuse: decode faster on a CPU; the weights must not be changed afterwards, see `duo_mlx.cpu`.

    Raises:
        DuoError: there is no such model, it is no Duo model, or its files are damaged.
    """
    directory = resolve(path, revision)
    model = read_model(directory)
    if dtype is None and on_cpu():
        dtype = mx.float32
    if dtype is not None:
        model.set_dtype(dtype)
    if on_cpu():
        from duo_mlx import cpu  # a Mac has no use for it

        cpu.quicken(model, fuse)
    if not lazy:
        read_weights(model)
    return model, read_tokenizer(directory, read_config(directory))


def read_weights(model: "Model", pattern: Routes | None = None) -> None:
    """Read the weights of a model that was loaded lazily, but for FFNs that no route of a ``pattern [layers]`` uses."""
    unused: set[int] = set()
    for ffn, route in zip(model.ffns, () if pattern is None else pattern.tolist(), strict=False):
        modules = {Route.BIG: ffn.big, Route.SMALL: ffn.small}
        used = modules.pop(Route(route), None)
        unused |= {
            id(each) for module in modules.values() if module is not used for each in parameters(module).values()
        }
    # the largest first and one by one, so that what reading and casting take beside them is least
    for array in sorted(parameters(model).values(), key=lambda array: -array.nbytes):
        if id(array) not in unused:
            mx.eval(array)


def read_model(directory: Path) -> "Model":
    """The model in a directory with its weights as stored, each unread until it is used.

    Raises:
        DuoError: it is no Duo model, its files are damaged, or the installed mlx-lm's base does not host it.
    """
    from mlx_lm import utils as mlx_lm_utils

    from duo_mlx import guard
    from duo_mlx.model import Model, ModelArgs

    read_config(directory)
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise DuoError(f"{directory}: holds no model*.safetensors, so it is no model directory")
    for file in files:
        _check_safetensors(file)
    try:
        # the empty model_file is what keeps mlx-lm from importing the directory's own
        model, _ = mlx_lm_utils.load_model(
            directory, lazy=True, model_config={"model_file": None}, get_model_classes=lambda **_: (Model, ModelArgs)
        )
        guard.compare_graphs(model)
    except DuoError as error:
        raise DuoError(f"{directory}: {error}") from None
    except ValueError as error:  # mlx-lm's and MLX's word for tensors that do not fit
        raise DuoError(f"{directory}: config.json and weights disagree: {_one_line(error)}") from error
    return model


def resolve(path: str | Path | None, revision: str | None = None) -> Path:
    """The directory that ``path`` means: itself, the embedded model's, or the local copy of a hub repository.

    Raises:
        DuoError: there is none, or config.json, which is downloaded first, is of no Duo that can be hosted.
    """
    if path is None:
        return EMBEDDED
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise DuoError(f"{directory} is a file; a model is a directory with config.json and model*.safetensors")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(str(path), revision=revision, allow_patterns=["config.json"]))
        _judge(directory, str(path))
        return Path(snapshot_download(str(path), revision=directory.name, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise DuoError(f"{path}: there is no such directory, and it is no hub id (OWNER/NAME) either") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = _one_line(error).partition(". ")[0]
        raise DuoError(f"{path}: there is no such directory, and the hub does not give it: {reason}") from None


def _judge(directory: Path, path: str) -> None:
    """Refuse a directory with a config.json of no Duo that can be hosted; ``path`` is what the user said."""
    from duo_mlx.config import Config
    from duo_mlx.model import Model

    try:
        Model(Config.from_dict(read_config(directory)))
    except DuoError as error:
        said = str(error).removeprefix(f"{directory / 'config.json'}: ").removeprefix(f"{directory}: ")
        raise DuoError(f"{path}: {said}") from None
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:  # mlx-lm's and MLX's words
        raise DuoError(f"{path}: config.json makes no model: {_one_line(error)}") from error


def read_config(directory: Path) -> dict[str, Any]:
    """A model directory's config.json, checked to be a Duo's."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DuoError(f"{directory}: holds no config.json, so it is no model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DuoError(f"{file}: {foreign_content(file) or f'is no JSON ({error})'}") from None
    if not isinstance(config, dict):
        raise DuoError(f"{file}: must hold a JSON object")
    if config.get("model_type") != "duo":
        raise DuoError(
            f"{file}: model_type is {config.get('model_type')!r}, so it is a dense model, not a Duo; "
            "duo-mlx convert DIR DST --graft --calibrate TEXT makes a Duo of it"
        )
    return flattened(config)


def read_eos_ids(directory: Path, config: Mapping[str, Any]) -> list[int] | int | None:
    """Read the ids that end a text: generation_config.json's, else config.json's, as mlx-lm does; None: none.

    ``config`` is the directory's config.json.
    """
    try:
        said = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = {}
    found = said.get("eos_token_id") if isinstance(said, dict) else None
    return config.get("eos_token_id") if found in (None, []) else found


def fingerprint(directory: Path, *, choosing: bool = False) -> str:
    """SHA-256 over what a model computes by given routes, as hexadecimal digits.

    That is config.json and the weights, in whatever shards. Left out is what chooses routes: a router, thresholds,
    known patterns and defaults. So what was measured by given routes, such as an oracle's tables, stays that of the
    model when a router is trained for it. With ``choosing`` it is over that alone.
    """
    config = read_config(directory)
    told = {key: value for key, value in config.items() if key != "duo_version"}
    kept = {key: value for key, value in told.items() if (key in CHOOSING or key.startswith("router_")) is choosing}
    whole = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    parts = {}
    for file in sorted(directory.glob("model*.safetensors")):
        _check_safetensors(file)
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            data = opened.tell()
            for name, tensor in header.items():
                if name != "__metadata__" and (".router." in name) is choosing:
                    parts[name] = (file, data, tensor)
    for name, (file, data, tensor) in sorted(parts.items()):
        whole.update(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
        begin, end = tensor["data_offsets"]
        with file.open("rb") as opened:
            opened.seek(data + begin)
            whole.update(opened.read(end - begin))
    return whole.hexdigest()


def _check_safetensors(file: Path) -> None:
    """MLX reads weights late and past a file's end without a word; the safetensors library checks header and size."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        what = foreign_content(file) or f"is damaged or no safetensors file ({_one_line(error)})"
        raise DuoError(f"{file}: {what}") from None


def read_tokenizer(directory: Path, config: dict[str, Any]) -> "TokenizerWrapper":
    """The directory's tokenizer in mlx-lm's wrapper; code from the directory is refused."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from transformers import PretrainedConfig
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of every model_type that is not its own
    try:
        # a configuration without anything: transformers would read the model's own, some of which it cannot
        options = {"trust_remote_code": False, "local_files_only": True, "config": PretrainedConfig()}
        return load_tokenizer(directory, options, eos_token_ids=read_eos_ids(directory, config))
    except Exception as error:  # transformers and tokenizers raise whatever a damaged file leads them to
        for file in sorted(directory.glob("*token*")):
            if what := foreign_content(file):
                raise DuoError(f"{file}: {what}") from None
        raise DuoError(f"{directory}: the tokenizer cannot be read: {_one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def save(directory: Path, config: dict[str, Any], weights: dict[str, mx.array], *, limit: int = shards.LIMIT) -> None:
    """Write config.json, the model file and the weights (in shards of ``limit`` bytes) into an existing directory.

    ``weights`` have canonical names. Tokenizer files are the caller's to bring. See `duo_mlx.files.output_directory`
    for writing a directory whole or not at all.
    """
    save_config(directory, config)
    shards.write(directory, shards.held(weights), limit=limit)


def save_config(directory: Path, config: dict[str, Any]) -> None:
    """Write the config.json of a Duo model, as mlx-lm would, and the model file that it names into a directory."""
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "vision_config")}
    kept = nested(kept) | {"model_type": "duo", "model_file": MODEL_FILE, "duo_version": VERSION}
    if "quantization" in kept:
        kept["quantization_config"] = kept["quantization"]
    write_text(directory / "config.json", json.dumps(dict(sorted(kept.items())), indent=4) + "\n")
    write_text(directory / MODEL_FILE, MODEL_FILE_TEXT)


def save_default_draft(directory: Path, pattern: str, vocabulary: int | None = None) -> None:
    """Make ``pattern`` the ``default_draft`` of the model in a directory, whose config.json keeps all else.

    ``vocabulary``: its ``draft_vocabulary``; None: as it is.
    """
    config = read_config(directory) | {"default_draft": pattern}
    config |= {"draft_vocabulary": vocabulary} if vocabulary else {}
    with output_file(directory / "config.json", force=True) as file:
        write_text(file, json.dumps(nested(config) | {"duo_version": VERSION}, indent=4) + "\n")


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """A model's weights by their canonical names."""
    return dict(tree_flatten(model.parameters()))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
