"""Which files a path means, and which config.json goes with them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duo_mlx.convert.readers import gguf, meta, pytorch, safetensors_file, shards
from duo_mlx.convert.readers.names import unwrapped
from duo_mlx.convert.readers.text import is_file, read_object, shown
from duo_mlx.convert.tensors import Checkpoint, Tensor
from duo_mlx.errors import DuoError
from duo_mlx.files import PICKLES, foreign_content
from duo_mlx.transformers_config import flattened

# what a directory may hold, the first that is there is read
NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
SAFETENSORS, GGUF = ".safetensors", ".gguf"
SUFFIXES = (SAFETENSORS, *PICKLES, GGUF)
# what trainers put beside a model: their own state, and adapters
STATES = ("checkpoint", "training_args", "optimizer", "scheduler", "rng_state", "scaler", "adapter_model")
ADAPTER = "adapter_config.json"
META = "consolidated.00.pth"


def open_local(source: Path, config: Path | None, weights: Path | None = None, bare: bool = False) -> Checkpoint:
    """The checkpoint in a directory or file; see `duo_mlx.convert.readers.open_checkpoint`.

    Args:
        source: what the user named.
        config: is read in place of the checkpoint's own.
        weights: the file to read, if that is not said by ``source``.
        bare: do without a configuration where there is none.
    """
    if not source.exists():
        raise DuoError(f"{source}: there is no such file or directory")
    file = weights or (weights_file(source) if source.is_dir() else source)
    if file.stem == "training_args":
        raise DuoError(f"{file}: holds a trainer's settings, not a model; name the file of its weights")
    if file.suffix == GGUF:
        given = None if config is None else read_config(file, config)
        try:
            found = gguf.read(file, given)
        except DuoError as error:
            raise DuoError(f"{file}: {what}") if (what := foreign_content(file)) else error from None
        return _checked(Checkpoint(source, "GGUF", found.files, found.tensors, found.config, found.notes))
    settings = read_config(source, config, bare or is_file(file.with_name(meta.PARAMS)))
    reader = _Files()
    if file.name.endswith(shards.SUFFIX):
        files, tensors = shards.read(file, reader.read)
    elif meta.SHARD.fullmatch(file.name):
        files, tensors = meta.read(file, reader.read)
    else:
        files, tensors = shards.read_numbered(file, reader.read)
    if len(reader.formats) > 1:
        raise DuoError(f"{file}: names shards of several formats ({', '.join(sorted(reader.formats))})")
    try:
        tensors = unwrapped(tensors)
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None
    if not settings and is_file(params := file.with_name(meta.PARAMS)):
        settings = meta.config(params, tensors)
    notes: tuple[str, ...] = ()
    if is_file(file.with_name(ADAPTER)):
        notes = (f"{file.with_name(ADAPTER)}: the adapter is left out; merge it into its base to have it",)
    return _checked(Checkpoint(source, "".join(reader.formats), tuple(files), tensors, settings, notes))


def weights_file(directory: Path) -> Path:
    """The weights file, index of shards or first shard that ``directory`` is read from.

    Raises:
        DuoError: it has several that may be meant, or none.
    """
    found = candidates(file.name for file in directory.iterdir() if file.is_file())
    if len(found) == 1:
        return directory / found[0]
    if found:
        several = ", ".join(found)
        raise DuoError(
            f"{directory}: holds several weights files ({several}); name one, such as {directory / found[0]}"
        )
    if is_file(directory / ADAPTER):
        base = read_object(directory / ADAPTER).get("base_model_name_or_path")
        raise DuoError(
            f"{directory}: holds an adapter ({ADAPTER}) of {shown(base)}, not a model; merge it into that "
            "(PEFT's merge_and_unload)"
        )
    raise DuoError(f"{directory}: holds no weights file; it must have one of {', '.join(NAMES)} or a single other")


def candidates(names: Iterable[str]) -> list[str]:
    """Which of the files of a directory may be its weights: an index or a file, the first of several shards."""
    names = set(names)
    for known in NAMES:
        if known in names:
            return [known]
    found = sorted(
        name for name in names if name.endswith(SUFFIXES) and Path(name).stem not in STATES and "/" not in name
    )
    found = [file.name for file in gguf.models([Path(name) for name in found])]
    firsts = list(dict.fromkeys(next(each for each in shards.siblings(name) if each in names) for name in found))
    if META in firsts:  # Meta's shards are one file by their numbers
        firsts = [name for name in firsts if name == META or not meta.SHARD.fullmatch(name)]
    return firsts


def read_config(source: Path, config: Path | None, bare: bool = False) -> dict[str, Any]:
    """The configuration that goes with ``source``: ``config``, or the config.json in or beside it.

    Raises:
        DuoError: there is none (unless ``bare``), or it is no JSON object.
    """
    file = config or (source if source.is_dir() else source.parent) / "config.json"
    if config is None and not is_file(file):
        if bare:
            return {}
        if source.is_file():
            raise DuoError(f"{source}: has no config.json beside it; give one with --config FILE")
    try:
        return flattened(read_object(file))
    except FileNotFoundError:
        raise DuoError(f"{file}: there is no such file; a model needs its config.json") from None


class _Files:
    """Reads the files of one checkpoint and remembers their formats."""

    def __init__(self) -> None:
        self.formats: set[str] = set()
        self.pickles = pytorch.Reader()

    def read(self, file: Path) -> dict[str, Tensor]:
        if not is_file(file):
            raise DuoError(f"{file}: there is no such file or directory")
        if file.suffix == SAFETENSORS:
            self.formats.add("safetensors")
            return safetensors_file.read(file)
        if file.suffix in PICKLES:
            self.formats.add("PyTorch")
            return self.pickles.read(file)
        raise DuoError(f"{file}: is no weights file; known are {', '.join(SUFFIXES)} and *{shards.SUFFIX}")


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    if not checkpoint.tensors:
        raise DuoError(f"{checkpoint.source}: holds no tensor")
    return checkpoint
