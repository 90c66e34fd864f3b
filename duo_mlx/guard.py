"""The guard: with all routes big, a Duo must compute what mlx-lm's own model of its base computes."""

from typing import Any

import mlx.core as mx

from duo_mlx import hosting
from duo_mlx.errors import DuoError
from duo_mlx.routes import Route


def compare_graphs(model: Any) -> None:
    """Refuse a model whose pass by all big has other primitives than its base's; nothing is computed.

    Blocks that look alike and are not are the danger of hosting: one that does not call its FFN, or calls it twice.

    Raises:
        DuoError: the passes differ, or one of them fails.
    """
    tokens = mx.zeros((1, 2), mx.uint32)
    try:
        # the copy first: a base may change its weights in a call, as gemma3n clips them
        theirs = hosting.primitives(hosting.without(model)(tokens))
        ours = hosting.primitives(all_big(model, tokens))
    except Exception as error:  # a base may raise whatever its author did not think of
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DuoError(f"no Duo can be hosted in a {model.kind}: a pass over two tokens fails ({reason})") from error
    if ours != theirs:
        raise refusal(model.kind)


def refusal(kind: str) -> DuoError:
    """The refusal of a base that is not itself any more when it hosts a Duo."""
    return DuoError(
        f"no Duo can be hosted in a {kind}: with all routes big it does not compute what mlx-lm's own model computes"
    )


def all_big(model: Any, tokens: mx.array, **hooks: Any) -> mx.array:
    """Logits ``[batch, tokens, vocab]`` of a pass by all big, unevaluated; hooks as of `duo_mlx.forward.Forward`."""
    logits: mx.array = model(tokens, routes=[int(Route.BIG)] * model.config.num_hidden_layers, **hooks)
    return logits
