"""``duo-mlx generate``: text from a Duo model, with the routes of each token."""

import sys
from typing import Any

import click

# equal to duo_mlx.conditional.STRATEGIES, which needs mlx
STRATEGIES = ("auto", "dense", "planned", "sorted", "sync", "masked", "fused")


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--model", metavar="DIR|HUB_ID", help="Model directory or Hugging Face id.  [default: the embedded model]"
)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option(
    "--route", metavar="SPEC", help="Where routes come from, see above.  [default: the model's default_route]"
)
@click.option("--speculate", metavar="SPEC|default", help="Draft tokens by this cheaper route, for --route to verify "
              "at once; default: the model's default_draft.")  # fmt: skip
@click.option("--draft-tokens", metavar="K|auto", help="Draft so many before verifying; auto: as many as pay.")
@click.option("--strategy", type=click.Choice(STRATEGIES), default="auto", show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--temp", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: always the likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling and random routes.")
@click.option("--stop-token", "stop_tokens", multiple=True, help="End at this token, too (may be repeated).")
@click.option("--show-routes", is_flag=True, help="Colour each token by its share of big.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: if there is one]")
def command(
    prompt: str | None,
    model: str | None,
    revision: str | None,
    route: str | None,
    speculate: str | None,
    draft_tokens: str | None,
    strategy: str,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int,
    stop_tokens: tuple[str, ...],
    show_routes: bool,
    as_json: bool,
    chat: bool | None,
) -> None:
    """Generate text after PROMPT, or after standard input where PROMPT is - or left out.

    \b
    Route SPEC:
      big, small, skip        that route in every layer
      BBBBBBssss--            one character a layer: B big, s small, - skip
      big@0,5,11              big in these layers, small elsewhere
      budget:12, budget:0.6   the best known pattern with so many big layers,
                              or with this share of all-big's bytes
      router                  the model's own router decides, token by token
      random                  big or small, drawn for each token and layer
      random:0.5,0.4,0.1      the same with probabilities of big, small, skip
      FILE, FILE:N            replay: tokens.npz (sequence N) or a text file,
                              one pattern a line
    \b
    Examples:
      duo-mlx generate "It is a truth universally acknowledged"
      duo-mlx generate --route BBBBBBssssss --json "My dear Mr. Bennet"
      echo "Emma was" | duo-mlx generate --route random --show-routes
      duo-mlx generate --route big --speculate budget:6 "It is a truth"

    Text goes to standard output, statistics to standard error. Ctrl-C ends with what was generated.
    """
    if prompt in (None, "-"):
        if prompt is None and sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or - to read it from standard input")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise click.UsageError("the prompt is empty; give at least one word")

    import mlx.core as mx

    from duo_mlx.checkpoint import load, read_weights
    from duo_mlx.cli.painter import RoutePainter
    from duo_mlx.cli.statistics import Run
    from duo_mlx.errors import DuoError
    from duo_mlx.generation import draft_spec, encode, policy_of, room, stream_generate
    from duo_mlx.policies import FixedPolicy
    from duo_mlx.sampling import Sampling

    loaded, tokenizer = load(model, revision=revision, lazy=True, fuse=True)
    for token in stop_tokens:
        _add_stop_token(tokenizer, token)
    spec = route or loaded.config.default_route
    policy = policy_of(loaded, spec, seed)
    drafted_by = None if speculate is None else draft_spec(loaded, speculate)
    draft = None if drafted_by is None else policy_of(loaded, drafted_by, seed)
    tokens = _encode_chat(tokenizer, prompt) if _wants_chat(tokenizer, chat) else encode(tokenizer, prompt)
    limit = room(loaded, policy, len(tokens))
    if limit is not None and limit < max_tokens:
        click.echo(f"duo-mlx: only {limit} of {max_tokens} tokens fit after the prompt", err=True)
    mx.random.seed(seed)
    for used in filter(None, (policy, draft)):
        read_weights(loaded, used.pattern if isinstance(used, FixedPolicy) else None)

    run = Run(loaded, spec, strategy, seed, policy, drafted_by=drafted_by)
    painter = RoutePainter(tokenizer, tokens, sys.stdout) if show_routes and not as_json else None
    responses = stream_generate(
        loaded,
        tokenizer,
        tokens,
        route=policy,
        strategy=strategy,
        max_tokens=max_tokens,
        speculate=draft,
        draft_tokens=draft_tokens,
        sampler=Sampling(temp, top_p),
    )
    try:
        for response in responses:
            run.add(response)
            if painter:
                painter.add(response)
            elif not as_json:
                click.echo(response.text, nl=False)
    except KeyboardInterrupt:
        run.interrupt()
    if not run.generated:
        raise DuoError("interrupted before the first token")
    if as_json:
        click.echo(run.json())
    else:
        click.echo()
        if painter:
            painter.finish()
        click.echo(run.summary(), err=True)
    if run.interrupted:
        sys.exit(130)


def _wants_chat(tokenizer: Any, chat: bool | None) -> bool:
    if chat and not tokenizer.has_chat_template:
        raise click.UsageError("--chat: this model's tokenizer has no chat template")
    return bool(tokenizer.has_chat_template) if chat is None else chat


def _encode_chat(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return tokens


def _add_stop_token(tokenizer: Any, text: str) -> None:
    """Stop at ``text``, a piece of the vocabulary or a text that is encoded as one token."""
    vocabulary = tokenizer.get_vocab()
    tokens = [vocabulary[text]] if text in vocabulary else tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1:
        raise click.UsageError(
            f"--stop-token {text!r} is {len(tokens)} tokens in this model's vocabulary; it must be one"
        )
    tokenizer.eos_token_ids = tokenizer.eos_token_ids | set(tokens)
