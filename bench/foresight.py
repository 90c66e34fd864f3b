"""How much of what routes are worth can be foreseen from what a router sees.

    OPENBLAS_NUM_THREADS=1 python -m duo_mlx.bench.foresight novels/*.txt --out foresight.json

Each text is read twice, with big or small drawn for every token and layer. The difference of a token's two losses is
what routes are worth to it, and predictors are fitted to it on training text: a worth for each layer (*constants*, all
that a fixed pattern can use), one *linear* map a layer as a router has, an *mlp* a layer, and a *joint* mlp that sees
all inputs at once, more than any router does. How good they are is told on held-out text:

- *explained*, the share of the squares of differences that a predictor explains;
- *worth*, what its choices add: half of all layers' tokens take big, those that it predicts most of. As routes are
  drawn independently, 2 (r - r') (loss' - loss) is an unbiased estimate of a layer's gain by big, where r and r' are 1
  for big and 0 for small; the worth is the sum of these gains over the layers that get big, less half of all, in nats a
  token. It adds up gains as if layers did not interact, beside layers that are drawn at random.

Losses are those of the true next token (*text*) or means over the next tokens as all big expects them (*big*), which
leaves out the luck of which one came. Predictors are fitted to either, and scored on both.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import duo_mlx  # (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from numpy.typing import NDArray

from duo_mlx import checkpoint
from duo_mlx.bench import options
from duo_mlx.bench.record import check_output, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.intervals import of_means
from duo_mlx.model import Model
from duo_mlx.router import Follow
from duo_mlx.routes import Route
from duo_mlx.training import data
from duo_mlx.training.gains import TARGETS

ROWS = 8  # windows that are passed at once
INNER, EPOCHS, RATE = 64, 6, 1e-3  # of the networks
RIDGE = 0.05  # of the linear map, by the rows that it is fitted to
PREDICTORS = ("constants", "linear", "mlp", "joint")

Floats = NDArray[np.floating]
Predictor = Callable[[Floats], Floats]  # from inputs [rows, layers, hidden] to gains [rows, layers]


class Pairs:
    """Pairs of passes over windows, a row for each token; those of a window follow each other.

    ``contrast [rows, layers]`` is 1 where the first pass alone took big and -1 where the other did, ``inputs [rows,
    layers, hidden]`` the mean of what routers would have seen, and ``worth [rows]``, by target, the second loss less
    the first.
    """

    def __init__(self, model: Model, windows: NDArray[np.int32], seed: int, progress: Callable[[str], object]):
        random, layers = np.random.default_rng(seed), model.config.num_hidden_layers
        parts: dict[str, list[Floats]] = {name: [] for name in ("contrast", "inputs", *TARGETS)}
        for start in range(0, len(windows), ROWS):
            these = windows[start : start + ROWS]
            routes = random.integers(Route.SMALL, Route.BIG + 1, (2, *these[:, 1:].shape, layers)).astype(np.uint8)
            uniform = model(mx.array(these[:, :-1]), routes=[Route.BIG] * layers)
            big = np.array(mx.softmax(uniform.astype(mx.float32), axis=-1))
            (one, inputs), (other, again) = (_pass(model, these, each, big) for each in routes)
            parts["contrast"].append((routes[0].astype(np.float32) - routes[1]).reshape(-1, layers))
            parts["inputs"].append(((inputs + again) / 2).astype(np.float16))
            for target in TARGETS:
                parts[target].append((other[target] - one[target]).ravel())
            progress(f"{start + len(these)} of {len(windows)} windows")
        joined = {name: np.concatenate(each) for name, each in parts.items()}
        self.length = windows.shape[1] - 1
        self.contrast, self.inputs = joined.pop("contrast"), joined.pop("inputs")
        self.worth = joined


def _pass(
    model: Model, windows: NDArray[np.int32], routes: NDArray[np.uint8], big: Floats
) -> tuple[dict[str, Floats], Floats]:
    """Losses by target ``[windows, length]``, and what routers would have seen ``[tokens, layers, hidden]``."""
    tokens, follow = mx.array(windows[:, :-1]), Follow(routes)
    found = np.array(model(tokens, routes=follow, strategy="sorted").astype(mx.float32))
    found -= found.max(axis=-1, keepdims=True)
    found -= np.log(np.exp(found).sum(axis=-1, keepdims=True))
    true = np.take_along_axis(found, windows[:, 1:, None].astype(np.int64), axis=-1)[..., 0]
    seen = np.stack([np.array(each.astype(mx.float32)) for each in follow.inputs], axis=2)
    return {"text": -true, "big": -(big * found).sum(axis=-1)}, seen.reshape(-1, *seen.shape[2:])


def constants(pairs: Pairs, target: str) -> Predictor:
    """A gain for each layer, by least squares."""
    found = np.linalg.lstsq(pairs.contrast, pairs.worth[target], rcond=None)[0]
    return lambda inputs: np.broadcast_to(found, inputs.shape[:2])


def linear(pairs: Pairs, target: str) -> Predictor:
    """A linear map and a constant for each layer, fitted together by ridge regression."""
    rows, layers, hidden = pairs.inputs.shape
    products, wanted = np.zeros((layers * (hidden + 1),) * 2), np.zeros(layers * (hidden + 1))
    for start in range(0, rows, 4096):
        part = slice(start, start + 4096)
        each = (pairs.contrast[part, :, None] * _with_one(pairs.inputs[part])).reshape(-1, len(wanted))
        products += each.T @ each
        wanted += each.T @ pairs.worth[target][part]
    penalty = np.tile(np.r_[np.full(hidden, RIDGE * rows), 0.0], layers)
    solved = np.linalg.solve(products + np.diag(penalty), wanted).reshape(layers, -1)
    return lambda inputs: np.einsum("rlh,lh->rl", _with_one(inputs), solved)


def _with_one(inputs: Floats) -> Floats:
    return np.concatenate([inputs.astype(np.float32), np.ones((*inputs.shape[:2], 1), np.float32)], axis=-1)


class Layerwise(nn.Module):
    """A network of one inner layer for each layer of the model."""

    def __init__(self, layers: int, hidden: int):
        super().__init__()
        self.first = mx.random.normal((layers, hidden, INNER)) * hidden**-0.5
        self.bias = mx.zeros((layers, 1, INNER))
        self.second = mx.zeros((layers, INNER, 1))
        self.constant = mx.zeros(layers)

    def __call__(self, x: mx.array) -> mx.array:
        inner = nn.silu(x.swapaxes(0, 1) @ self.first + self.bias)
        return (inner @ self.second)[..., 0].T + self.constant


class Joint(nn.Module):
    """A network that sees all layers' inputs and gives all gains."""

    def __init__(self, layers: int, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(layers * hidden, 4 * INNER), nn.Linear(4 * INNER, layers)
        self.second.weight = mx.zeros_like(self.second.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(nn.silu(self.first(x.reshape(len(x), -1))))


def network(kind: type[Layerwise] | type[Joint], pairs: Pairs, target: str, seed: int) -> Predictor:
    """One of the two, by Adam with weight decay; of its epochs the best on a tenth of the rows that is kept back."""
    mx.random.seed(seed)
    rows, layers, hidden = pairs.inputs.shape
    net, random, kept = kind(layers, hidden), np.random.default_rng(seed), rows * 9 // 10
    steps = EPOCHS * (kept // 512)
    optimizer = optim.AdamW(optim.cosine_decay(RATE, max(1, steps)), weight_decay=0.1)

    def squared(part: NDArray[np.int64]) -> mx.array:
        gains = net(mx.array(pairs.inputs[part].astype(np.float32)))
        return mx.square((gains * mx.array(pairs.contrast[part])).sum(-1) - mx.array(pairs.worth[target][part])).mean()

    step = nn.value_and_grad(net, squared)
    best: tuple[float, Any] = (np.inf, net.parameters())
    for _ in range(EPOCHS):
        order = random.permutation(kept)
        for start in range(0, kept - kept % 512, 512):
            _, gradients = step(order[start : start + 512])
            optimizer.update(net, gradients)
            mx.eval(net.parameters(), optimizer.state)
        missed = np.mean([squared(np.arange(at, min(at + 2048, rows))).item() for at in range(kept, rows, 2048)])
        if missed < best[0]:
            best = float(missed), {name: each for name, each in net.parameters().items()}  # noqa: C416
    net.update(best[1])
    return lambda inputs: np.concatenate(
        [np.array(net(mx.array(inputs[at : at + 2048].astype(np.float32)))) for at in range(0, len(inputs), 2048)]
    )


def fit(name: str, pairs: Pairs, target: str, seed: int) -> Predictor:
    """A predictor of `PREDICTORS`."""
    if name in ("constants", "linear"):
        return (constants if name == "constants" else linear)(pairs, target)
    return network(Layerwise if name == "mlp" else Joint, pairs, target, seed)


def score(predictor: Predictor, threshold: float, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """Explained and worth on held-out pairs by target, with intervals over windows."""
    gains = predictor(pairs.inputs)
    told, big = (pairs.contrast * gains).sum(axis=-1), gains > threshold
    found = {}
    for target, worth in pairs.worth.items():
        gain = 2 * pairs.contrast * worth[:, None]
        columns = np.stack([np.square(worth - told), np.square(worth), ((big - 0.5) * gain).sum(axis=-1)], axis=-1)
        windows = columns.reshape(-1, pairs.length, columns.shape[-1]).mean(axis=1)
        found[target] = {
            "explained": of_means(windows, lambda means: 1 - means[..., 0] / means[..., 1]).record(),
            "worth": of_means(windows, lambda means: means[..., 2]).record(),
        }
    return found


def study(train: Pairs, held_out: Pairs, seed: int, say: Callable[[str], object]) -> dict[str, Any]:
    """All predictors, fitted to either target, with the share of big that each takes of held-out text."""
    found: dict[str, Any] = {}
    for target in TARGETS:
        for name in PREDICTORS:
            predictor = fit(name, train, target, seed)
            threshold = float(np.median(predictor(train.inputs)))
            scored = score(predictor, threshold, held_out)
            share = float((predictor(held_out.inputs) > threshold).mean())
            found[f"{name}, fitted to {target}"] = {"share": share, "scored": scored}
            say(f"{name}, fitted to {target}: done")
    variance = {target: float(np.square(held_out.worth[target]).mean()) for target in TARGETS}
    return {"predictors": found, "squares": variance, "rows": [len(train.contrast), len(held_out.contrast)]}


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = []
    for name, of in result["predictors"].items():
        cells = []
        for target, figures in of["scored"].items():
            explained, worth = figures["explained"], figures["worth"]
            cells.append(
                f"{target}: explained {explained['median']:.4f} [{explained['low']:.4f}, {explained['high']:.4f}], "
                f"worth {worth['median']:.4f} [{worth['low']:.4f}, {worth['high']:.4f}]"
            )
        lines.append(f"{name} (share {of['share']:.2f}): {'; '.join(cells)}")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("files", metavar="TEXT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", "path", metavar="DIR", help="A Duo model.  [default: the embedded model]")
@click.option("--windows", type=click.IntRange(2), default=240, help="Of training text.")
@click.option("--held-out-windows", type=click.IntRange(2), default=96, help="Of the end of every text.")
@click.option("--length", type=click.IntRange(2), default=256, help="Tokens of a window.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of windows, routes and networks.")
@options.out
@options.force
def command(
    files: tuple[Path, ...],
    path: str | None,
    windows: int,
    held_out_windows: int,
    length: int,
    seed: int,
    out: Path | None,
    force: bool,
) -> None:
    """Fit predictors of what big is worth to a token in a layer, and score them on held-out text."""
    if out:
        check_output(out, force)
    model, tokenizer = duo_mlx.load(path)
    question = data.Question(files)
    question.check()
    vocabulary = model.config.vocab_size

    def say(what: str) -> None:
        click.echo(what, err=True)

    with tempfile.TemporaryDirectory() as folder:
        data.tokenise(question, Path(folder), tokenizer, vocabulary, {}, lambda *_: None)
        read = data.open_data(question, Path(folder), vocabulary, lambda *_: None)
        read.check(length)
        begins = np.random.default_rng(seed).integers(len(read.train) - length, size=windows)
        learnt = np.stack([read.window(begin, length) for begin in begins]).astype(np.int32)
        starts = read.starts(length)
        spread = data.spread(starts, held_out_windows)
        scored = np.stack([read.held_out[begin : begin + length + 1] for begin in spread]).astype(np.int32)
    before = system_record()
    train = Pairs(model, learnt, seed, lambda done: say(f"training: {done}"))
    held_out = Pairs(model, scored, seed + 1, lambda done: say(f"held out: {done}"))
    result = study(train, held_out, seed, say)
    click.echo(table(result))
    if out:
        names = " ".join(file.name for file in files)
        more = f" --model {Path(path).name}" if path else ""
        record = {
            "command": f"python -m duo_mlx.bench.foresight {names}{more} --windows {windows} "
            f"--held-out-windows {held_out_windows} --length {length} --seed {seed}",
            "model": checkpoint.fingerprint(checkpoint.resolve(path)),
            "system": before,
            "summary": result,
        }
        write_output(out, record)


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "foresight")


if __name__ == "__main__":
    main()
