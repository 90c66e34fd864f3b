"""A model bound to where its routes come from, callable as mlx-lm calls a model; and what a router would have said."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from duo_mlx import conditional
from duo_mlx.errors import DuoError
from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.policies import Policy
from duo_mlx.router import Follow, Recorder, Router
from duo_mlx.routes import Route, Routes

Source = Policy | Router | LookAhead  # of routes


class RoutedModel(nn.Module):
    """A model that passes each position's routes on.

    One object serves one sequence (or one batch of sequences of equal length).

    Args:
        model: a Duo.
        policy: where routes come from.
        strategy: how they are carried out.
        start: the position of the first token.
        prompt: positions before this one are a prompt's. A router that looks ahead leaves them to ``default_route``,
            and takes all others one by one, however many come in a pass.
    """

    def __init__(self, model: Model, policy: Source, strategy: str = "auto", start: int = 0, prompt: int = 0):
        super().__init__()
        self.model = model
        self.policy = Recorder(policy) if isinstance(policy, Router) else policy
        self.strategy = conditional.check_strategy(strategy)
        self.position = start
        self.prompt = prompt
        self.decided: dict[int, list[mx.array]] = {}  # a router's routes of each pass, by its last position
        self.foreseen: dict[int, Routes] = {}  # those of one that looks ahead, [batch, layers] by position
        self.final: mx.array | None = None  # [batch, hidden], what the last norm made of the token before

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        batch, tokens = inputs.shape[:2] if input_embeddings is None else input_embeddings.shape[:2]
        start, self.position = self.position, self.position + tokens
        if isinstance(self.policy, LookAhead):
            if input_embeddings is not None:
                raise DuoError("a router that looks ahead needs token ids, not embeddings")
            return self._looking_ahead(self.policy, inputs, cache, start)
        if isinstance(self.policy, Recorder):
            logits = self.model(inputs, cache, input_embeddings, routes=self.policy, strategy=self.strategy)
            self.decided[self.position - 1] = self.policy.taken
            return logits
        routes = self.routes(start, self.position, batch)
        return self.model(inputs, cache, input_embeddings, routes=routes, strategy=self.strategy)

    def _looking_ahead(self, policy: LookAhead, inputs: mx.array, cache: Any, start: int) -> mx.array:
        """Logits ``[batch, tokens, vocab]`` of ``inputs [batch, tokens]`` at positions from ``start`` on."""
        tokens = inputs.shape[1]
        if cache is None:  # a text of its own, however it is counted
            cache, self.final = self.model.make_cache(), None
        read = min(max(self.prompt - start, 0), tokens)
        out = [self._pass(inputs[:, :read], cache, self.model.config.default_pattern)] if read else []
        for place in range(read, tokens):
            token = inputs[:, place : place + 1]
            embedded = self.model.embedding(token)[:, 0]
            before = mx.zeros_like(embedded) if self.final is None else self.final
            routes = policy.read(embedded, before)
            self.foreseen[start + place] = self.model.config.realised(routes)
            out.append(self._pass(token, cache, routes[:, None]))
        return self.model.head(mx.concatenate(out, axis=1) if len(out) > 1 else out[0])

    def _pass(self, inputs: mx.array, cache: Any, routes: Routes) -> mx.array:
        planned = conditional.plan(
            routes, inputs.shape[0], inputs.shape[1], self.model.config.num_hidden_layers, self.strategy
        )
        out = self.model.states(inputs, cache, planned, self.strategy)
        self.final = out[:, -1]
        return out

    def routes(self, start: int, stop: int, batch: int = 1) -> Routes:
        """The policy's routes as the model realises them, ``[layers]`` or ``[batch, tokens, layers]``.

        After the policy's end, where mlx-lm starts one step whose result it drops, they are skip. A router that looks
        ahead has routes of the positions that were passed.
        """
        config = self.model.config
        assert not isinstance(self.policy, Recorder), "a router has no routes before its pass"
        if isinstance(self.policy, LookAhead):
            read = np.broadcast_to(config.realised(config.default_pattern), (batch, config.num_hidden_layers))
            return np.stack([self.foreseen.get(place, read) for place in range(start, stop)], axis=1)
        if self.policy.length is not None and start >= self.policy.length:
            return np.full(config.num_hidden_layers, Route.SKIP, np.uint8)
        return config.realised(self.policy.routes(start, stop, batch))

    def taken(self, start: int, stop: int, batch: int = 1) -> Routes:
        """The routes ``[batch, stop - start, layers]`` of the last pass, which was over these positions."""
        config = self.model.config
        if isinstance(self.policy, Recorder):
            columns = [np.array(each).reshape(batch, -1) for each in self.policy.taken]
            return config.realised(np.stack(columns, axis=-1).astype(np.uint8))
        return np.broadcast_to(self.routes(start, stop, batch), (batch, stop - start, config.num_hidden_layers))

    def later(self, position: int) -> Callable[[], Routes]:
        """What gives the first sequence's routes ``[layers]`` at the last position of a pass, when it is called."""
        if not isinstance(self.policy, Recorder):
            return lambda: self.taken(position, position + 1)[0, 0]
        decided = self.decided.pop(position)
        for passed in [earlier for earlier in self.decided if earlier < position]:
            del self.decided[passed]  # those of a prompt's chunks
        # each is evaluated with its pass, so that reading it does not wait for the next
        return lambda: self.model.config.realised(np.array([np.ravel(route[0])[-1] for route in decided], np.uint8))

    @property
    def layers(self) -> list[Any]:
        layers: list[Any] = self.model.layers
        return layers

    def make_cache(self) -> list[Any]:
        return self.model.make_cache()


def ask(model: Model, tokens: mx.array, routes: Routes) -> tuple[mx.array, mx.array]:
    """A pass by given routes, and what the model's router would have said in it.

    Args:
        model: a Duo; no gradient goes back to it from what the router sees.
        tokens: ids ``[batch, tokens]``.
        routes: ``[batch, tokens, layers]``.

    Returns:
        Logits ``[batch, tokens, vocab]``, and the router's ``[batch, tokens, layers, choices]`` in float32.
    """
    router = model.router()
    if isinstance(router, LookAhead):
        planned = conditional.plan(routes, tokens.shape[0], tokens.shape[1], model.config.num_hidden_layers, "sorted")
        final = model.states(tokens, None, planned, "sorted")
        before = mx.pad(final[:, :-1], [(0, 0), (1, 0), (0, 0)])
        embedded = model.embedding(tokens)
        return model.head(final), router.logits(mx.stop_gradient(embedded), mx.stop_gradient(before))
    follow = Follow(routes)
    logits = model(tokens, routes=follow, strategy="sorted")
    said = [router.logits(layer, mx.stop_gradient(x)) for layer, x in enumerate(follow.inputs)]
    return logits, mx.stack(said, axis=2).astype(mx.float32)
