"""What a conversion starts from: a checkpoint under canonical names, its configuration in ours, and what does not fit.

Nothing is loaded here but a head beside an embedding of which nobody says whether they are one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from duo_mlx.config import Config
from duo_mlx.convert import keymaps, plan, readers, settings
from duo_mlx.convert.readers.text import is_file, read_object, shown
from duo_mlx.convert.tensors import DTYPES, Checkpoint, Tensor
from duo_mlx.errors import DuoError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Source:
    """A Duo model's checkpoint, or a dense model's that is to become one."""

    name: Path  # as the user named it
    checkpoint: Checkpoint
    config: dict[str, Any]  # see `duo_mlx.convert.settings.settings`
    tensors: dict[str, Tensor]  # what is to be written, by canonical names; a dense model's FFN is ``mlp``
    expected: dict[str, tuple[int, ...]]
    dense: bool

    def table(self) -> str:
        """Source, target, shape and type of each tensor, and what does not fit; see `duo_mlx.convert.plan.table`."""
        tensors, expected = (
            (as_big(self.tensors), as_big(self.expected)) if self.dense else (self.tensors, self.expected)
        )
        return plan.table(plan.plan(self.checkpoint.tensors, tensors, expected))

    def check(self) -> None:
        """Check that weights and configuration agree.

        Raises:
            DuoError: a tensor is of a type that is not written; `MisfitError`: tensors do not fit the configuration.
        """
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                raise DuoError(
                    f"{self.name}: {shown(tensor.name or name)} is {tensor.dtype}; weights must be {', '.join(DTYPES)} "
                    "(a rule of --key-map with drop = true leaves a tensor out)"
                )
        if misfits := plan.misfits(self.tensors, self.expected):
            raise plan.MisfitError(self.name, misfits)


def as_big(tensors: dict[str, Value]) -> dict[str, Value]:
    """A dense model's tensors by the names that they have in a Duo, whose big FFN is the dense model's."""
    return {name.replace(".mlp.", ".mlp.big."): value for name, value in tensors.items()}


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
) -> Source:
    """Open a checkpoint and see what it is.

    Args:
        source, config, revision: see `duo_mlx.convert.readers.open_checkpoint`.
        graft: a dense model is wanted, not a Duo.
        key_map: one of `duo_mlx.convert.keymaps.NAMES` or a file of rules; None: what the names look like.
        rope: the layout of q and k, one of `duo_mlx.convert.keymaps.LAYOUTS`; None: what goes with the names.
        dtype: of all weights, one of `duo_mlx.convert.tensors.DTYPES`; None: as stored.
        default_route, router_choices: go into the configuration in place of what that says.

    Raises:
        DuoError: it cannot be read or mapped, is not supported, or is not what ``graft`` says. What does not fit the
            configuration is left to `Source.check`.
    """
    name = Path(source)
    _refuse_quantised(name, config)
    checkpoint = readers.open_checkpoint(source, config=config, revision=revision)
    made = settings.settings(checkpoint.config, name)
    if default_route is not None:
        made["default_route"] = default_route
    if rope is not None and checkpoint.format == "GGUF":
        raise DuoError(f"--rope {rope}: a GGUF file says by its architecture how its rows lie; leave the option out")
    tensors = plan.mapped(checkpoint.tensors, _key_map(key_map, rope, checkpoint, name), made, name)
    _check_kind(made, tensors, name, graft)
    tensors = settings.with_output_biases(checkpoint.config, name, tensors)
    made = settings.settle_head(settings.settle_router(made, router_choices, tensors, name), tensors, name)
    args = settings.dense_args(made) if graft else Config.from_dict(made)
    tensors = plan.kept(tensors, args.tie_word_embeddings)
    if dtype is not None:
        tensors = {key: tensor.astype(dtype) if tensor.dtype in DTYPES else tensor for key, tensor in tensors.items()}
        made = settings.with_dtype(made, dtype)
    return Source(name, checkpoint, made, tensors, plan.expected_shapes(args, dense=graft), graft)


def _key_map(key_map: str | None, rope: str | None, checkpoint: Checkpoint, source: Path) -> keymaps.KeyMap:
    if key_map is None:
        return keymaps.detect(checkpoint.tensors, source, rope)
    if key_map in keymaps.NAMES or not Path(key_map).exists():
        return keymaps.named(key_map, rope)
    return keymaps.from_file(Path(key_map), rope)


def _check_kind(config: dict[str, Any], tensors: dict[str, Tensor], source: Path, graft: bool) -> None:
    if settings.is_duo(config):
        if graft:
            raise DuoError(f"{source}: is a Duo model already, so there is nothing to graft; leave out --graft")
    elif any(".mlp.small." in name for name in tensors):
        raise DuoError(f"{source}: holds small FFNs, but its config.json has no small_intermediate_size")
    elif not graft:
        raise DuoError(f"{source}: is a dense model, not a Duo; --graft makes a Duo of it")


def _refuse_quantised(source: Path, config: Path | None) -> None:
    file = config or (source if source.is_dir() else source.parent) / "config.json"
    if source.exists() and is_file(file) and settings.is_quantised(given := read_object(file)):
        if settings.is_duo(given):
            raise DuoError(
                f"{source}: is a Duo that MLX quantised; only --to torch --dequantise takes it. For other weights "
                "convert the model that it was made of"
            )
        raise DuoError(f"{source}: is quantised by MLX; a dense model is taken in float")
