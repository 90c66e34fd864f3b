"""Speculation against plain decoding, and against mlx-lm's own speculation with the same Duo as a second model.

    python -m duo_mlx.bench.speculated --draft small --draft budget:6 --out speculated.json

In each interleaved round the same prompts are continued by plain decoding, by self-speculation with each draft and each
number of drafted tokens, and by mlx-lm's `speculative_generate_step` with each draft and number, on the same weights.
mlx-lm takes a drafted token that equals what it samples, we go by speculative sampling; without --temp both give the
tokens of plain decoding. That is checked: where a text differs, the two tokens' logits there are given, since a
verifying pass rounds otherwise than single steps. Prompts are read before the clock starts.

In rounds of their own, verifying passes over 1, 2, 4 and 8 tokens are timed, and a step of each draft. With the
acceptance these say what speculation should come to. mlx-lm has no ``auto``, which is held against its fastest number,
and always drafts from the whole vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np

from duo_mlx import conditional, speculation
from duo_mlx.bench import options, reading
from duo_mlx.bench.continuations import Continuation, DraftModel, Ids, Plain, Speculated
from duo_mlx.bench.interleave import interleave
from duo_mlx.bench.peer import filled_cache
from duo_mlx.bench.prefill import CLOCKS
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.speculated_summary import PASSES, PEER, PLAIN, REPEATS, of_costs, summary, table
from duo_mlx.bench.subject import Subject
from duo_mlx.bench.system import system_record
from duo_mlx.errors import DuoError
from duo_mlx.generation import pattern_of
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy
from duo_mlx.routes import Routes, format_pattern
from duo_mlx.sampling import Sampling


def continuations(
    model: Model,
    verify: Routes,
    drafts: Mapping[str, Routes],
    draft_tokens: Sequence[str],
    prompts: Sequence[Ids],
    tokens: int,
    sampling: Sampling,
    against: bool,
) -> dict[str, Continuation]:
    """All ways to continue, by name: ``plain``, ``DRAFT, K`` and ``mlx-lm, DRAFT, K``."""
    what = prompts, tokens, sampling
    found: dict[str, Continuation] = {PLAIN: Plain(model, verify, *what)}
    for spec, draft in drafts.items():
        for number in draft_tokens:
            found[f"{spec}, {number}"] = Speculated(model, verify, draft, number, *what)
            if against and number != "auto":
                found[f"{PEER}, {spec}, {number}"] = DraftModel(model, verify, draft, int(number), *what)
    return found


def differences(
    model: Model, verify: Routes, prompts: Sequence[Ids], texts: Mapping[str, list[Ids]]
) -> list[dict[str, Any]]:
    """Where a text is first another than plain decoding's, and by how much the logits of the two tokens differ."""
    found = []
    for name, theirs in texts.items():
        for number, (prompt, plain, other) in enumerate(zip(prompts, texts[PLAIN], theirs, strict=True)):
            if plain == other:
                continue
            place = next(i for i, (one, two) in enumerate(zip(plain, other, strict=True)) if one != two)
            logits = np.array(model(mx.array([[*prompt, *plain[:place]]]), routes=verify)[0, -1].astype(mx.float32))
            apart = float(logits[plain[place]] - logits[other[place]])
            found.append({"name": name, "prompt": number, "token": place, "logits_apart": apart})
    return found


def passes(model: Model, verify: Routes, drafts: Mapping[str, Routes], context: int) -> dict[str, Callable[[], None]]:
    """Runs of `REPEATS` passes after ``context`` positions: ``pass over N`` verifying, ``step of DRAFT``."""
    cache, draft_head = filled_cache(model, context, seed=0), model.draft_head()

    def passing(pattern: Routes, tokens: int, head: Callable[[mx.array], mx.array]) -> Callable[[], None]:
        inputs, plan = mx.zeros((1, tokens), mx.uint32), conditional.plan(pattern, 1, tokens, len(cache), "auto")

        def call() -> None:
            for _ in range(REPEATS):
                out = model.states(inputs, cache, plan, "auto")
                mx.eval(mx.argmax(head(out), axis=-1))
                for layer in cache:
                    layer.trim(tokens)

        return call

    calls = {f"pass over {tokens}": passing(verify, tokens, model.head) for tokens in PASSES}
    return calls | {f"step of {spec}": passing(draft, 1, draft_head) for spec, draft in drafts.items()}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", "path", metavar="DIR|HUB_ID", help="A model in place of the embedded one.")
