"""Validation loss of a Duo model under each route, with MLX: nats a token and bits a byte.

Windows are the model's context long and follow one another; the loss of a text's held-out end is what a model that
was trained on the rest should be judged by.

    python examples/loss_by_route.py TEXT... [--model DIR] [--held-out 0.05] [--routes big BBBBBBssssss small]
"""

import argparse
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import duo_mlx
from duo_mlx.generation import policy_of
from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.router import Router
from duo_mlx.routes import Route


def held_out_windows(path: Path, share: float, length: int, tokenizer: object) -> tuple[mx.array, int, int]:
    """Windows ``[windows, length + 1]`` of the file's last ``share``, and how many bytes and tokens that text has."""
    text = path.read_text(encoding="utf-8")
    text = text[round(len(text) * (1 - share)) :]
    tokens = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    starts = range(0, len(tokens) - length, length)
    if not starts:
        sys.exit(f"{path}: its last {share:g} has {len(tokens)} tokens, fewer than one window of {length + 1}")
    return mx.array([tokens[start : start + length + 1] for start in starts]), len(text.encode()), len(tokens)


def mean_loss(model: Model, windows: mx.array, policy: Source, batch: int = 4) -> tuple[float, float]:
    """Mean next-token loss in nats, and the share of big."""
    total, big, length = 0.0, 0.0, windows.shape[1] - 1
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        if not isinstance(policy, Router | LookAhead):
            routes = policy.routes(0, length, batch=start + len(rows))
            # every window has its own draws, whatever the batch size
            routes = model.config.realised(routes[start:] if routes.ndim == 3 else routes)
            logits = model(rows[:, :-1], routes=routes)
        else:
            routed = RoutedModel(model, policy)
            logits = routed(rows[:, :-1])
            routes = routed.taken(0, length, len(rows))
        total += float(nn.losses.cross_entropy(logits, rows[:, 1:], reduction="sum"))
        big += len(rows) * float((routes == Route.BIG).mean())
    return total / (len(windows) * length), big / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--model", help="model directory or hub id; the embedded model if left out")
    parser.add_argument("--held-out", type=float, default=0.05, help="share at the end of every file; 1 for all of it")
    parser.add_argument("--routes", nargs="+", default=["big", "random:0.5,0.4,0.1", "small", "skip"])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = duo_mlx.load(args.model)
    parts = [held_out_windows(path, args.held_out, args.length, tokenizer) for path in args.text]
    windows = mx.concatenate([part[0] for part in parts])
    bytes_per_token = sum(part[1] for part in parts) / sum(part[2] for part in parts)
    results = {}
    for spec in args.routes:
        loss, share = mean_loss(model, windows, policy_of(model, spec, args.seed))
        results[spec] = {
            "nats_per_token": round(loss, 4),
            "perplexity": round(math.exp(loss), 2),
            "bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
            "share_of_big": round(share, 4),
        }
        print(f"{spec:24}{loss:8.4f} nats/token  {results[spec]['bits_per_byte']:.4f} bits/byte", file=sys.stderr)
    record = {
        "texts": [path.name for path in args.text],
        "held_out": args.held_out,
        "tokens": int(np.prod(windows[:, 1:].shape)),
        "bytes_per_token": round(bytes_per_token, 4),
        "window": args.length,
        "seed": args.seed,
        "losses": results,
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "mlx-lm")},
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
