"""From a canonical PyTorch checkpoint to a model directory, whole or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx import checkpoint
from duo_mlx.convert import readers, tokenizer
from duo_mlx.errors import DuoError
from duo_mlx.files import output_directory
from duo_mlx.model import Model, ModelArgs


@dataclass(frozen=True)
class Misfit:
    """A tensor that does not fit the configuration; a shape of None: it is not there, or not wanted."""

    name: str
    found: tuple[int, ...] | None
    expected: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.found is None:
            return f"missing     {self.name} {list(self.expected or ())}"
        if self.expected is None:
            return f"left over   {self.name} {list(self.found)}"
        return f"wrong shape {self.name} {list(self.found)}, config.json implies {list(self.expected)}"


class MisfitError(DuoError):
    """Weights and configuration disagree; ``misfits`` lists every tensor, the message counts them."""

    def __init__(self, source: Path, misfits: list[Misfit]):
        super().__init__(f"{source}: {len(misfits)} tensors do not fit config.json; nothing was written")
        self.misfits = misfits


def compare(weights: readers.Weights, model: Model) -> list[Misfit]:
    """What is missing, left over or of the wrong shape."""
    expected = {name: value.shape for name, value in checkpoint.parameters(model).items()}
    found = {name: value.shape for name, value in weights.items()}
    names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    return [Misfit(name, found.get(name), expected.get(name)) for name in names]


def _model(args: ModelArgs) -> Model:
    """The model with weights that are never computed: it is there for their names and shapes."""
    try:
        return Model(args)
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # mlx-lm's and MLX's word for bad settings
        raise DuoError(f"config.json: no model can be made of it: {' '.join(str(error).split())}") from error


def _check_tied_head(source: Path, weights: readers.Weights, args: ModelArgs) -> None:
    """A tied head is dropped from the weights, so it must not be another one."""
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if not args.tie_word_embeddings or head is None or embedding is None:
        return
    if head.shape != embedding.shape or not mx.array_equal(head, embedding).item():
        raise DuoError(
            f"{source}: lm_head.weight is not model.embed_tokens.weight, so config.json must say "
            '"tie_word_embeddings": false'
        )


def convert(
    source: Path,
    destination: Path,
    *,
    config: Path | None = None,
    dtype: mx.Dtype | None = None,
    default_route: str | None = None,
    force: bool = False,
    verify: Callable[[Path, dict[str, Any], readers.Weights], None] | None = None,
) -> None:
    """Write the model directory ``destination`` from ``source``.

    Args:
        source: a directory with config.json, weights and tokenizer files, or a single weights file.
        destination: it must not exist, unless ``force`` is given.
        config: config.json of a single weights file.
        dtype: of the floating-point weights; None: as stored.
        default_route: goes into config.json in place of what that says.
        force: replace an existing model directory.
        verify: is called with the new directory, the configuration and the source's weights; what it raises leaves
            nothing written.

    Raises:
        DuoError: see `duo_mlx.convert.readers`; `MisfitError`: the tensors do not fit the configuration.
    """
    inside = source if source.is_dir() else source.parent
    for read in (inside, *([config] if config else [])):
        if read.resolve().is_relative_to(destination.resolve()):
            raise DuoError(f"{destination}: is or holds the source {read}; give another destination")
    if source.is_dir() and destination.resolve().is_relative_to(source.resolve()):
        raise DuoError(f"{destination}: lies inside the source {source}; give another destination")
    with output_directory(destination, force) as directory:
        settings = readers.read_config(source, config)
        if default_route is not None:
            settings["default_route"] = default_route
        args = ModelArgs.from_dict(settings)
        model = _model(args)
        weights = readers.read(source)
        _check_tied_head(source, weights, args)
        kept = model.sanitize(weights)
        if misfits := compare(kept, model):
            raise MisfitError(source, misfits)
        if dtype is not None:
            kept = {name: value.astype(dtype) for name, value in kept.items()}
            settings |= {key: str(dtype).rpartition(".")[2] for key in ("dtype", "torch_dtype") if key in settings}
        checkpoint.save(directory, settings, kept)
        tokenizer.write(inside, directory, args.vocab_size)
        if verify is not None:
            verify(directory, settings, kept)
