"""What cost is by layers, widths, tokens and processes: the formulas of docs/scaling.md, from a Llama's sizes alone.

A skip bypasses the FFN. What training keeps in memory follows from what each operation's gradient
asks for, in float32, where attention and SwiGLU are made of elementary operations (MLX's CPU backend).
"""

from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from duo_mlx.cost import RouteTable
from duo_mlx.model import Config
from duo_mlx.routes import Route, Routes
from duo_mlx.study.tree import Work

FLOAT = 4  # bytes
HEAD = 4  # arrays of logits when the backward pass begins: logits, their softmax, and two gradients
AT_WORK = 15  # states of a search's layer: what attention and both FFNs take and give
LOWEST = 3  # layers' activations when the lowest two layers are computed again: two, and gradients like a third


class Decoding(NamedTuple):
    """What one token takes."""

    weight_bytes: int
    flops: int
    cache_bytes: int


def _heads(args: Config) -> tuple[int, int]:
    """Width of all queries, and of all keys."""
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    return args.num_attention_heads * head_dim, args.num_key_value_heads * head_dim


def layer_parameters(args: Config) -> RouteTable:
    """Parameters of the layers' matrices that one token meets; embedding and head are left out (``fixed`` is 0)."""
    attention = 2 * args.hidden_size * sum(_heads(args))  # q_proj and o_proj, k_proj and v_proj
    inner = np.array([0, args.small_width(0), args.intermediate_size])
    return RouteTable(0, np.tile(attention + 3 * args.hidden_size * inner, (args.num_hidden_layers, 1)))


def flops(args: Config, context: int) -> RouteTable:
    """FLOPs of one token that attends to ``context`` positions: two per parameter, and those of attention itself."""
    attention = 4 * _heads(args)[0] * context
    return RouteTable(2 * args.hidden_size * args.vocab_size, 2 * layer_parameters(args).by_route + attention)


def decoding(args: Config, pattern: Routes, context: int) -> Decoding:
    """One token by a pattern ``[layers]`` that attends to ``context`` positions, float32, one table for both ends.

    Args:
        args: sizes.
        pattern: routes.
        context: positions, the token's own among them.
    """
    hidden, layers = args.hidden_size, args.num_hidden_layers
    _, keys = _heads(args)
    norms = layers + int((pattern != Route.SKIP).sum()) + 1
    floats = int(layer_parameters(args).of(pattern)) + hidden * (args.vocab_size + 1 + norms)
    return Decoding(FLOAT * floats, int(flops(args, context).of(pattern)), FLOAT * layers * 2 * keys * context)


def learned(args: Config, small_only: bool) -> int:
    """Parameters that learn in `train routes`, or in `train small`."""
    hidden, layers = args.hidden_size, args.num_hidden_layers
    small = 3 * hidden * args.small_width(0)
    if small_only:
        return layers * small
    big = layer_parameters(args).by_route[:, Route.BIG]
    return int(big.sum()) + layers * small + hidden * (args.vocab_size + 2 * layers + 1)


def training_flops(args: Config, routes: Routes, length: int, small_only: bool) -> int:
    """FLOPs of the products in one step, forward and backward, without layers that are computed twice.

    Args:
        args: sizes.
        routes: of the step's tokens ``[tokens, layers]``.
        length: tokens of a sequence; scores are computed for all pairs, the future's as well.
        small_only: only small FFNs learn, the lowest of them in the first layer.
    """
    table = flops(args, length)
    forward = int(table.of(routes).sum())
    if not small_only:
        return 3 * forward
    above = int(table.by_route[np.arange(1, len(routes[0])), routes[:, 1:]].sum())
    attention = len(routes) * (len(routes[0]) - 1) * 4 * _heads(args)[0] * length
    small, down = 2 * args.hidden_size * args.small_width(0), routes == Route.SMALL
    learns = 3 * small * int(down.sum()) + small * int(down[:, 0].sum())
    return forward + len(routes) * table.fixed + above + attention + learns


