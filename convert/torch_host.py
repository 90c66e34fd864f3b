"""A Duo in PyTorch: transformers' own model of a type, in which each layer's FFN is replaced by a big and a small one.

`duo_mlx.model` does the same to mlx-lm's models, so one can be compared with the other for every architecture that both
have. Embedding, attention, norms, masks and head stay transformers'. `duo_mlx.convert.reference` is the method spelt
out for one architecture.

There is no strategy here: big and small both see every token, and a token's route picks one of the two, or zeros.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from duo_mlx.errors import DuoError
from duo_mlx.routes import LETTERS, Route

LAYERS = ("layers", "h", "blocks")  # names of the list of a model's decoder layers
FFNS = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "mlp_block", "shared_mlp")  # names of a layer's FFN
MAPS = (nn.Linear, Conv1D)
TWO_MATRICES = ("fc1", "activation_fn", "fc2")  # an FFN that a layer spells out, as OPT's does

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass
class Pass:
    """What is true of one pass over tokens ``[batch, tokens]``."""

    routes: Tensor | None  # [layers] or [batch, tokens, layers]; None: the layers' routers decide
    taken: dict[int, Tensor] = field(default_factory=dict)  # a layer's routes, as its FFN saw them
    decided: dict[int, Tensor] = field(default_factory=dict)  # by a router ahead of the FFN, see `skip_layers`

    def of(self, layer: int, shape: torch.Size) -> Tensor | None:
        """The layer's routes in the ``shape`` of its tokens, ``[batch, tokens]`` or ``[batch * tokens]``."""
        given = self.decided.get(layer) if self.routes is None else self.routes[..., layer]
        if given is None or given.shape == ():
            return given if given is None else given.expand(shape)
        if shape not in (given.shape, (given.numel(),)):
            raise DuoError(f"layer {layer}: routes are for tokens {list(given.shape)}, its FFN got {list(shape)}")
        return given.reshape(shape)


_open: ContextVar[Pass | None] = ContextVar("torch_pass", default=None)


@contextmanager
def routed(routes: Tensor | None) -> Iterator[Pass]:
    """Open a pass: inside, hosted models take ``routes``. Outside of any pass all tokens take big.

    Args:
        routes: 0 skip, 1 small, 2 big; ``[layers]`` or ``[batch, tokens, layers]``. None: the routers decide.
    """
    made = Pass(routes)
    token = _open.set(made)
    try:
        yield made
    finally:
        _open.reset(token)


class GatedFFN(nn.Module):
    """A small FFN: ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, inner: int, activation: str, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return found


class NestedFFN(nn.Module):
    """A small FFN of big's first neurons with a down projection of its own, as `duo_mlx.nested` has it.

    Args:
        big: a module with two or three linear maps. It is no child, so that its weights have one name.
        hidden: width of its inputs and outputs.
        width: how many of big's neurons it has.
        bias: whether its down projection has a bias.

    Raises:
        DuoError: big has other maps, or fewer neurons.
    """

    def __init__(self, big: nn.Module, hidden: int, width: int, bias: bool):
        super().__init__()
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        shapes = {name: _matrix(part).shape for name, part in big.named_children() if isinstance(part, MAPS)}
        down = [name for name, (outputs, inputs) in shapes.items() if outputs == hidden != inputs]
        if len(shapes) not in (2, 3) or len(down) != 1:
            raise DuoError(f"{type(big).__name__}: no small FFN can be nested in it")
        if width > (neurons := shapes[down[0]][1]):
            raise DuoError(f"a nested small FFN has {width} neurons, and its big one only {neurons}")
        self._big, self._down, self._reads = (big,), down[0], tuple(name for name in shapes if name != down[0])

    def forward(self, x: Tensor) -> Tensor:
        big, width = self._big[0], self.down_proj.in_features
        made = copy(big)
        made._modules = {**big._modules, self._down: self.down_proj}
        for name in self._reads:
            part: Any = big.get_submodule(name)
            made._modules[name] = _Map(_matrix(part)[:width], None if part.bias is None else part.bias[:width])
        found: Tensor = made(x)
        return found


class _Map(nn.Module):
    """A linear map whose weights are not its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self._arrays = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self._arrays)


