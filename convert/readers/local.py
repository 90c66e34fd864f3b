"""Which files a path means, and which config.json goes with them."""

from pathlib import Path
from typing import Any

from duo_mlx.convert.readers import gguf, pytorch, safetensors_file, shards
from duo_mlx.convert.readers.names import unwrapped
from duo_mlx.convert.readers.text import is_file, read_object
from duo_mlx.convert.tensors import Checkpoint, Tensor
from duo_mlx.errors import DuoError

# what a directory may hold, the first that is there is read
NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
SAFETENSORS, GGUF = ".safetensors", ".gguf"
SUFFIXES = (SAFETENSORS, *pytorch.SUFFIXES, GGUF)


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
    if file.suffix == GGUF:
        found = gguf.read(file, None if config is None else read_config(file, config))
        return _checked(Checkpoint(source, "GGUF", found.files, found.tensors, found.config))
    settings = read_config(source, config, bare)
    reader = _Files()
    if file.name.endswith(shards.SUFFIX):
        files, tensors = shards.read(file, reader.read)
    else:
        files, tensors = [file], reader.read(file)
    if len(reader.formats) > 1:
        raise DuoError(f"{file}: names shards of several formats ({', '.join(sorted(reader.formats))})")
    try:
        tensors = unwrapped(tensors)
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None
    return _checked(Checkpoint(source, "".join(reader.formats), tuple(files), tensors, settings))


def weights_file(directory: Path) -> Path:
    """The weights file, or index of shards, that ``directory`` is read from.

    Raises:
        DuoError: it has several that may be meant, or none.
    """
    for name in NAMES:
        if (directory / name).is_file():
            return directory / name
    found = sorted(file for file in directory.iterdir() if file.suffix in SUFFIXES and file.is_file())
    found = [file for file in found if file.stem != "checkpoint"]  # a trainer's state, not a model
    found = gguf.models(found)
    if len(found) > 1 and all(file.suffix == GGUF for file in found):
        names = ", ".join(file.name for file in found)
        raise DuoError(f"{directory}: holds several GGUF files ({names}); name one: {found[0]}")
    if len(found) != 1:
        several = f"several weights files ({', '.join(file.name for file in found)})" if found else "no weights file"
        raise DuoError(f"{directory}: holds {several}; it must have one of {', '.join(NAMES)}")
    return found[0]


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
        return read_object(file)
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
        if file.suffix in pytorch.SUFFIXES:
            self.formats.add("PyTorch")
            return self.pickles.read(file)
        raise DuoError(f"{file}: is no weights file; known are {', '.join(SUFFIXES)} and *{shards.SUFFIX}")


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    if not checkpoint.tensors:
        raise DuoError(f"{checkpoint.source}: holds no tensor")
    return checkpoint
