"""What one ``duo-mlx generate`` reports of itself: speed, route mix, bytes, host syncs."""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from duo_mlx import auto, conditional, cost
from duo_mlx.generation import Response
from duo_mlx.model import Model
from duo_mlx.routes import histogram


class Run:
    """Collects the responses of one generation and sums them up.

    ``routes`` count token x layer over the generated tokens, each by the pass that predicted it. ``host_syncs`` are
    the waits of the host for the device: one for each generated token, and each time a strategy read a route.
    ``bytes_per_token`` are the weights and the KV cache that the mean generated token's route reads.
    """

    def __init__(self, model: Model, spec: str, strategy: str, seed: int, by_router: bool):
        self.model = model
        self.spec = spec
        self.by_router = by_router
        if strategy == "auto":  # a single token with host-known routes is always planned
            weight = model.model.norm.weight
            strategy = auto.choose(model.layers[0].mlp, 1, weight.dtype, "device") if by_router else "planned"
        self.strategy = strategy
        self.seed = seed
        self.text = ""
        self.responses: list[Response] = []
        self.interrupted = False
        self._reads = conditional.host_reads()

    @property
    def generated(self) -> int:
        return len(self.responses)

    def add(self, response: Response) -> None:
        self.text += response.text
        self.responses.append(response)

    def interrupt(self) -> None:
        self.interrupted = True

    def results(self) -> dict[str, Any]:
        """All figures, times in seconds."""
        last = self.responses[-1]
        routes = np.stack([response.routes for response in self.responses])
        context = last.prompt_tokens + (self.generated - 1) // 2
        table = cost.weight_bytes(self.model, self.by_router) + cost.cache_bytes(self.model, context)
        return {
            "text": self.text,
            "route": self.spec,
            "seed": self.seed,
            "strategy": self.strategy,
            "finish_reason": "interrupted" if self.interrupted else last.finish_reason,
            "prompt_tokens": last.prompt_tokens,
            "generation_tokens": self.generated,
            "ttft_s": last.prompt_tokens / last.prompt_tps,
            "prompt_tps": last.prompt_tps,
            "generation_tps": last.generation_tps,
            "peak_memory_bytes": mx.get_peak_memory(),
            "routes": histogram(routes),
            "routes_per_layer": [histogram(column) for column in routes.T],
            "host_syncs": self.generated + conditional.host_reads() - self._reads,
            "bytes_per_token": round(float(table.of(routes).mean())),
            "energy_j": None,
            "energy_meter": "none",
        }

    def json(self) -> str:
        return json.dumps(self.results(), ensure_ascii=False)

    def summary(self) -> str:
        """The same figures for a person."""
        results = self.results()
        total = self.generated * self.model.args.num_hidden_layers
        mix = ", ".join(f"{count / total:.0%} {route}" for route, count in results["routes"].items())
        lines = [
            f"prompt      {results['prompt_tokens']} tokens, first token after {results['ttft_s']:.3f} s",
            f"generation  {results['generation_tokens']} tokens, {results['generation_tps']:.1f} tokens/s"
            f" ({results['finish_reason']})",
            f"routes      {mix} ({results['route']}, {results['strategy']})",
            f"memory      {results['bytes_per_token'] / 1e6:.1f} MB read a token,"
            f" peak {results['peak_memory_bytes'] / 1e6:.0f} MB",
        ]
        return "\n".join(lines)