def _matrix(part: Any) -> Tensor:
    """A linear map's weights ``[outputs, inputs]``."""
    found: Tensor = part.weight.T if isinstance(part, Conv1D) else part.weight
    return found


class TwoMatrices(nn.Module):
    """The FFN of a layer that has its matrices as attributes of its own."""

    def __init__(self, fc1: nn.Module, activation_fn: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = fc1, activation_fn, fc2

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return found


class TorchDuoFFN(nn.Module):
    """A layer's own FFN as big, and a small one beside it.

    Args:
        big: the layer's own; one that returns a tuple keeps doing so, its first item is routed.
        router: a linear map to a logit a choice, or None.
        choices: the routes that the router's rows stand for.
        layer: the layer's index.
        small_skips: whether small means skip; such a layer has no small one.
    """

    small: nn.Module | None  # None where small means big, or skip

    def __init__(
        self, big: nn.Module, router: nn.Module | None, choices: Sequence[int], layer: int, small_skips: bool = False
    ):
        super().__init__()
        self.big, self.small, self.router = big, None, router
        self.choices, self.layer, self.small_skips = tuple(choices), layer, small_skips

    def decide(self, x: Tensor) -> Tensor:
        """Routes ``[...]`` of what the router sees, ``x [..., width]``; of equal logits the first counts."""
        if self.router is None:
            raise DuoError(f"layer {self.layer}: no routes were given, and it has no router")
        return torch.tensor(self.choices)[self.router(x).argmax(-1)]

    def skips(self, routes: Tensor) -> Tensor:
        """Which of ``routes [...]`` skip this layer."""
        return (routes == Route.SKIP) | ((routes == Route.SMALL) & self.small_skips)

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        """``hidden_states [..., hidden]`` -> what big returns."""
        if rest or named:
            raise DuoError(f"layer {self.layer}: its FFN takes more than hidden states, so it cannot be routed")
        given = self.big(hidden_states)
        opened = _open.get()
        if opened is None:
            return given
        if self.layer in opened.taken:
            raise DuoError(f"layer {self.layer}: its FFN runs twice in a pass, so it cannot be routed")
        big = given[0] if isinstance(given, tuple) else given
        routes = opened.of(self.layer, hidden_states.shape[:-1])
        opened.taken[self.layer] = routes = self.decide(hidden_states) if routes is None else routes
        small = big if self.small is None else self.small(hidden_states)
        used = torch.where((routes == Route.BIG).unsqueeze(-1), big, small)
        out = torch.where(self.skips(routes).unsqueeze(-1), torch.zeros_like(big), used)
        return (out, *given[1:]) if isinstance(given, tuple) else out


class _InPlaceOf(nn.Module):
    """Calls a module that is not its child, so that its weights have one name."""

    def __init__(self, ffn: nn.Module):
        super().__init__()
        self._ffn = (ffn,)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._ffn[0](x)
        return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return a model's decoder layers: the longest list named as such whose members all have an FFN.

    Raises:
        DuoError: there is none.
    """
    lists = [
        list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LAYERS
    ]
    usable = [blocks for blocks in lists if blocks and all(ffn_names(block) for block in blocks)]
    if not usable:
        raise DuoError(f"{type(model).__name__} has no decoder layers with an FFN that this package knows")
    return max(usable, key=len)


def ffn_names(block: nn.Module) -> tuple[str, ...]:
    """Return the name of a layer's FFN, or those of the matrices that it is made of; nothing where it has none."""
    found = tuple(name for name in FFNS if isinstance(getattr(block, name, None), nn.Module))
    if found:
        return found
    return TWO_MATRICES if all(callable(getattr(block, name, None)) for name in TWO_MATRICES) else ()


def host(
    model: nn.Module,
    small_width: int | Sequence[int],
    activation: str = "silu",
    small_bias: bool = False,
    *,
    nested: bool = False,
    router_choices: str = "",
    router_bias: bool = False,
    router_looks_ahead: bool = False,
    skip_scope: str = "ffn",
    small_skips: Sequence[int] = (),
) -> list[TorchDuoFFN]:
    """Replace each decoder layer's FFN by a `TorchDuoFFN`; return these in the order of the layers.

    The new weights are ``<ffn>.big.*``, ``<ffn>.small.{gate,up,down}_proj.*`` and ``<ffn>.router.*``. Where a layer
    spells its FFN out, the new one is named ``mlp``.

    Args:
        model: a transformers' model for causal language modelling; it is changed.
        small_width: inner width of the small FFNs, one for all or one a layer; 0: small means big.
        activation: of the small FFNs' gates, one of `ACTIVATIONS`.
        small_bias: whether the small FFNs' projections have biases.
        nested: whether small FFNs are big's first neurons, see `NestedFFN`; then they have big's activation.
        router_choices: the routes that routers choose between, such as "sB"; empty: no routers.
        router_bias: whether a router adds a bias to its logits.
        router_looks_ahead: whether a router sees twice the hidden size, see `duo_mlx.convert.torch_reference`.
        skip_scope: what a skip bypasses: "ffn", or "layer" (attention too).
        small_skips: layers in which small means skip.

    Raises:
        DuoError: the architecture or the activation is not known.
    """
    if activation not in ACTIVATIONS:
        raise DuoError(f"small_activation is {activation!r}; there are {', '.join(ACTIVATIONS)}")
    blocks = decoder_layers(model)
    widths = [small_width] * len(blocks) if isinstance(small_width, int) else list(small_width)
    if len(widths) != len(blocks):
        raise DuoError(f"{len(widths)} small FFNs are for {len(blocks)} layers")
    config: Any = model.config
    hidden = config.get_text_config().hidden_size
    choices = [LETTERS.index(letter) for letter in router_choices]
    ffns = []
    for layer, (block, width) in enumerate(zip(blocks, widths, strict=True)):
        seen = 2 * hidden if router_looks_ahead else hidden
        router = nn.Linear(seen, len(choices), bias=router_bias) if choices else None
        skips = layer in small_skips
        ffn = _replace(block, partial(TorchDuoFFN, router=router, choices=choices, layer=layer, small_skips=skips))
        if width and nested:
            ffn.small = NestedFFN(ffn.big, hidden, width, small_bias)
        elif width:
            ffn.small = GatedFFN(hidden, width, activation, small_bias)
        ffns.append(ffn)
    if skip_scope == "layer":
        for block, ffn in zip(blocks, ffns, strict=True):
            skip_layers(block, ffn)
    return ffns


def _replace(block: nn.Module, make: Callable[[nn.Module], TorchDuoFFN]) -> TorchDuoFFN:
    names = ffn_names(block)
    if names == TWO_MATRICES:
        block.mlp = made = make(TwoMatrices(*(getattr(block, name) for name in names)))
        # the layer still calls all three: the first does everything
        block.fc1, block.activation_fn, block.fc2 = _InPlaceOf(made), nn.Identity(), nn.Identity()
        return made
    if len(names) > 1:
        raise DuoError(f"{type(block).__name__} has more than one FFN: {', '.join(names)}")
    made = make(getattr(block, names[0]))
    setattr(block, names[0], made)
    return made


def skip_layers(block: nn.Module, ffn: TorchDuoFFN) -> None:
    """Let a skip bypass the whole layer: the token keeps what came in. Its keys and values stay for later tokens.

    A router decides from what attention sees.

    Raises:
        DuoError: the layer has no norm before its attention, which routers decide from.
    """
    norm = getattr(block, "input_layernorm", None)
    if norm is None:
        raise DuoError(f"{type(block).__name__}: skip_scope 'layer' is not known for it; use skip_scope 'ffn'")

    def decide(_: nn.Module, __: Any, normed: Tensor) -> None:
        opened = _open.get()
        if opened is not None and opened.routes is None:
            opened.decided[ffn.layer] = ffn.decide(normed)

    def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
        opened = _open.get()
        if opened is None:
            return out
        before = args[0] if args else named["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        taken = opened.taken[ffn.layer].reshape(before.shape[-3:-1])  # some blocks have several streams of states
        after = torch.where(ffn.skips(taken).unsqueeze(-1), before, after)
        return (after, *out[1:]) if isinstance(out, tuple) else after

    if ffn.router is not None:
        norm.register_forward_hook(decide)
    block.register_forward_hook(keep, with_kwargs=True)
