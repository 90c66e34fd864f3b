"""``--verify``: the PyTorch reference and the written model directory on the same tokens, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from duo_mlx import checkpoint
from duo_mlx.convert.readers import Weights, to_torch
from duo_mlx.errors import DuoError
from duo_mlx.model import ModelArgs
from duo_mlx.policies import RandomPolicy
from duo_mlx.routes import Routes, parse_pattern

TOLERANCE = 1e-4  # on logits, computed in float32 on both sides


@dataclass(frozen=True)
class Parity:
    """How far MLX is from PyTorch under one kind of route."""

    route: str
    max_abs_difference: float
    mean_kl: float  # nats, of MLX's distribution from PyTorch's
    argmax_agreement: float  # share of tokens

    def __str__(self) -> str:
        return f"{self.route:8}{self.max_abs_difference:12.2e}{self.mean_kl:12.2e}{self.argmax_agreement:12.2%}"


HEAD = f"{'route':8}{'max |diff|':>12}{'mean KL':>12}{'argmax':>12}"


def measure(
    directory: Path, config: dict[str, Any], weights: Weights, batch: int = 2, tokens: int = 64, seed: int = 0
) -> list[Parity]:
    """Parity for big, small, skip and random routes, on random tokens ``[batch, tokens]``.

    Raises:
        DuoError: PyTorch is not installed, or its reference lacks an option of this configuration.
    """
    try:
        import torch

        from duo_mlx.convert.reference import DuoConfig, DuoModel
    except ImportError:
        raise DuoError("--verify needs PyTorch: pip install 'duo-mlx[torch]'") from None
    args = ModelArgs.from_dict(config)
    if "sliding_attention" in args.layer_types:
        raise DuoError("--verify: the PyTorch reference knows no sliding_attention; convert without it")
    with torch.no_grad():
        try:
            reference = DuoModel(DuoConfig.from_dict(config)).eval()
        except ValueError as error:
            raise DuoError(f"--verify: {error}; convert without it") from None
        reference.load_state_dict({name: to_torch(value).float() for name, value in weights.items()}, strict=False)
        model, _ = checkpoint.load(directory, dtype=mx.float32)
        tokens = min(tokens, args.max_position_embeddings or tokens)
        inputs = np.random.default_rng(seed).integers(0, args.vocab_size, (batch, tokens))
        found = []
        for name, routes in _routes(args.num_hidden_layers, batch, tokens, seed).items():
            theirs = reference(torch.from_numpy(inputs), torch.from_numpy(routes.astype(np.int64))).double()
            ours = torch.from_numpy(np.array(model(mx.array(inputs), routes=routes))).double()
            log_theirs, log_ours = theirs.log_softmax(-1), ours.log_softmax(-1)
            found.append(
                Parity(
                    name,
                    (theirs - ours).abs().max().item(),
                    (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean().item(),
                    (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item(),
                )
            )
    return found


def _routes(layers: int, batch: int, tokens: int, seed: int) -> dict[str, Routes]:
    fixed = {word: parse_pattern(word, layers) for word in ("big", "small", "skip")}
    return fixed | {"random": RandomPolicy(layers, 0.4, 0.3, 0.3, seed).routes(0, tokens, batch)}


def failures(found: list[Parity]) -> list[Parity]:
    """Those beyond the tolerance; a NaN is beyond any."""
    return [parity for parity in found if not parity.max_abs_difference <= TOLERANCE]
