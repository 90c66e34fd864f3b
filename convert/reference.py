"""The Duo model in plain PyTorch: the readable definition that every other implementation is tested against.

A decoder like Llama's in which each layer has two separate FFNs side by side, *big* and *small* (Duo-LLM, section
"Model": "attention is shared"). For every token and layer a route says which of them the token meets: ``SKIP`` (0),
``SMALL`` (1) or ``BIG`` (2). Where nobody gives routes, each layer's router decides (stage 3, hard decisions). The
state dict uses the canonical names: Hugging Face Llama's, with ``model.layers.N.mlp.big.*``,
``model.layers.N.mlp.small.*`` and ``model.layers.N.mlp.router.*``.

There is no KV cache, no kernel and no strategy here; a token's FFN runs on exactly the tokens that are routed to it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIP, SMALL, BIG = 0, 1, 2
LETTERS = "-sB"  # of the three in config.json


@dataclass(frozen=True)
class DuoConfig:
    """Sizes of a Duo model; the keys are Hugging Face Llama's and those of a Duo."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int  # big's inner width
    small_intermediate_size: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_traditional: bool = False
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    small_layers: Sequence[int] | None = None  # layers that have a small FFN; in the others small means big
    small_bias: bool = False  # whether small's projections have biases, whatever mlp_bias says of big's
    skip_scope: str = "ffn"  # what SKIP bypasses: "ffn", or "layer" (attention too; keys and values stay)
    router_choices: str = ""  # the routes that a router's rows stand for, such as "sB"; empty: no routers
    router_bias: bool = False  # whether a router adds a bias to its logits
    router_looks_ahead: bool = False  # whether it sees a token's embedding and the final state before, see `foresee`

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known})

    @classmethod
    def from_file(cls, path: Path) -> Self:
        return cls.from_dict(json.loads(path.read_text()))

    def has_small(self, layer: int) -> bool:
        return self.small_layers is None or layer in self.small_layers

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config: DuoConfig) -> Tensor:
    """Angle per position of each pair of a head's channels, ``[head_width / 2]``; plain, linear or Llama 3 scaling."""
    width = config.head_width
    frequencies = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_scaling type {kind!r} is not in the reference; it knows default, linear and llama3")
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    turns = scaling.get("original_max_position_embeddings", 8192) * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: few turns, fully scaled; 1: many turns, left alone
    return frequencies * (smooth + (1 - smooth) / scaling["factor"])