def recomputed_products(routes: Routes, small_only: bool) -> int:
    """Products that `--checkpoint-layers` adds: all of a layer's but its FFNs' last ones, for which nobody asks."""
    ffns = sum(len(set(column.tolist()) - {Route.SKIP}) for column in routes.T)
    layers = routes.shape[1]
    return 6 * layers + 2 * ffns - (2 if small_only and (routes[:, 0] == Route.BIG).any() else 0)


def kept(args: Config, routes: Routes, length: int, dropout: bool) -> NDArray[np.int64]:
    """Floats that each layer's forward pass keeps for its gradients, ``[layers]``, over tokens ``[tokens, layers]``."""
    queries, keys = _heads(args)
    hidden, heads = args.hidden_size, args.num_attention_heads
    fixed = 6 * hidden + 2 * (queries + keys) + heads * length + dropout * hidden // 2
    widths = (args.small_width(0), args.intermediate_size)
    of_route = np.array([0, *(hidden + 5 * width for width in widths)])
    total: NDArray[np.int64] = (fixed + of_route[routes]).sum(axis=0)
    return total


def gradient_bytes(args: Config, routes: Routes, length: int, dropout: bool, recompute: bool) -> int:
    """The peak of forward and backward pass beyond parameters and moments; all learn."""
    tokens, layers = routes.shape
    hidden, logits = args.hidden_size, args.vocab_size * tokens
    each = kept(args, routes, length, dropout)
    ends = hidden * (3 * tokens + args.vocab_size)  # the last norm, and the embedding's gradient
    if not recompute:
        return FLOAT * int(each.sum() + max(HEAD * logits, each[-1] + 2 * logits) + ends)
    above = 2 * hidden * tokens * layers + HEAD * logits + ends
    below = learned(args, small_only=False) + LOWEST * each[:2].mean()
    return FLOAT * int(max(above, below))


def step_bytes(args: Config, gradients: int) -> int:
    """The peak of a step: parameters and moments, and either `gradient_bytes` or gradients and their successors."""
    of_each = FLOAT * learned(args, small_only=False)
    return 3 * of_each + max(gradients, 4 * of_each)


def ring_bytes(summed: int, processes: int) -> float:
    """Bytes that each process sends where ``summed`` bytes are added up around a ring."""
    return 2 * (processes - 1) / processes * summed


def tree(layers: int, choices: int, ffns: int) -> Work:
    """Evaluations of a search of all patterns: of ``choices`` routes in each layer ``ffns`` have an FFN."""
    nodes = sum(choices**depth for depth in range(layers))
    return Work(nodes, nodes * ffns, choices**layers)


def budgeted(layers: int, big: int) -> Work:
    """The same for one token in the committed reading: big and small, exactly ``big`` big layers."""
    nodes = [
        sum(comb(depth, spent) for spent in range(depth + 1) if spent <= big <= spent + layers - depth)
        for depth in range(layers + 1)
    ]
    return Work(sum(nodes[:-1]), sum(nodes[1:]), nodes[-1])


def search_bytes(args: Config, choices: int, tokens: int, rows: int) -> int:
    """The peak of a search of all patterns over a text beyond the weights: states that wait, and the last batch's."""
    layers, hidden = args.num_hidden_layers, args.hidden_size
    batches = [min(choices**depth, rows) for depth in range(layers + 1)]
    waiting = choices * sum(batches[: layers - 1])
    inner = 2 * (args.intermediate_size + args.small_width(0)) + AT_WORK * hidden
    inner += args.num_attention_heads * tokens  # scores
    leaves = choices * batches[-2] * hidden + batches[-1] * (args.vocab_size + 2 * hidden)
    return FLOAT * tokens * (hidden * waiting + max(batches[-2] * inner, leaves))


def sequences(count: int, processes: int) -> list[int]:
    """Sequences that each process of an oracle searches."""
    return [len(range(rank, count, processes)) for rank in range(processes)]
