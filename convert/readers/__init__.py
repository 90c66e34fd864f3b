"""Reading checkpoints, whoever wrote them: names, shapes and types at once, each tensor when it is asked for.

A pickle is read with ``weights_only=True`` and needs PyTorch; the other formats need nothing but MLX and NumPy.
float32, float16 and bfloat16 are kept bit for bit, GGUF's quantised types become float32, and a tensor of any other
type is refused by name, as it would be changed or misread.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from duo_mlx.convert import stored
from duo_mlx.convert.packing import is_translated, quantization
from duo_mlx.convert.readers.local import open_local
from duo_mlx.convert.readers.text import is_file, read_object
from duo_mlx.convert.tensors import Checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.transformers_config import flattened

Judge = Callable[[dict[str, Any]], object]


def open_checkpoint(
    source: str | Path,
    *,
    config: Path | None = None,
    revision: str | None = None,
    bare: bool = False,
    judge: Judge | None = None,
) -> Checkpoint:
    """What a checkpoint holds; nothing of it is loaded.

    Args:
        source: a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.gguf`` file, an ``.index.json`` of shards, a
            directory with such, or a hub id: OWNER/NAME, or OWNER/NAME:FILE for one weights file of a repository.
        config: a config.json in place of the checkpoint's own.
        revision: branch, tag or commit of a hub id.
        bare: a checkpoint without a config.json has an empty configuration, in place of being refused.
        judge: is called with the configuration of a hub id before its weights are downloaded, and may raise.

    Raises:
        DuoError: there is no such checkpoint, it is damaged or incomplete, holds tensors of another type, or reading
            it would run code.
    """
    path = Path(source)
    if path.is_dir() and (found := _quantised(path, config, bare)) is not None:
        return found
    if not path.exists():
        from duo_mlx.convert.readers import hub  # the hub's library takes a while to import

        # a Path has lost nothing of a hub id: OWNER/NAME has no part that it would fold
        named = hub.parse(str(source))
        if named is not None:
            if judge is not None and config is not None:
                judge(read_object(config))
            directory, weights = hub.fetch(*named, revision, judge if config is None else None)
            if (found := _quantised(directory, config, bare)) is not None:
                return found
            return open_local(directory, config, weights, bare)
    if revision is not None:
        raise DuoError(f"--revision: {source} is no hub id (OWNER/NAME)")
    return open_local(path, config, bare=bare)


def _quantised(directory: Path, config: Path | None, bare: bool) -> Checkpoint | None:
    """The checkpoint of weights that are quantised and stay so; None: they are something else."""
    file = config or directory / "config.json"
    found = flattened(read_object(file)) if is_file(file) else {}
    if quantization(found) is not None:
        return stored.packed(directory, found)
    if not is_translated(found):
        return None
    try:
        return stored.translated(directory, found)
    except DuoError:
        if bare:  # whoever inspects it wants to know what else there is
            return None
        raise
