"""Stage 1 of Duo-LLM in PyTorch: train a Duo model on text files with random routing.

In every layer each token is sent to the big FFN, the small FFN or past both, at random with the given probabilities
(Duo-LLM, section "Stage 1"; the paper draws big and small with 0.5 each and never skips). No router is trained here.
Two options go beyond the paper: ``--p-skip`` (so that skipping works afterwards) and ``--whole-big``, the share of
sequences that take big everywhere (so that the all-big model is trained as a whole, too). A third, ``--big-first``, is
what the paper advises against: the model without its small FFNs is trained first, then these alone beside the frozen
rest (see compare_stage1.py).

The output directory is what ``duo-mlx convert`` reads: config.json, pytorch_model.bin, tokenizer.model. Beside them
lie log.csv, training.json (the recipe and the final losses) and checkpoint.pt, from which ``--resume`` continues bit
for bit: windows, routes and dropout of a step depend on the seed and the step's number alone.

    python examples/train_pytorch.py TEXT... --out runs/duo
"""

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from duo_mlx.convert.reference import BIG, SKIP, SMALL, DuoConfig, DuoModel

UNIFORM: dict[str, Tensor | int | None] = {"big": BIG, "random": None, "small": SMALL, "skip": SKIP}
LOG_COLUMNS = ["step", "tokens", "lr", "train_loss", "big", "random", "small", "skip", "tokens_per_s"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a Duo model with random routing (PyTorch).")
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    parser.add_argument("--held-out", type=float, default=0.05, help="share at the end of every file for validation")
    model = parser.add_argument_group("model")
    model.add_argument("--vocab", type=int, default=4096)
    model.add_argument("--layers", type=int, default=12)
    model.add_argument("--hidden", type=int, default=128)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--kv-heads", type=int, default=2)
    model.add_argument("--big", type=int, default=896, help="inner width of the big FFN")
    model.add_argument("--small", type=int, default=56, help="inner width of the small FFN")
    model.add_argument("--skip-scope", choices=["ffn", "layer"], default="ffn")
    routing = parser.add_argument_group("random routing")
    routing.add_argument("--p-big", type=float, default=0.5)
    routing.add_argument("--p-small", type=float, default=0.4)
    routing.add_argument("--p-skip", type=float, default=0.1)
    routing.add_argument("--whole-big", type=float, default=0.0, help="share of sequences that take big everywhere")
    routing.add_argument(
        "--big-first",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="train with big everywhere for this share of the tokens, then freeze all but the small FFNs and train "
        "these with random routing; each part has its own warm-up and cosine",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--tokens", type=int, default=10_000_000, help="training tokens in all")
    training.add_argument("--batch", type=int, default=8, help="sequences a step")
    training.add_argument("--length", type=int, default=512, help="tokens a sequence; also the model's context")
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--final-lr", type=float, default=0.02, help="end of the cosine, as a share of --lr")
    training.add_argument("--warmup", type=int, default=200, help="steps")
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--dropout", type=float, default=0.1)
    training.add_argument("--clip", type=float, default=1.0)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=int, default=500, help="steps between validations and checkpoints")
    training.add_argument(
        "--eval-windows", type=int, default=24, help="validation windows while training; at the end all"
    )
    training.add_argument("--stop-at", type=int, help="save a checkpoint at this step and stop")
    args = parser.parse_args()
    if not math.isclose(args.p_big + args.p_small + args.p_skip, 1.0, abs_tol=1e-6):
        parser.error(f"--p-big, --p-small and --p-skip sum to {args.p_big + args.p_small + args.p_skip:g}, not to 1")
    steps, big_steps = step_counts(args)
    if args.big_first and not 0 < big_steps < steps:
        parser.error(f"--big-first {args.big_first:g} of {steps} steps leaves one of the two parts without a step")
    if args.big_first and (args.whole_big or not args.p_small):
        parser.error(
            "--big-first needs --p-small above 0 and no --whole-big: its second part trains the small FFNs alone"
        )
    for path in args.text:
        if not path.is_file():
            parser.error(f"{path}: no such text file")
    if args.resume != (args.out / "checkpoint.pt").exists():
        missing = f"{args.out} holds no checkpoint.pt to resume"
        parser.error(missing if args.resume else f"{args.out} holds a checkpoint.pt: give --resume or another --out")
    return args


def step_counts(args: argparse.Namespace) -> tuple[int, int]:
    """The steps in all, and those of them that ``--big-first`` trains without the small FFNs."""
    steps = math.ceil(args.tokens / (args.batch * args.length))
    return steps, round(steps * args.big_first)


def split(path: Path, held_out: float) -> tuple[str, str]:
    """A file's training text and, from its end, its validation text."""
    text = path.read_text(encoding="utf-8")
    cut = round(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


def tokenizer_for(texts: list[str], out: Path, vocab: int) -> sentencepiece.SentencePieceProcessor:
    """Train OUT/tokenizer.model on the training text unless it is there already."""
    model = out / "tokenizer.model"
    if not model.exists():
        paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
        with model.with_suffix(".tmp").open("wb") as writer:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for paragraph in paragraphs if (line := " ".join(paragraph.split()))),
                model_writer=writer,
                vocab_size=vocab,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=1.0,
                max_sentence_length=1 << 16,
                minloglevel=2,
            )
        model.with_suffix(".tmp").replace(model)
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def windows_of(texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor, length: int) -> Tensor:
    """Validation windows ``[windows, length + 1]``, one after the other through each text."""
    streams = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return torch.cat([stream.unfold(0, length + 1, length) for stream in streams if len(stream) > length])


