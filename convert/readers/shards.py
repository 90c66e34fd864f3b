"""Shards: with an ``.index.json``, a map from tensor to file that must say neither more nor less than the files; or
without, by the numbers in their names."""

import re
from collections.abc import Callable
from pathlib import Path

from duo_mlx.convert.readers.text import is_file, read_object, shown
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError

SUFFIX = ".index.json"
NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


def siblings(name: str) -> list[str]:
    """The names of all shards of which ``name`` is one by its numbers, such as ``model-00001-of-00002.safetensors``.

    Of another name it is that name alone.
    """
    match = NUMBERED.fullmatch(name)
    if match is None:
        return [name]
    numbers = range(1, int(match["count"]) + 1)
    return [f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}" for number in numbers]


def read_numbered(file: Path, read_file: Callable[[Path], dict[str, Tensor]]) -> tuple[list[Path], dict[str, Tensor]]:
    """The shards to which ``file`` belongs by its numbers, and their tensors; of another name itself.

    Raises:
        DuoError: a shard is missing, or holds a tensor that another one has.
    """
    files = [file.with_name(name) for name in siblings(file.name)]
    tensors: dict[str, Tensor] = {}
    for shard in files:
        if len(files) > 1 and not is_file(shard):
            raise DuoError(f"{file}: is one of {len(files)} shards, but {shard.name} is not there")
        found = read_file(shard)
        for name in found:
            if name in tensors:
                raise DuoError(f"{shard}: holds {shown(name)}, which another shard holds, too")
        tensors |= found
    return files, tensors


def read_map(index: Path) -> dict[str, str]:
    """The index's map from tensor to the name of a file beside it, which need not be there.

    Raises:
        DuoError: there is no such map, it names something twice, or a file that is not beside it.
    """
    try:
        weight_map = read_object(index).get("weight_map")
    except FileNotFoundError:
        raise DuoError(f"{index}: there is no such file or directory") from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise DuoError(f"{index}: is no index with a weight_map from tensor to file")
    for shard in weight_map.values():
        if Path(shard).name != shard or shard == ".." or "\\" in shard:
            raise DuoError(f"{index}: names {shown(repr(shard))}, which is not a file beside it")
    return weight_map


def read(index: Path, read_file: Callable[[Path], dict[str, Tensor]]) -> tuple[list[Path], dict[str, Tensor]]:
    """The shards that ``index`` names and their tensors, shard after shard.

    Raises:
        DuoError: a shard is missing, lacks a tensor, or holds one that the index does not know or another shard has.
    """
    weight_map = read_map(index)
    files = []
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not is_file(file):
            raise DuoError(f"{index}: names {shown(shard)}, which is not there")
        found = read_file(file)
        for name in found:
            if name in tensors:
                raise DuoError(f"{file}: holds {shown(name)}, which another shard holds, too")
            if name not in weight_map:
                raise DuoError(f"{file}: holds the unknown tensor {shown(name)}, which {index.name} does not name")
        for name, where in weight_map.items():
            if where == shard and name not in found:
                raise DuoError(f"{index}: names {shown(name)}, which {shown(shard)} does not hold")
        files.append(file)
        tensors |= found
    return files, tensors
