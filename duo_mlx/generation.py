"""Generation: a model and its routes, driven by mlx-lm's `generate_step` or by speculation, as a stream of text."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, generate_step, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from duo_mlx import budget, threshold
from duo_mlx.drafting import Lengths
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy, parse_route
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.router import Router
from duo_mlx.routes import Routes
from duo_mlx.sampling import known, within
from duo_mlx.speculation import Speculation, Token
from duo_mlx.speculation import speculate as speculative_steps


@dataclass
class Response(GenerationResponse):
    """mlx-lm's response, and the `routes` of the pass that predicted this token.

    With speculation ``from_draft`` says that the token was drafted, ``corrected`` that it came instead of a drafted
    one, and ``speculation`` is the count so far, else None.
    """

    find_routes: Callable[[], Routes] = field(kw_only=True, repr=False)
    corrected: bool = field(default=False, kw_only=True)
    speculation: Speculation | None = field(default=None, kw_only=True)

    @cached_property
    def routes(self) -> Routes:
        """``[layers]``; what a router decided is read from the device when somebody asks for it."""
        return self.find_routes()


def policy_of(model: Model, route: str | None, seed: int = 0) -> Source:
    """The policy or router that a route SPEC names for this model; None: its ``default_route``.

    Raises:
        DuoError: what is wrong with ``route``, in one line.
    """
    spec = route or model.config.default_route
    if spec.startswith(budget.PREFIX):
        return FixedPolicy(budget.best_pattern(model, spec))
    if spec == "router":
        return model.router()
    if spec.startswith(threshold.PREFIX):
        return model.router(threshold.offsets(model.config, spec))
    return parse_route(spec, model.config.num_hidden_layers, seed)


def draft_spec(model: Model, speculate: str) -> str:
    """The route SPEC of a draft: ``default`` is the model's ``default_draft``, every other is itself.

    Raises:
        DuoError: the model has none.
    """
    if speculate == "default" and not model.config.default_draft:
        raise DuoError(
            "speculate default: this model's config.json has no default_draft; "
            "duo-mlx bench draft --model DIR --store finds one"
        )
    return model.config.default_draft if speculate == "default" else speculate


def pattern_of(model: Model, option: str, spec: str, drafts: bool = False) -> Routes:
    """The one pattern ``[layers]`` that an option's route SPEC means for all tokens, as the model realises it.

    ``drafts``: it is a draft's, and ``default`` the model's ``default_draft``.

    Raises:
        DuoError: it is none.
    """
    try:
        policy = policy_of(model, draft_spec(model, spec) if drafts else spec)
    except DuoError as error:
        raise DuoError(f"{option} {spec}: {error}") from None
    if not isinstance(policy, FixedPolicy):
        raise DuoError(f"{option} {spec}: must be one pattern for all tokens, such as small, BBss or budget:K")
    return model.config.realised(policy.pattern)


def encode(tokenizer: TokenizerWrapper, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt; special tokens are added as mlx-lm does.

    Raises:
        DuoError: the prompt is empty.
    """
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DuoError("the prompt is empty; give at least one word")
    if not isinstance(prompt, str):
        return prompt
    add_special_tokens = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
    tokens: list[int] = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    return tokens


