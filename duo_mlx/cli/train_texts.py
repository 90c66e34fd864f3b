"""``duo-mlx train texts``: what a model goes on with after windows of a text."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from duo_mlx.cli import train_options
from duo_mlx.cli.train_options import COUNT


@click.command()
@train_options.texts
@click.option("--model", "path", metavar="DIR|HUB_ID", help="Model that writes.  [default: the embedded model]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE.jsonl",
              help="One document a window: the window, and what the model said.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing --out.")
@click.option("--count", type=COUNT, default=1024, show_default=True, help="Windows.")
@click.option("--prompt-tokens", type=COUNT, default=32, show_default=True, help="Of a window.")
@click.option("--max-tokens", type=COUNT, default=64, show_default=True, help="That are said after it.")
@click.option("--route", default="big", show_default=True, metavar="PATTERN", help="Of the model.")
@click.option("--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="0: always the likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--batch", type=COUNT, default=64, show_default=True, help="Windows at once.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of windows and sampling.")
def command(files: tuple[Path, ...], path: str | None, revision: str | None, out: Path, force: bool, text_key: str,
            held_out: float, count: int, prompt_tokens: int, max_tokens: int, route: str, temp: float, top_p: float,
            batch: int, seed: int) -> None:  # fmt: skip
    """Let a model go on with windows of TEXT, for its drafts to learn from.

    Windows are taken at random from what train small would learn from. What the model says after them is what it asks
    its drafts for when it generates, at the temperature at which it will.

    \b
    Examples:
      duo-mlx train texts novels/*.txt --model smollm2-duo --out said.jsonl
      duo-mlx train small said.jsonl --model smollm2-duo --objective draft --out drafts

    Ctrl-C ends with what was said.
    """
    from duo_mlx.files import output_file, refuse_output, writing

    refuse_output(out, force, {".jsonl": "documents to train on"})

    import mlx.core as mx

    from duo_mlx import checkpoint
    from duo_mlx.cli.progress import shown
    from duo_mlx.errors import DuoError
    from duo_mlx.generation import pattern_of
    from duo_mlx.sampling import Sampling
    from duo_mlx.training import data
    from duo_mlx.training.continued import continued, windows

    question = data.Question(files, text_key, held_out)
    question.check()
    model, tokenizer = checkpoint.load(path, revision=revision, fuse=True)
    limit = model.config.max_position_embeddings
    if limit is not None and prompt_tokens + max_tokens > limit:
        raise DuoError(
            f"--prompt-tokens and --max-tokens come to {prompt_tokens + max_tokens}; the model's context is {limit}"
        )
    pattern = pattern_of(model, "--route", route)
    mx.random.seed(seed)
    done, interrupted = 0, False
    with shown() as progress, TemporaryDirectory() as folder, output_file(out, force) as new, writing(out):
        if not question.is_token_file:
            vocabulary = model.config.vocab_size
            data.tokenise(question, Path(folder), tokenizer, vocabulary, {}, lambda *at: progress("tokenising", *at))
        read = data.open_data(question, Path(folder), model.config.vocab_size, lambda *_: None)
        if len(read.train) < prompt_tokens:
            raise DuoError(f"--prompt-tokens {prompt_tokens}: there are {len(read.train)} tokens outside --held-out")
        prompts = windows(read.train, prompt_tokens, count, seed)
        ends = tokenizer.eos_token_ids
        with new.open("w", encoding="utf-8") as file:
            try:
                texts = continued(model, prompts, max_tokens, pattern, Sampling(temp, top_p), ends, batch)
                for done, ids in enumerate(texts, 1):
                    file.write(json.dumps({"text": tokenizer.decode(ids)}, ensure_ascii=False) + "\n")
                    progress("windows", done, count)
            except KeyboardInterrupt:
                interrupted = True
        if interrupted and not done:
            raise DuoError("interrupted before the first text")
    click.echo(f"wrote {out}: {done} texts{', interrupted' if interrupted else ''}", err=True)
    if interrupted:
        sys.exit(130)
