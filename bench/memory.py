"""What a model takes in memory: its peak beside weights and cache, and the weights that a pattern never reads.

    python -m duo_mlx.bench.memory --out memory.json

Each case is a process of its own that loads a model directory, lazily or at once, prefills a prompt and generates by a
fixed pattern. A weight that nobody used is still the unevaluated read of a file, which its graph shows; so what was
read is counted, not guessed. Beside MLX's own peak, loading included, stands the process's resident memory, and what of
it was there before the model: Python and libraries. The weights' bytes are those in memory: float32 on a CPU, whatever
the file holds.

Without --model a directory with random weights of SmolLM2-135M's shape is written first and removed afterwards.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from duo_mlx import checkpoint
from duo_mlx.bench import options
from duo_mlx.bench.peer import open_model
from duo_mlx.bench.prefill import SHAPE
from duo_mlx.bench.record import check_output, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.errors import DuoError
from duo_mlx.hosting import primitives
from duo_mlx.policies import parse_route
from duo_mlx.routed import RoutedModel

LIMIT = 1.10  # what the peak may take of weights and cache
CASES = {  # by name: route SPEC, and whether weights are read when they are used
    "all-small, lazy": ("small", True),
    "all-skip, lazy": ("skip", True),
    "all-big, lazy": ("big", True),
    "all-small, eager": ("small", False),
}
STATUS = Path("/proc/self/status")


def resident(what: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now or ``VmHWM`` at most; where Linux does not tell, at most."""
    if STATUS.is_file():  # the resource module counts the process that a new one was forked from, too
        found = re.search(rf"^{what}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        assert found, "Linux says how much is resident"
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(directory: Path, route: str, lazy: bool, prompt: int, tokens: int) -> dict[str, Any]:
    """Load, prefill and generate in this process; bytes of everything, and how many arrays of FFNs were read."""
    libraries = resident("VmRSS")
    model, _ = checkpoint.load(directory, lazy=lazy)
    loaded = {"resident": resident("VmRSS"), "active": mx.get_active_memory()}
    layers, vocabulary = model.config.num_hidden_layers, model.config.vocab_size
    cache = model.make_cache()
    ids = mx.array(np.random.default_rng(0).integers(0, vocabulary, prompt))
    for _ in generate_step(ids, RoutedModel(model, parse_route(route, layers)), max_tokens=tokens, prompt_cache=cache):
        pass
    mx.synchronize()
    weights = checkpoint.parameters(model)
    read = {name: array for name, array in weights.items() if not primitives(array)}
    used = sum(array.nbytes for array in read.values())
    held = sum(array.nbytes for layer in cache for array in (layer.keys, layer.values))
    return {
        "weights_bytes": sum(array.nbytes for array in weights.values()),
        "weights_read_bytes": used,
        "cache_bytes": held,
        "arrays_read": {module: sum(f".mlp.{module}." in name for name in read) for module in ("big", "small")},
        "active_bytes": {"loaded": loaded["active"], "generated": mx.get_active_memory()},
        "peak_bytes": mx.get_peak_memory(),
        "peak_over_weights_read_and_cache": mx.get_peak_memory() / (used + held),
        "resident_bytes": {
            "libraries": libraries,
            "loaded": loaded["resident"],
            "generated": resident("VmRSS"),
            "peak": resident("VmHWM"),
        },
        "limit": LIMIT,
    }


def in_process(directory: Path, route: str, lazy: bool, prompt: int, tokens: int) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        DuoError: it failed.
    """
    code = (
        "import json, sys; from duo_mlx.bench import memory; print(json.dumps(memory.child(json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps([str(directory), route, lazy, prompt, tokens])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DuoError(f"{directory}: a process that should generate failed: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(arguments: list[Any]) -> dict[str, Any]:
    """`measure` by arguments that came as JSON."""
    directory, *others = arguments
    return measure(Path(directory), *others)


def write_model(directory: Path, layers: int, dtype: str, seed: int) -> None:
    """A model directory with random weights and the embedded model's tokenizer, which nothing here asks."""
    model = open_model(None, layers, seed)
    config = SHAPE | {"num_hidden_layers": layers, "router_choices": model.config.router_choices}
    weights = {name: array.astype(getattr(mx, dtype)) for name, array in checkpoint.parameters(model).items()}
    checkpoint.save(directory, config, weights)
    for file in checkpoint.EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, directory)


def table(result: dict[str, Any]) -> str:
    """The cases for a reader, in MB."""
    lines = [
        f"{'MB':<17} {'weights':>8} {'read':>8} {'cache':>7} {'peak':>8} {'peak / (read + cache)':>22} "
        f"{'resident':>9} {'of it before':>13}  arrays of big and small read"
    ]
    for name, of in result.items():
        weights, read, cache, peak = (
            of[key] / 1e6 for key in ("weights_bytes", "weights_read_bytes", "cache_bytes", "peak_bytes")
        )
        over, arrays = of["peak_over_weights_read_and_cache"], of["arrays_read"]
        most, before = (of["resident_bytes"][key] / 1e6 for key in ("peak", "libraries"))
        lines.append(
            f"{name:<17} {weights:>8.1f} {read:>8.1f} {cache:>7.1f} {peak:>8.1f} {over:>13.3f} (<= {LIMIT:.2f}) "
            f"{most:>9.1f} {before:>13.1f}  {arrays['big']}, {arrays['small']}"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", "given", type=click.Path(path_type=Path), help="A model directory in place of random weights.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Of random weights' files."
)
@click.option("--prompt", type=click.IntRange(1), default=128, help="Tokens of the prompt.")
@click.option("--tokens", type=click.IntRange(1), default=32, help="Tokens generated.")
@options.layers
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json file.")
@options.force
def command(
    given: Path | None, dtype: str, prompt: int, tokens: int, layers: int, seed: int, out: Path | None, force: bool
) -> None:
    """Measure the memory that loading and generating take, each case in a process of its own."""
    if out:
        check_output(out, force)
        if out.suffix != ".json":
            raise DuoError(f"--out {out}: the name must end in .json; there are no runs to list")
    result = {}
    with ExitStack() as stack:
        directory = given or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if given is None:
            write_model(directory, layers, dtype, seed)
        for name, (route, lazy) in CASES.items():
            click.echo(name, err=True)
            result[name] = in_process(directory, route, lazy, prompt, tokens)
    click.echo(table(result))
    if out:
        of = f"--model {given.name}" if given else f"--layers {layers} --dtype {dtype}"
        arguments = f"--prompt {prompt} --tokens {tokens} --seed {seed}"
        record = {
            "command": f"python -m duo_mlx.bench.memory {of} {arguments}",
            "system": system_record(),
            "cases": result,
        }
        write_output(out, record)


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "memory")


if __name__ == "__main__":
    main()
