"""What one ``duo-mlx generate`` reports of itself: speed, route mix, bytes, host syncs."""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from duo_mlx import auto, conditional, cost
from duo_mlx.generation import Response
from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.routed import Source
from duo_mlx.router import Router
from duo_mlx.routes import Routes, histogram


class Run:
    """Collects the responses of one generation and sums them up.

    ``routes`` count token x layer over the generated tokens, each by the pass that predicted it. ``host_syncs`` are
    the waits of the host for the device: one for each generated token, or with speculation for each verification, and
    each time a strategy read a route. ``bytes_per_token`` are the weights and the KV cache that the mean generated
    token's route reads; with speculation all passes', drafts and verifications, over the tokens that came of them.
    """

    def __init__(
        self, model: Model, spec: str, strategy: str, seed: int, policy: Source, drafted_by: str | None = None
    ):
        self.model = model
        self.spec = spec
        self.by_router = isinstance(policy, Router | LookAhead)
        self.drafted_by = drafted_by
        if strategy == "auto":  # a single token with host-known routes is always planned
            within = isinstance(policy, Router)
            strategy = auto.choose(model.ffns[0], 1, model.dtype, "device") if within else "planned"
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
        waits, read = self._passes(routes)
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
            "host_syncs": waits + conditional.host_reads() - self._reads,
            "bytes_per_token": round(read),
            "energy_j": None,
            "energy_meter": "none",
            "speculation": self._speculation(),
        }

    def _passes(self, routes: Routes) -> tuple[int, float]:
        """How many passes the host waited for, and the bytes read for a token; ``routes`` are ``[tokens, layers]``."""
        counts = self.responses[-1].speculation
        if counts is not None:
            return counts.verifications, (counts.weight_bytes + counts.cache_bytes) / counts.tokens
        context = self.responses[-1].prompt_tokens + (self.generated - 1) // 2
        table = cost.weight_bytes(self.model, self.by_router) + cost.cache_bytes(self.model, context)
        return self.generated, float(table.of(routes).mean())

    def _speculation(self) -> dict[str, Any] | None:
        """What drafting came to; the first position is that of a round's first drafted token."""
        counts = self.responses[-1].speculation
        if counts is None:
            return None
        return {
            "route": self.drafted_by,
            "verifications": counts.verifications,
            "drafted": sum(counts.drafted),
            "accepted": sum(counts.accepted),
            "drafted_by_position": counts.drafted,
            "acceptance_by_position": counts.acceptance,
            "tokens_per_verification": counts.tokens / counts.verifications,
            "weight_bytes_per_token": round(counts.weight_bytes / counts.tokens),
        }

    def json(self) -> str:
        return json.dumps(self.results(), ensure_ascii=False)

    def summary(self) -> str:
        """The same figures for a person."""
        results = self.results()
        total = self.generated * self.model.config.num_hidden_layers
        mix = ", ".join(f"{count / total:.0%} {route}" for route, count in results["routes"].items())
        lines = [
            f"prompt      {results['prompt_tokens']} tokens, first token after {results['ttft_s']:.3f} s",
            f"generation  {results['generation_tokens']} tokens, {results['generation_tps']:.1f} tokens/s"
            f" ({results['finish_reason']})",
            f"routes      {mix} ({results['route']}, {results['strategy']})",
            f"memory      {results['bytes_per_token'] / 1e6:.1f} MB read a token,"
            f" peak {results['peak_memory_bytes'] / 1e6:.0f} MB",
        ]
        if drafts := results["speculation"]:
            lines.insert(
                2,
                f"speculation {drafts['accepted']} of {drafts['drafted']} tokens drafted by {drafts['route']} accepted,"
                f" {drafts['tokens_per_verification']:.2f} tokens a verification",
            )
        return "\n".join(lines)
