"""Is it better to train big and small FFNs together, or big first and then small beside the frozen rest?

Duo-LLM (section "Stage 1") finds that big first is clearly worse. This trains small Duo models with train_pytorch.py
in both ways, from the same initial weights and on the same windows, and compares their held-out loss:

- ``random``: the paper's recipe, in each layer every token goes to big or small with probability 0.5;
- ``big_then_small``: as many tokens in all; half of them with big everywhere, then all is frozen but the small FFNs,
  which learn from the other half under the same random routing;
- ``big_then_small`` once more with twice the tokens: a kinder reading, in which the shared weights and big see as many
  tokens as ``random`` has in all, and the small FFNs as many again.

    python examples/compare_stage1.py TEXT... --out runs/stage1

OUT holds a directory for each run, as train_pytorch.py writes it, and runs.json: the losses in nats a token over the
held-out end of every text, for big everywhere, small everywhere, random routes, big in the first half of the layers
(small in the others), and big in every other layer. What is done is kept and what was interrupted goes on, so the same
command finishes the rest.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from train_pytorch import split, validate, windows_of, write_json

from duo_mlx.convert.reference import BIG, SMALL, DuoConfig, DuoModel

OPTIONS = (
    "--vocab 2048 --layers 6 --hidden 96 --heads 4 --kv-heads 2 --big 672 --small 42 --length 256 --batch 4 "
    "--p-big 0.5 --p-small 0.5 --p-skip 0 --warmup 200 --eval-every 250"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs; what is in it is not redone")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="training tokens of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--options", default=OPTIONS, metavar="TEXT", help="train_pytorch.py's other options")
    args = parser.parse_args()
    results = args.out / "runs.json"
    if results.exists() and (found := json.loads(results.read_text())["question"]) != question_of(args):
        parser.error(f"{args.out} holds runs of another question, {json.dumps(found)}; give another --out")
    return args


def question_of(args: argparse.Namespace) -> dict[str, Any]:
    """What runs in one directory must share."""
    return {"texts": [path.name for path in args.text], "tokens": args.tokens, "options": args.options}


def wanted_runs(tokens: int, seeds: int) -> list[dict[str, Any]]:
    """What is trained, the longest run first."""
    runs = [{"method": "big_then_small", "seed": 0, "tokens": 2 * tokens, "big_first": 0.5}]
    for seed in range(seeds):
        runs.append({"method": "random", "seed": seed, "tokens": tokens, "big_first": 0.0})
        runs.append({"method": "big_then_small", "seed": seed, "tokens": tokens, "big_first": 0.5})
    return runs


def folder_of(run: dict[str, Any], out: Path) -> Path:
    return out / f"{run['method']}-{run['tokens']}-seed{run['seed']}"


def train(run: dict[str, Any], args: argparse.Namespace) -> None:
    """Train a run, or the rest of it; train_pytorch.py's lines go to train.txt in its directory."""
    folder = folder_of(run, args.out)
    if (folder / "training.json").exists():
        return
    folder.mkdir(exist_ok=True)
    resume = (folder / "checkpoint.pt").exists()
    flags = [f"--{name.replace('_', '-')}={run[name]}" for name in ("seed", "tokens", "big_first")]
    flags += [*shlex.split(args.options), f"--out={folder}", *(["--resume"] if resume else [])]
    print(f"{folder.name}: {'goes on' if resume else 'starts'}", file=sys.stderr, flush=True)
    with (folder / "train.txt").open("a") as lines:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("train_pytorch.py"), *args.text, *flags],
            stderr=lines,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        sys.exit(f"{folder.name} failed; {folder / 'train.txt'} says why")


def measure(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A trained run with its recipe and its losses under uniform, random and mixed patterns."""
    folder = folder_of(run, args.out)
    record = json.loads((folder / "training.json").read_text())
    config = DuoConfig.from_file(folder / "config.json")
    model = DuoModel(config)
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    recipe = argparse.Namespace(**record["recipe"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    windows = windows_of([split(path, recipe.held_out)[1] for path in args.text], tokenizer, recipe.length)
    layer = torch.arange(config.num_hidden_layers)
    mixed = {
        "first_half": torch.where(layer < config.num_hidden_layers // 2, BIG, SMALL),
        "alternating": torch.where(layer % 2 == 0, BIG, SMALL),
    }
    losses = {name: record["validation_nats_per_token"][name] for name in ("big", "random", "small")}
    return run | {
        "validation_nats_per_token": losses | validate(model, windows, recipe, mixed),
        "validation_tokens": windows[:, 1:].numel(),
        "parameters": record["parameters"],
        "part_steps": [part["steps"] for part in record["parts"]],
        "recipe": record["recipe"],
    }


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    question, results = question_of(args), args.out / "runs.json"
    record: dict[str, Any] = {
        "command": f"python examples/compare_stage1.py {' '.join(question['texts'])} --out {args.out.name} "
        f"--tokens {args.tokens} --seeds {args.seeds} --options {shlex.quote(args.options)}",
        "question": question,
        "versions": {name: version(name) for name in ("duo-mlx", "torch", "sentencepiece")}
        | {"python": platform.python_version()},
        "runs": [],
    }
    if not results.exists():
        write_json(results, record)
    wanted = wanted_runs(args.tokens, args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda run: train(run, args), wanted):
            pass
    record["runs"] = [measure(run, args) for run in wanted]
    write_json(results, record)
    for run in record["runs"]:
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in run["validation_nats_per_token"].items())
        print(f"{folder_of(run, Path()).name}: {losses}")


if __name__ == "__main__":
    main()
