"""What only a CPU needs: replacements of a base's modules that compute the same with fewer and faster primitives.

A small model that decodes on a CPU waits for the many primitives between its products. On a GPU they are fused already,
so this package is imported on a CPU only, and used for a base that it knows.
"""

from typing import Any

from duo_mlx.cpu import llama


def quicken(model: Any, fuse: bool = False) -> None:
    """Let a hosted model compute faster on the CPU, if it is a Llama; numbers stay but for their last bits.

    Args:
        model: a Duo.
        fuse: also join products; from then on the weights must not be changed.
    """
    if issubclass(model.base_class, llama.BASE):
        llama.quicken(model)
        if fuse:
            llama.fuse(model)