def draw_routes(shape: tuple[int, ...], p_big: float, p_small: float, generator: torch.Generator) -> Tensor:
    draw = torch.rand(shape, generator=generator)
    return torch.where(draw < p_big, BIG, torch.where(draw < p_big + p_small, SMALL, SKIP))


def cross_entropy(model: DuoModel, windows: Tensor, routes: Tensor) -> Tensor:
    """Mean next-token loss in nats over ``windows [batch, length + 1]``."""
    logits = model(windows[:, :-1], routes)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(
    model: DuoModel, windows: Tensor, args: argparse.Namespace, patterns: dict[str, Tensor | int | None] = UNIFORM
) -> dict[str, float]:
    """Validation loss (nats a token) by pattern: ``[layers]``, one route for all layers, or None for random routing."""
    model.eval()
    layers, losses = model.config.num_hidden_layers, {}
    generator = torch.Generator().manual_seed(args.seed)
    for name, fixed in patterns.items():
        total = 0.0
        for batch in windows.split(8):
            shape = (len(batch), batch.shape[1] - 1, layers)
            random = draw_routes(shape, args.p_big, args.p_small, generator)
            routes = random if fixed is None else torch.as_tensor(fixed).expand(layers)
            total += cross_entropy(model, batch, routes).item() * len(batch)
        losses[name] = total / len(windows)
    model.train()
    return losses


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to ``final_lr`` of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, steps - args.warmup)
    return args.lr * (args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def learns(name: str, step: int, big_steps: int) -> bool:
    """Whether a parameter learns in a step: with ``--big-first`` all but the small FFNs do, then these alone."""
    return big_steps == 0 or (".mlp.small." in name) == (step >= big_steps)


def training_step(
    model: DuoModel, optimizer: torch.optim.Optimizer, stream: Tensor, step: int, args: argparse.Namespace
) -> float:
    """One step of AdamW on windows and routes that depend on the seed and ``step`` alone.

    A parameter that does not learn has no gradient, and what has none AdamW neither moves nor decays.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    torch.manual_seed(args.seed * 1_000_003 + step)  # dropout
    starts = torch.randint(len(stream) - args.length, (args.batch,), generator=generator)
    windows = torch.stack([stream[start : start + args.length + 1] for start in starts])
    p_big, p_small = (1.0, 0.0) if step < step_counts(args)[1] else (args.p_big, args.p_small)
    routes = draw_routes((args.batch, args.length, model.config.num_hidden_layers), p_big, p_small, generator)
    whole_big = torch.rand(args.batch, generator=generator) < args.whole_big
    routes[whole_big] = BIG
    loss = cross_entropy(model, windows, routes)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    return loss.item()


def save(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n")


def build(args: argparse.Namespace, vocab: int) -> tuple[DuoModel, torch.optim.Optimizer]:
    config = {
        "model_type": "duo",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "intermediate_size": args.big,
        "small_intermediate_size": args.small,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": args.length,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "skip_scope": args.skip_scope,
        "default_route": "big",
    }
    write_json(args.out / "config.json", config)
    torch.manual_seed(args.seed)
    model = DuoModel(DuoConfig.from_dict(config), dropout=args.dropout)
    model.initialise()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    train_texts, held_out_texts = zip(*(split(path, args.held_out) for path in args.text), strict=True)
    tokenizer = tokenizer_for(list(train_texts), args.out, args.vocab)
    stream = torch.cat([torch.tensor(tokenizer.encode(text)) for text in train_texts])
    windows = windows_of(list(held_out_texts), tokenizer, args.length)
    held_out_tokens = sum(len(tokenizer.encode(text)) for text in held_out_texts)
    model, optimizer = build(args, tokenizer.vocab_size())
    steps, big_steps = step_counts(args)
    parts, start = [(0, big_steps), (big_steps, steps)], 0  # without --big-first the first part is empty
    if args.resume:
        checkpoint = torch.load(args.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{parameters:,} parameters; {len(stream):,} training tokens, {windows[:, 1:].numel():,} held out")

    stop = min(steps, args.stop_at or steps)
    spread = torch.linspace(0, len(windows) - 1, min(args.eval_windows, len(windows))).long()
    losses: list[float] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with (
        (args.out / "log.csv").open("a" if args.resume else "w", newline="") as file,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        log = csv.DictWriter(file, LOG_COLUMNS)
        if not args.resume:
            log.writeheader()
        task = progress.add_task("", total=steps, completed=start)
        since = time.perf_counter()
        for step in range(start, stop):
            first, end = parts[step >= big_steps]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(learns(name, step, big_steps))
            lr = learning_rate(step - first, end - first, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses.append(training_step(model, optimizer, stream, step, args))
            done = step + 1
            progress.update(task, completed=done, description=f"loss {losses[-1]:.3f}")
            if done % args.eval_every == 0 or done in (big_steps, stop):
                speed = len(losses) * args.batch * args.length / (time.perf_counter() - since)
                held_out = validate(model, windows[spread], args)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                save(args.out / "checkpoint.pt", state)
                row = {"step": str(done), "tokens": str(done * args.batch * args.length), "lr": f"{lr:.3g}"}
                row |= {"train_loss": f"{sum(losses) / len(losses):.4f}"}
                row |= {name: f"{loss:.4f}" for name, loss in held_out.items()} | {"tokens_per_s": f"{speed:.0f}"}
                log.writerow(row)
                file.flush()
                console.print("  ".join(f"{key} {value}" for key, value in row.items()), soft_wrap=True)
                losses, since = [], time.perf_counter()
    if stop < steps:
        console.print(f"stopped at step {stop} of {steps}; continue with --resume")
        return
    final = validate(model, windows, args)
    bytes_per_token = sum(len(text.encode()) for text in held_out_texts) / held_out_tokens
    record = {
        "recipe": vars(args) | {"text": [path.name for path in args.text], "out": None},
        "parameters": parameters,
        "steps": steps,
        "parts": [
            {
                "steps": end - first,
                "learns": [name for name, _ in model.named_parameters() if learns(name, first, big_steps)],
            }
            for first, end in parts
            if end > first
        ],
        "held_out_bytes_per_token": bytes_per_token,
        "validation_nats_per_token": final,
        "validation_bits_per_byte": {name: loss / math.log(2) / bytes_per_token for name, loss in final.items()},
    }
    save(args.out / "pytorch_model.bin", model.state_dict())
    write_json(args.out / "training.json", record)
    for name, loss in record["validation_nats_per_token"].items():
        console.print(
            f"held out, {name}: {loss:.4f} nats a token, {record['validation_bits_per_byte'][name]:.4f} bits a byte"
        )
    console.print(f"wrote {args.out}; next: duo-mlx convert {args.out} MODEL")


if __name__ == "__main__":
    sys.exit(main())
