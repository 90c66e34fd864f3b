"""``duo-mlx bench project``: what routing should bring on Apple chips."""

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np

    from duo_mlx.model import Model
    from duo_mlx.projection import Machine
    from duo_mlx.work import Work

# equal to duo_mlx.work.STRATEGIES, which needs mlx
STRATEGIES = ("planned", "fused", "masked", "sync", "sorted", "dense")
CONTEXT = 512
SHOWN = STRATEGIES[:4]  # where nobody asks for others: sorted and dense are not for decoding a single token
Works = dict[str, dict[str, "Work"]]


@click.command()
@click.option("--model", "path", metavar="DIR|HUB_ID", help="Model in place of the embedded one and the known shapes.")
@click.option("--bits", type=click.Choice(["4", "8", "16", "32"]), help="Of the weights.  [default: as stored]")
@click.option("--chip", "chips", multiple=True, metavar="NAME", help="Such as M4, m4max or 'M4 Max 546'; repeatable.")
@click.option("--route", "route", metavar="SPEC", help="Compare this route with all big, see duo-mlx generate --help.")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(STRATEGIES), help="May be repeated.")
@click.option("--context", type=click.IntRange(min=1), help="Positions attended to.  [default: 512, or all there are]")
@click.option("--speculate", metavar="SPEC", help="Project speculation with drafts by this pattern, and nothing else.")
@click.option("--acceptance", metavar="F,F...|FILE", help="Of a round's 1st, 2nd ... draft; see below.")
@click.option("--draft-vocabulary", "vocabulary", type=click.IntRange(1), metavar="N",
              help="With --speculate: drafts read at most N rows of the head.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    path: str | None,
    bits: str | None,
    chips: tuple[str, ...],
    route: str | None,
    strategies: tuple[str, ...],
    context: int | None,
    speculate: str | None,
    acceptance: str | None,
    vocabulary: int | None,
    as_json: bool,
) -> None:
    """Project what routing should bring on Apple chips, by strategy, size and quantisation.

    No measurement: nothing is run, and no weight is read. For a model: the bytes, kernels and waits of a token and the
    time that these should take, by strategy and mix of routes. For known shapes: from which size on skipping pays.
    Where `duo-mlx bench doctor` has measured this machine, its figures take the place of the reported ones.

    With --speculate: the speed-up of speculation over all big, for the model and for known shapes of 1 B parameters and
    more (4 bits where nothing else is asked for), the pattern stretched to their layers. --acceptance gives the shares
    of drafted tokens that are accepted where all before them were (the last holds on), or the file that
    `python -m duo_mlx.bench.speculated` wrote.

    \b
    Examples:
      duo-mlx bench project
      duo-mlx bench project --model models/duo --bits 4 --chip "M4 Max"
      duo-mlx bench project --route BBBBBBssssss --strategy planned --json
      duo-mlx bench project --speculate small --acceptance 0.7,0.6 --chip "M3 Max"
    """
    if (speculate is None) != (acceptance is None):
        raise click.UsageError("--speculate and --acceptance go together: give the draft's pattern and its acceptance")
    if speculate is not None and (route is not None or strategies):
        raise click.UsageError("--speculate is projected against all big; leave out --route and --strategy")
    if speculate is None and vocabulary:
        raise click.UsageError("--draft-vocabulary goes with --speculate")

    from duo_mlx.projection import ASSUMPTIONS, MIXES, SHAPES, machines
    from duo_mlx.work import imagined, usable, works

    on = machines(chips)
    model, name = _model(path, bits)
    context = _context(model, context)
    if speculate is not None and acceptance is not None:
        _print(_of_speculation(model, name, int(bits or 4), speculate, acceptance, vocabulary, context, on), as_json)
        return
    mixes = MIXES if route is None else {"big": MIXES["big"], route: _mix(model, route)}
    found = works(model, mixes, context, strategies or [each for each in SHOWN if each in usable(model)])
    result: dict[str, Any] = {
        "projection": ASSUMPTIONS,
        "model": {"name": name, "context": context} | _of_model(model, found, on),
    }
    if path is None:
        formats = [int(bits)] if bits else [4, 16]
        made = [(shape, each, imagined(args, each)) for shape, args in SHAPES.items() for each in formats]
        result["shapes"] = [_of_shape(*each, context, on) for each in made]
    _print(result, as_json)


def _print(result: dict[str, Any], as_json: bool) -> None:
    import json

    from duo_mlx.cli.projection_tables import lines

    click.echo(json.dumps(result) if as_json else "\n".join(lines(result)))


def _model(path: str | None, bits: str | None) -> "tuple[Model, str]":
    """The model, of which no weight is read, and what to call it."""
    from duo_mlx.checkpoint import read_config, read_model, resolve
    from duo_mlx.config import Config
    from duo_mlx.work import imagined, without_weights

    directory = resolve(path)
    name = path or "the embedded model"
    if bits is None:
        return without_weights(read_model(directory)), f"{name}, weights as stored"
    return imagined(Config.from_dict(read_config(directory)), int(bits)), f"{name}, {bits} bits"


