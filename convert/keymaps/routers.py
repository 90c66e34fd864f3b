"""Names that engineers give to a layer's router; read by every map that has names, never written.

``router`` may stand in the FFN or in the layer, or ``routers.N`` beside the layers, and hold its matrix in a module of
its own. ``gate`` in the FFN is a mixture of experts' word for it and near to SwiGLU's gate, so it counts only in a Duo
without experts, and with two or three rows.
"""

import re
from collections.abc import Callable

from duo_mlx.convert.tensors import Tensors

FFN = r"(?:mlp|feed_forward)\."
KNOWN = re.compile(
    rf"(?:model\.)?(?:layers\.(\d+)\.(?:(?:{FFN})?router|{FFN}(gate))|routers\.(\d+))"
    r"(?:\.(?:linear|layer|proj|classifier))?\.(weight|bias)"
)


def canonical(tensors: Tensors) -> Callable[[str], str]:
    """A function that gives the names of routers among ``tensors`` as canonical ones, and every other name as it is."""
    duo = any("small" in name for name in tensors) and not any("expert" in name for name in tensors)

    def rename(name: str) -> str:
        match = KNOWN.fullmatch(name)
        if match is None or (match[2] and not (duo and tensors[name].shape[:1] in ((2,), (3,)))):
            return name
        return f"model.layers.{match[1] or match[3]}.mlp.router.{match[4]}"

    return rename