@lru_cache(maxsize=4)  # reading a large vocabulary takes a tenth of a second
def vocabulary_of(tokenizer: TokenizerWrapper) -> int:
    """How many token ids a tokenizer has: one more than the highest."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _check_ids(model: Model, tokens: list[int]) -> None:
    """Refuse tokens without an embedding, which MLX would read from memory that is not the model's.

    Raises:
        DuoError: a token id is beyond the model's vocabulary.
    """
    size = model.config.vocab_size
    if beyond := [token for token in tokens if not 0 <= token < size]:
        raise DuoError(f"the prompt has the token id {beyond[0]}, but the model has embeddings for 0 to {size - 1}")


def room(model: Model, policy: Source, prompt_tokens: int) -> int | None:
    """How many tokens can be generated after a prompt; None where nothing limits them.

    Raises:
        DuoError: the prompt alone is longer than the model's context or than the routes to replay.
    """
    limits = [
        (model.config.max_position_embeddings, "the model's context is"),
        (None if isinstance(policy, Router) else policy.length, "the routes to replay end after"),
    ]
    left = []
    for limit, what in limits:
        if limit is None:
            continue
        if prompt_tokens > limit:
            raise DuoError(f"the prompt has {prompt_tokens} tokens, but {what} {limit}")
        left.append(limit - prompt_tokens + 1)  # the last token is generated but never read
    return min(left, default=None)


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int],
    *,
    route: str | Source | None = None,
    strategy: str = "auto",
    seed: int = 0,
    max_tokens: int = 256,
    speculate: str | Source | None = None,
    draft_tokens: int | str | Lengths | None = None,
    **kwargs: Any,
) -> Generator[Response, None, None]:
    """Generate token by token with per-token routes.

    Args:
        model: what `duo_mlx.load` gave.
        tokenizer: the same.
        prompt: text or token ids.
        route: a route SPEC (``router`` for the model's own router, ``budget:K`` as in `duo_mlx.budget`, or what
            `duo_mlx.policies.parse_route` reads), a policy or a router; None: the model's ``default_route``.
        strategy: how routes are carried out, see `duo_mlx.conditional`.
        seed: of random routes (sampling follows ``mx.random.seed``).
        max_tokens: at most so many tokens, and never beyond the model's context or the end of replayed routes.
        speculate: a route SPEC or policy, known to the host and cheaper than ``route``, that drafts tokens for
            ``route`` to verify, see `duo_mlx.speculation`; ``default``: the model's ``default_draft``; None: no
            speculation.
        draft_tokens: how many to draft before they are verified; None: ``auto``, as many as pay.
        kwargs: mlx-lm's own arguments of ``generate_step``: sampler, logits_processors, prompt_cache, kv_bits ...;
            with ``speculate`` those of `duo_mlx.speculation.speculate`.

    Yields:
        One `Response` a token: mlx-lm's fields and the token's ``routes [layers]``.

    Raises:
        DuoError: an empty or too long prompt, an unusable route or strategy, nothing to speculate with.
    """
    if route is None or isinstance(route, str):
        route = policy_of(model, route, seed)
    draft = policy_of(model, draft_spec(model, speculate), seed) if isinstance(speculate, str) else speculate
    if draft is None and draft_tokens is not None:
        raise DuoError("draft_tokens without speculate; say which route drafts")
    tokens = encode(tokenizer, prompt)
    _check_ids(model, tokens)
    if (vocabulary := vocabulary_of(tokenizer)) < model.config.vocab_size:  # rows that pad the embedding are no tokens
        sampler = kwargs.get("sampler")
        kwargs["sampler"] = within(sampler if draft is None else known(sampler), vocabulary)
    cached = _cached(kwargs.get("prompt_cache"))
    first = cached + len(tokens)
    limit = room(model, route, first)
    if max_tokens < 1:
        raise DuoError(f"max_tokens is {max_tokens}; it must be at least 1")
    max_tokens = max_tokens if limit is None else min(max_tokens, limit)
    routed = RoutedModel(model, route, strategy, start=cached, prompt=first - 1)
    if draft is None:
        plain = generate_step(mx.array(tokens), routed, max_tokens=max_tokens, **kwargs)
        steps = (Token(token, logprobs) for token, logprobs in plain)
    else:
        length = "auto" if draft_tokens is None else draft_tokens
        kwargs |= {"draft_tokens": length, "strategy": strategy, "max_tokens": max_tokens}
        steps = speculative_steps(model, tokens, route, draft, **kwargs)
    with wired_limit(routed, [generation_stream]), closing(steps):
        yield from _responses(steps, routed, tokenizer, len(tokens), first - 1, max_tokens)


def _responses(
    steps: Generator[Token, None, None],
    routed: RoutedModel,
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    position: int,
    max_tokens: int,
) -> Generator[Response, None, None]:
    """Tokens as mlx-lm's `stream_generate` gives them, until a stop token or the last; ``position`` is the prompt's."""
    detokenizer = tokenizer.detokenizer
    before = time.perf_counter()
    for count, step in enumerate(steps, start=1):
        if count == 1:
            prompt_tps = prompt_tokens / (time.perf_counter() - before)
            before = time.perf_counter()
        stop = step.token in tokenizer.eos_token_ids
        finish_reason = "stop" if stop else "length" if count == max_tokens else None
        if not stop:
            detokenizer.add_token(step.token)
        if finish_reason:
            detokenizer.finalize()
        yield Response(
            text=detokenizer.last_segment,
            token=step.token,
            logprobs=step.logprobs,
            from_draft=step.from_draft,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tps,
            generation_tokens=count,
            generation_tps=count / (time.perf_counter() - before),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            find_routes=routed.later(position + count - 1),
            corrected=step.corrected,
            speculation=step.speculation,
        )
        if finish_reason:
            return


def _cached(prompt_cache: list[Any] | None) -> int:
    """Positions that a prompt cache holds already."""
    return int(prompt_cache[0].offset) if prompt_cache else 0


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: str | list[int], **kwargs: Any) -> str:
    """The whole text that `stream_generate` gives; same arguments and errors."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **kwargs))