@click.option("--bits", type=click.Choice(["4", "8"]), help="Quantise the weights first.")
@click.option("--route", default="big", metavar="SPEC", help="The pattern that verifies.")
@click.option("--draft", "drafts", multiple=True, default=["small"], metavar="SPEC", help="May be repeated.")
@click.option(
    "--draft-tokens", "numbers", multiple=True, default=["auto", "2", "4"], metavar="K|auto", help="May be repeated."
)
@click.option(
    "--draft-vocabulary", "vocabulary", type=click.IntRange(1), metavar="N", help="Draft the first N tokens alone."
)
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="Paragraphs, in place of the bundled ones.")
@click.option("--count", type=click.IntRange(1), default=4, help="Prompts that are continued in a run.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=32, help="Length of a prompt.")
@click.option("--tokens", type=click.IntRange(2), default=128, help="Tokens generated after each prompt.")
@options.rounds
@click.option("--against-mlx-lm/--no-against-mlx-lm", "against", default=True, help="Time mlx-lm's speculation, too.")
@click.option("--temp", type=click.FloatRange(min=0), default=0.0, help="0: the likeliest token.")
@options.clock
@options.out
@options.force
def command(
    path: str | None,
    bits: str | None,
    route: str,
    drafts: tuple[str, ...],
    numbers: tuple[str, ...],
    vocabulary: int | None,
    file: Path | None,
    count: int,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    against: bool,
    temp: float,
    clock: str,
    out: Path | None,
    force: bool,
) -> None:
    """Time speculation against plain decoding and against mlx-lm's speculation."""
    if out:
        check_output(out, force)
    text = reading.read(file, "prompts")
    subject = Subject(path, None)
    model = subject.model(f"{bits}-bit" if bits else subject.stored)
    if vocabulary:
        model.draft_from(vocabulary)
    verify = pattern_of(model, "--route", route)
    patterns = {spec: pattern_of(model, "--draft", spec, drafts=True) for spec in drafts}
    for spec, draft in patterns.items():
        for number in numbers:
            check(model, verify, draft, spec, number)
    limit = model.config.max_position_embeddings
    if limit is not None and prompt_tokens + tokens + 1 > limit:
        raise DuoError(
            f"--prompt-tokens and --tokens come to {prompt_tokens + tokens} positions; the model has {limit}"
        )
    paragraphs = reading.prompts(text, subject.tokenizer)
    prompts = [reading.cut(paragraphs, number, prompt_tokens, subject.first) for number in range(count)]
    before = system_record()
    calls = passes(model, verify, patterns, prompt_tokens + tokens // 2)
    ways = continuations(model, verify, patterns, numbers, prompts, tokens, Sampling(temp), against)
    texts = {name: way() for name, way in ways.items()}  # which also warms up
    apart = [] if temp else differences(model, verify, prompts, texts)
    for way in ways.values():
        way.reset()

    def progress(done: int) -> None:
        click.echo(f"round {done} of {rounds}", err=True)

    timings = interleave(ways, rounds, warm_up=0, after_round=progress, clock=CLOCKS[clock])
    timed = interleave(calls, rounds, after_round=progress, clock=CLOCKS[clock])
    result = summary(timings, ways, of_costs(timed), list(patterns))
    click.echo(table(result, apart, greedy=not temp))
    if out:
        asked = "".join([f" --draft {spec}" for spec in drafts] + [f" --draft-tokens {number}" for number in numbers])
        of = (f" --model {Path(path).name}" if path else "") + (f" --bits {bits}" if bits else "")
        of += f" --draft-vocabulary {vocabulary}" if vocabulary else ""
        of += f" --prompts {file.name}" if file else ""
        rest = f"--count {count} --prompt-tokens {prompt_tokens} --tokens {tokens} --rounds {rounds} --temp {temp:g}"
        rest += f" --clock {clock}" + ("" if against else " --no-against-mlx-lm")
        write_runs(
            out,
            f"python -m duo_mlx.bench.speculated{of} --route {route}{asked} {rest}",
            before,
            timings.runs | timed.runs,
            column="way",
            model=subject.record,
            prompts=text.record(count * prompt_tokens, count),
            patterns={spec: format_pattern(each) for spec, each in ({route: verify} | patterns).items()},
            tokens=tokens,
            differences=apart,
            summary=result,
        )


def check(model: Model, verify: Routes, draft: Routes, spec: str, number: str) -> None:
    """Refuse before anything is measured what `speculate` would refuse.

    Raises:
        DuoError: with the options named.
    """
    try:
        speculation.checked(model, FixedPolicy(verify), FixedPolicy(draft), number)
    except DuoError as error:
        raise DuoError(f"--draft {spec} --draft-tokens {number}: {error}") from None


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "speculated")


if __name__ == "__main__":
    main()
