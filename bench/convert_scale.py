"""Converting a large checkpoint: its time beside copying's, and its peak memory beside the largest shard.

    python -m duo_mlx.bench.convert_scale --gigabytes 3 --shard-gigabytes 0.5 --out convert_scale.json

Makes a sharded Duo checkpoint with random weights and, interleaved, copies its directory and converts it with
``duo-mlx convert`` in a process of its own; both wait until the disk has everything. The peak is that process' largest
resident set, all of Python and MLX included. The source lies in the page cache for both.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models

from duo_mlx import shards
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.system import system_record
from duo_mlx.errors import DuoError
from duo_mlx.model import Config, Model

WIDTHS = (2048, 1024, 512, 256)  # of the model; the widest that gives LAYERS is taken
LAYERS = 8
TIME_LIMIT = 2.0  # what converting may take of copying's time
MEMORY_LIMIT = 10**9  # bytes that it may take beside the largest shard

# The kernel counts the memory of the process that a new one was forked from as the new one's; this one has little.
RUNNER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def shape(size: int) -> dict[str, Any]:
    """config.json of a Duo whose weights have about ``size`` bytes at two each."""
    for width in WIDTHS:
        config = {
            "model_type": "duo",
            "hidden_size": width,
            "num_hidden_layers": 1,
            "intermediate_size": width * 11 // 4,
            "small_intermediate_size": width * 11 // 64,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 256,
            "rms_norm_eps": 1e-5,
            "vocab_size": 8 * width,
            "tie_word_embeddings": True,
        }
        parameters = {name: int(np.prod(shape)) for name, shape in _shapes(config).items()}
        layer = sum(number for name, number in parameters.items() if ".layers." in name)
        layers = round((size / 2 - sum(parameters.values()) + layer) / layer)
        if layers >= LAYERS or width == WIDTHS[-1]:
            return config | {"num_hidden_layers": max(layers, 1)}
    raise AssertionError("there is a last width")


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    parameters: Any = tree_flatten(Model(Config.from_dict(config)).parameters())  # of which none is computed
    return {name: array.shape for name, array in parameters}


def make(directory: Path, config: dict[str, Any], dtype: str, shard: int, seed: int) -> int:
    """Write a checkpoint as a PyTorch user has it, in shards of at most ``shard`` bytes; the size of the largest."""
    random = np.random.default_rng(seed)

    def noise(shape: tuple[int, ...]) -> Callable[[], mx.array]:
        def load() -> mx.array:  # all bits but one are random; without that one no number is 2 or more, or none at all
            bits = np.frombuffer(random.bytes(2 * int(np.prod(shape))), np.uint16) & 0xBFFF
            return mx.array(bits.reshape(shape)).view(getattr(mx, dtype))

        return load

    tensors = {name: shards.Held(shape, dtype, noise(shape)) for name, shape in _shapes(config).items()}
    shards.write(directory, tensors, limit=shard, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    return max(file.stat().st_size for file in directory.glob("*.safetensors"))


def copy(source: Path, destination: Path) -> None:
    """Copy a directory and wait until the disk has it."""
    shutil.copytree(source, destination)
    for file in destination.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def convert(source: Path, destination: Path) -> int:
    """Convert in a process of its own; the bytes of its largest resident set.

    Raises:
        DuoError: it failed.
    """
    command = [sys.executable, "-m", "duo_mlx", "convert", str(source), str(destination)]
    done = subprocess.run([sys.executable, "-c", RUNNER, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DuoError(f"duo-mlx convert failed: {' '.join(done.stderr.split())[-300:]}")
    return int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def measure(
    work: Path, config: dict[str, Any], dtype: str, shard: int, rounds: int, seed: int
) -> tuple[Timings, dict[str, Any]]:
    """Time copying and converting in the empty directory ``work``, and sum up."""
    source = work / "source"
    source.mkdir()
    largest = make(source, config, dtype, shard, seed)
    peaks: list[int] = []
    outputs = (work / f"output-{number}" for number in count())

    def clear() -> None:
        for output in work.glob("output-*"):
            shutil.rmtree(output)

    def done(number: int) -> None:
        clear()
        click.echo(f"round {number} of {rounds}", err=True)

    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(source, next(outputs)),
        "convert": lambda: peaks.append(convert(source, next(outputs))),
    }
    for call in calls.values():  # to warm up; here and not in interleave, so that the disk need not hold these, too
        call()
        clear()
    timings = interleave(calls, rounds, warm_up=0, after_round=done)
    ratios = timings.ratios("convert", {"copy": 1})
    return timings, {
        "weights_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "largest_shard_bytes": largest,
        "median_s": {name: timings.median(name) for name in timings.runs},
        "fastest_s": {name: timings.best(name) for name in timings.runs},
        "convert_over_copy": {
            "median_of_rounds": statistics.median(ratios),
            "of_fastest_runs": timings.best("convert") / timings.best("copy"),
            "rounds": ratios,
            "limit": TIME_LIMIT,
        },
        "peak_bytes": {"largest": max(peaks), "runs": peaks, "limit": largest + MEMORY_LIMIT},
    }


def table(result: dict[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':<10} {'median s':>10} {'fastest s':>11}"]
    for name, median in result["median_s"].items():
        lines.append(f"{name:<10} {median:>10.2f} {result['fastest_s'][name]:>11.2f}")
    over, peak = result["convert_over_copy"], result["peak_bytes"]
    lines.append(
        f"convert / copy ({result['weights_bytes'] / 1e9:.2f} GB): median of {len(over['rounds'])} paired rounds "
        f"{over['median_of_rounds']:.2f}, of fastest runs {over['of_fastest_runs']:.2f} (limit {over['limit']:.2f})"
    )
    lines.append(
        f"peak memory {peak['largest'] / 1e9:.2f} GB, largest shard {result['largest_shard_bytes'] / 1e9:.2f} GB "
        f"(limit {peak['limit'] / 1e9:.2f} GB)"
    )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--gigabytes", type=click.FloatRange(0, min_open=True), default=3.0, help="Of weights.")
@click.option("--shard-gigabytes", type=click.FloatRange(0, min_open=True), default=0.5, help="Of a shard, at most.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", help="Of the weights.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Interleaved rounds, each there and back.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the weights.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where to work, on the disk to measure.  [default: the system's temporary one]",
    show_default=False,
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json or .csv file.")
@click.option("--force", is_flag=True, help="Replace an existing --out.")
def command(
    gigabytes: float,
    shard_gigabytes: float,
    dtype: str,
    rounds: int,
    seed: int,
    directory: Path | None,
    out: Path | None,
    force: bool,
) -> None:
    """Time `duo-mlx convert` on a large checkpoint against copying it, and find its peak memory."""
    if out:
        check_output(out, force)
    config = shape(round(gigabytes * 1e9))
    before = system_record()
    with tempfile.TemporaryDirectory(dir=directory) as name:
        needed, free = 5.1e9 * gigabytes, shutil.disk_usage(name).free  # the source and a round's four outputs
        if free < needed:
            raise DuoError(f"--directory: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        timings, result = measure(Path(name), config, dtype, round(shard_gigabytes * 1e9), rounds, seed)
    click.echo(table(result))
    if out:
        options = f"--gigabytes {gigabytes:g} --shard-gigabytes {shard_gigabytes:g} --dtype {dtype}"
        write_runs(
            out,
            f"python -m duo_mlx.bench.convert_scale {options} --rounds {rounds} --seed {seed}",
            before,
            timings.runs,
            column="what",
            shape=config,
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "convert_scale")


if __name__ == "__main__":
    main()