def rotate(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding of ``x [batch, heads, tokens, head_width]`` by ``angles [tokens, head_width / 2]``."""
    cos, sin = angles.cos(), angles.sin()
    if interleaved:  # pairs are neighbours: (0, 1), (2, 3) ...
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)  # pairs are half a head apart: Hugging Face's layout
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: DuoConfig):
        super().__init__()
        self.config = config
        queries, keys = config.num_attention_heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate(q, angles, self.config.rope_traditional)
        k = rotate(k, angles, self.config.rope_traditional)
        groups = self.config.num_attention_heads // self.config.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class FFN(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DuoFFN(nn.Module):
    """A big and a small FFN side by side; each runs on the tokens routed to it, skipped tokens get zeros.

    Where the configuration has ``router_choices`` there is a ``router``, too: from what it sees, ``[..., hidden]`` or
    twice as much, to a logit a choice.
    """

    def __init__(self, config: DuoConfig, has_small: bool = True):
        super().__init__()
        bias = config.mlp_bias or config.small_bias
        self.big = FFN(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.small = FFN(config.hidden_size, config.small_intermediate_size, bias) if has_small else None
        self.choices = [LETTERS.index(letter) for letter in config.router_choices]
        if self.choices:
            width = config.hidden_size * (2 if config.router_looks_ahead else 1)
            self.router = nn.Linear(width, len(self.choices), bias=config.router_bias)

    def decide(self, x: Tensor) -> Tensor:
        """Routes ``[...]`` of what the router sees, ``x [..., width]``; of equal logits the first counts."""
        return torch.tensor(self.choices, device=x.device)[self.router(x).argmax(-1)]

    def forward(self, x: Tensor, routes: Tensor) -> Tensor:
        """``x [batch, tokens, hidden]``, ``routes [batch, tokens]`` -> ``[batch, tokens, hidden]``."""
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for route, module in ((BIG, self.big), (SMALL, self.small or self.big)):
            index = (routes.flatten() == route).nonzero().squeeze(-1)
            if index.numel():
                out = out.index_copy(0, index, module(flat.index_select(0, index)))
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, config: DuoConfig, dropout: float, has_small: bool = True):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = DuoFFN(config, has_small)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.skips_attention = config.skip_scope == "layer"
        self.dropout = dropout

    def forward(self, x: Tensor, angles: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer's output ``[batch, tokens, hidden]`` and ``routes [batch, tokens]``; None: the router decides."""
        normed = self.input_layernorm(x)
        attended = F.dropout(self.self_attn(normed, angles), self.dropout, self.training)
        if self.skips_attention:  # the skipped token's keys and values were still there for later tokens
            routes = self.mlp.decide(normed) if routes is None else routes
            attended = torch.where((routes == SKIP).unsqueeze(-1), torch.zeros_like(attended), attended)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        routes = self.mlp.decide(normed) if routes is None else routes
        return x + F.dropout(self.mlp(normed, routes), self.dropout, self.training), routes


class Decoder(nn.Module):
    def __init__(self, config: DuoConfig, dropout: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, dropout, config.has_small(index)) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DuoModel(nn.Module):
    """The whole model; ``dropout`` acts on the residual branches and only while training."""

    def __init__(self, config: DuoConfig, dropout: float = 0.0):
        super().__init__()
        if config.skip_scope not in ("ffn", "layer"):
            raise ValueError(f"skip_scope is {config.skip_scope!r}; it must be 'ffn' or 'layer'")
        choices = config.router_choices
        if len(choices) == 1 or len(set(choices) & set(LETTERS)) != len(choices):
            raise ValueError(f"router_choices is {choices!r}; it must name two or three routes, such as 'sB'")
        self.config = config
        self.model = Decoder(config, dropout)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies: Tensor
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def initialise(self, std: float = 0.02) -> None:
        """Normal weights, biases zero, projections into the residual stream scaled by 1 / sqrt(2 layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if into_residual else 1.0
                nn.init.normal_(parameter, std=std * scale)

    def forward(self, tokens: Tensor, routes: Tensor | None = None) -> Tensor:
        """Logits ``[batch, tokens, vocab]`` of ``tokens [batch, tokens]``.

        ``routes`` holds SKIP, SMALL or BIG: ``[layers]``, one pattern for all tokens, or ``[batch, tokens, layers]``.
        None: the layers' routers decide.
        """
        return self.routed(tokens, routes)[0]

    def routed(self, tokens: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the routes ``[batch, tokens, layers]`` that were taken."""
        layers = self.config.num_hidden_layers
        if routes is None:
            if not self.config.router_choices:
                raise ValueError("give routes: the config has no router_choices, so there are no routers to decide")
        elif routes.shape not in ((layers,), (*tokens.shape, layers)):
            raise ValueError(f"routes {tuple(routes.shape)} fit neither [{layers}] nor [batch, tokens, {layers}]")
        else:
            routes = routes.expand(*tokens.shape, layers)
        if routes is None and self.config.router_looks_ahead:
            routes = self.foresee(tokens)
        x, taken = self.final(tokens, routes)
        logits = F.linear(x, self.model.embed_tokens.weight) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits, taken

    def foresee(self, tokens: Tensor) -> Tensor:
        """Routes ``[batch, tokens, layers]`` by routers that look ahead, token by token.

        A token's are decided from its embedding and from what the last norm made of the token before it, each divided
        by its root mean square; before the first one that is zeros. All tokens before are computed anew each time.
        """
        routes = tokens.new_zeros(len(tokens), 0, self.config.num_hidden_layers)
        ffns = [module for module in self.model.layers.modules() if isinstance(module, DuoFFN)]  # in their order
        embedded = self.model.embed_tokens(tokens)
        before = torch.zeros_like(embedded[:, 0])
        for place in range(tokens.shape[1]):
            two = torch.stack([embedded[:, place], before], 1)
            seen = (two * torch.rsqrt(two.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)).flatten(1)
            decided = torch.stack([each.decide(seen) for each in ffns], -1)
            routes = torch.cat([routes, decided[:, None]], 1)
            before = self.final(tokens[:, : place + 1], routes)[0][:, -1]
        return routes

    def final(self, tokens: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the last norm gives, ``[batch, tokens, hidden]``, and the routes ``[batch, tokens, layers]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies
        x, taken = self.model.embed_tokens(tokens), []
        for index, layer in enumerate(self.model.layers):
            x, route = layer(x, angles, None if routes is None else routes[..., index])
            taken.append(route)
        return self.model.norm(x), torch.stack(taken, dim=-1)