def _context(model: "Model", asked: int | None) -> int:
    limit = model.config.max_position_embeddings or CONTEXT
    if asked is None:
        return min(CONTEXT, limit)
    if model.config.max_position_embeddings and asked > limit:
        raise click.UsageError(f"--context {asked}: the model's context is {limit}")
    return asked


def _mix(model: "Model", spec: str) -> "np.ndarray":
    """The shares of skip, small and big ``[layers, 3]`` that a route SPEC comes to."""
    import numpy as np

    from duo_mlx.budget import PREFIX, best_pattern
    from duo_mlx.policies import FixedPolicy, RandomPolicy, ReplayPolicy, parse_route
    from duo_mlx.work import shares

    layers = model.config.num_hidden_layers
    if spec == "router":
        raise click.UsageError("--route router: its mix is not known before it has run; give random:BIG,SMALL,SKIP")
    policy = FixedPolicy(best_pattern(model, spec)) if spec.startswith(PREFIX) else parse_route(spec, layers)
    if isinstance(policy, RandomPolicy):
        return np.tile((policy.skip, policy.small, policy.big), (layers, 1))
    assert isinstance(policy, FixedPolicy | ReplayPolicy)
    return shares(policy.pattern) if isinstance(policy, FixedPolicy) else shares(policy.recorded).mean(axis=0)


def _of_model(model: "Model", works: Works, machines: "list[Machine]") -> dict[str, Any]:
    from duo_mlx.projection import project, smallest_module

    def on(machine: "Machine", work: "Work", big: "Work") -> dict[str, float]:
        times = project(work, machine)
        return times._asdict() | {"speed_up": project(big, machine).typical / times.typical}

    return {
        "big_bytes_a_layer": _big_bytes(model),
        "smallest_module_bytes": {machine.name: smallest_module(machine.typical) for machine in machines},
        "rows": [
            {"strategy": strategy, "routes": mix}
            | work._asdict()
            | {"seconds": {machine.name: on(machine, work, each["big"]) for machine in machines}}
            for strategy, each in works.items()
            for mix, work in each.items()
        ],
    }


def _of_speculation(
    model: "Model", name: str, bits: int, spec: str, acceptance: str, vocabulary: int | None, context: int,
    machines: "list[Machine]",
) -> dict[str, Any]:  # fmt: skip
    from duo_mlx.bench import projected_speculation
    from duo_mlx.generation import pattern_of
    from duo_mlx.projection import ASSUMPTIONS, SHAPES
    from duo_mlx.routes import format_pattern
    from duo_mlx.work import imagined

    pattern = pattern_of(model, "--speculate", spec, drafts=True)
    shares = projected_speculation.read_acceptance(acceptance, spec)
    shapes = {f"{each}, {bits} bits": imagined(SHAPES[each], bits) for each in projected_speculation.large_shapes()}
    if vocabulary:
        for each in (model, *shapes.values()):
            each.draft_from(min(vocabulary, each.config.vocab_size))
    return {
        "projection": (*ASSUMPTIONS, *projected_speculation.ASSUMPTIONS),
        "speculation": {
            "pattern": format_pattern(pattern),
            "acceptance": shares,
            "draft_vocabulary": vocabulary,
            "context": context,
            "goal": {"speed_up": projected_speculation.GOAL, "parameters": projected_speculation.LARGE},
            "rows": projected_speculation.project({name: model} | shapes, pattern, shares, context, machines),
        },
    }


def _of_shape(name: str, bits: int, model: "Model", context: int, machines: "list[Machine]") -> dict[str, Any]:
    from dataclasses import asdict

    from duo_mlx.projection import COMPUTE_FLOPS_S, MIXES, READ_BACK_S, outlook, padded_limit, project
    from duo_mlx.work import usable, works

    found = works(model, MIXES, context, usable(model))
    big = _big_bytes(model)
    return {
        "name": name,
        "bits": bits,
        "big_bytes_a_layer": big,
        "dense_beats_sorted_below_tokens": [
            padded_limit(model.config, wait, flops)
            for wait, flops in zip((READ_BACK_S[1], READ_BACK_S[2]), COMPUTE_FLOPS_S, strict=True)
        ],
        "on": {
            machine.name: {"big_seconds": project(found["planned"]["big"], machine)._asdict()}
            | {
                mix: asdict(outlook(found, big * len(model.layers), machine.typical, mix))
                for mix in ("half small", "small")
            }
            for machine in machines
        },
    }


def _big_bytes(model: "Model") -> float:
    """Bytes of a layer's big FFN, as a mean over the layers."""
    from duo_mlx.ffn import nbytes

    return sum(nbytes(ffn.big) for ffn in model.ffns) / len(model.layers)
