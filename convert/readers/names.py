"""The names that wrappers of training leave in a checkpoint, taken off again."""

import re
from typing import TypeVar

from duo_mlx.convert.readers.text import shown
from duo_mlx.errors import DuoError

# what torch.compile, FSDP and activation checkpointing put before the names of whatever module they wrapped
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# what DataParallel, DeepSpeed, PEFT and Lightning modules put before all names
OUTER = ("module.", "_forward_module.", "base_model.model.", "model.")
# what stands behind a "model." that a Lightning module adds; every name of a tied model begins with one of its own
INNER = ("model.model.", "model.lm_head.", "model.tok_embeddings.")

ADAPTER = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\..*)?")  # PEFT's names
FLAT = "_flat_param"  # FSDP's, of which one holds many tensors

T = TypeVar("T")


def unwrapped(tensors: dict[str, T]) -> dict[str, T]:
    """``tensors`` without `WRAPPERS` anywhere in a name, and without those of `OUTER` that all names have.

    Raises:
        DuoError: two names become one, or the tensors are parts of a model's.
    """
    for name in tensors:
        if ADAPTER.fullmatch(name):
            raise DuoError(
                f"holds an adapter ({shown(name)}), not a model; merge it into its base (PEFT's merge_and_unload)"
            )
        if name.endswith(FLAT):
            raise DuoError(f"holds {shown(name)}, many tensors in one; save FSDP's full state dict")
    names = {name: _unwrapped(name) for name in tensors}
    while prefix := _outer(list(names.values())):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    found: dict[str, str] = {}
    for name, short in names.items():
        if short in found:
            raise DuoError(f"{shown(name)} and {shown(found[short])} are both {shown(short)} without their prefixes")
        found[short] = name
    return {short: tensors[name] for short, name in found.items()}


def _unwrapped(name: str) -> str:
    *segments, last = name.split(".")
    return ".".join([segment for segment in segments if segment not in WRAPPERS] + [last])


def _outer(names: list[str]) -> str | None:
    """The prefix that all ``names`` have and the model does not."""
    for prefix in OUTER if names else ():
        if all(name.startswith(prefix) and name != prefix for name in names) and (
            prefix != "model." or any(name.startswith(INNER) for name in names)
        ):
            return prefix
    return None
