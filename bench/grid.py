"""What ``duo-mlx bench run`` measures: a grid of cells, and the presets.

A cell is one way to generate: an engine, a route, a strategy, a quantisation, and sizes. Cells of equal quantisation
and sizes form a group, which is measured in the same interleaved rounds; the first cell of a group is its baseline.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from duo_mlx.bench.budget import evenly_spaced
from duo_mlx.errors import DuoError
from duo_mlx.model import Config
from duo_mlx.routes import Route, format_pattern, parse_pattern
from duo_mlx.threshold import PREFIX

DUO, PEER = "duo-mlx", "mlx-lm"
UNIFORM = ("big", "small", "skip")
STORED = 0  # bits that mean: as the model is stored
SHARES = (0.25, 0.5, 0.75)  # of big, for a router whose threshold was measured
STEPS = 12  # intervals of the number of big layers in a deep model
PROMPT, LONG, GENERATED = 64, 256, 32  # tokens
CONTEXTS = (256, 1024, 4096)  # tokens before the prompt, as far as the model has room


@dataclass(frozen=True)
class Cell:
    """One cell; ``quantisation`` is a name such as ``float32`` or ``4-bit``.

    ``speculate`` is the route that drafts for ``route`` to verify, and ``draft_tokens`` how many in a round, a number
    or ``auto``; both are "" where nothing speculates.
    """

    engine: str
    route: str
    strategy: str
    quantisation: str
    prompt_tokens: int
    generated_tokens: int
    batch: int
    context: int
    speculate: str = ""
    draft_tokens: str = ""

    @property
    def id(self) -> str:
        """The same cell has the same id in every result."""
        sizes = f"p{self.prompt_tokens} g{self.generated_tokens} b{self.batch} c{self.context}"
        drafts = f" speculate {self.speculate} {self.draft_tokens}" if self.speculate else ""
        return f"{self.engine} {self.route} {self.strategy} {self.quantisation} {sizes}{drafts}"

    @property
    def positions(self) -> int:
        """Positions that the cell's generation needs in the model's context."""
        return self.context + self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True)
class Grid:
    """What is varied. Every combination is a cell, but contexts beyond the first have ``deep_routes`` only.

    Each of ``drafts`` is one more cell of every group of single sequences, by `verifying` and the strategy ``auto``.
    """

    routes: tuple[str, ...]
    strategies: tuple[str, ...] = ("auto",)
    bits: tuple[int, ...] = (STORED,)
    prompts: tuple[int, ...] = (PROMPT,)
    generated: tuple[int, ...] = (GENERATED,)
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (0,)
    deep_routes: tuple[str, ...] = UNIFORM
    drafts: tuple[str, ...] = ()
    draft_tokens: str = "auto"

    def groups(self, stored: str, peer: bool) -> list[list[Cell]]:
        """The cells, group by group.

        Args:
            stored: the name of the quantisation as the model is stored.
            peer: whether mlx-lm's own model is measured in each group.
        """
        found = []
        quantisations = dict.fromkeys(quantisation(bits, stored) for bits in self.bits)
        for sizes in product(quantisations, self.prompts, self.generated, self.batches, self.contexts):
            *_, batch, context = sizes
            routes = self.routes if context == self.contexts[0] else self.deep_routes
            cells = [Cell(DUO, route, strategy, *sizes) for route in routes for strategy in self.strategies]
            if batch == 1 and (route := verifying(routes)):
                plain = Cell(DUO, route, "auto", *sizes)
                cells += [replace(plain, speculate=draft, draft_tokens=self.draft_tokens) for draft in self.drafts]
            found.append(cells + ([Cell(PEER, "big", "auto", *sizes)] if peer else []))
        return found


def verifying(routes: Sequence[str]) -> str | None:
    """The route that verifies drafts: the first that is known before its pass, so none of a router's."""
    return next((route for route in routes if route != "router" and not route.startswith(PREFIX)), None)


def quantisation(bits: int, stored: str) -> str:
    """The name of so many bits; `STORED` is what the model is stored as."""
    return f"{bits}-bit" if bits else stored


def preset(name: str, args: Config, window: int | None = None) -> Grid:
    """``quick``, ``paper`` or ``full`` for a model of this shape, whose attention sees ``window`` positions at most."""
    return {"quick": _quick, "paper": _paper, "full": _full}[name](args, window)


def _quick(args: Config, _: int | None) -> Grid:
    routes = ("big", f"big@{_half(args)}", "small", *(["router"] if args.router_choices else []))
    return Grid(routes)


def _half(args: Config) -> str:
    return ",".join(str(layer) for layer in range(0, args.num_hidden_layers, 2))


def _paper(args: Config, window: int | None) -> Grid:
    """k big layers from all to none, mixes with skip, the model's own budgets, router and draft, depth of context."""
    layers = args.num_hidden_layers
    counts = sorted({round(step * layers / min(layers, STEPS)) for step in range(min(layers, STEPS) + 1)}, reverse=True)
    between = [format_pattern(evenly_spaced(layers, count)) for count in counts[1:-1]]
    turns = ["".join("B-"[layer % 2] for layer in range(layers)), "".join("Bs-"[layer % 3] for layer in range(layers))]
    known = [f"budget:{count}" for count in _quarters(layers) if count >= _cheapest(args)]
    random = ["random:0.5,0.5,0", "random:0.5,0.25,0.25"]
    routes = dict.fromkeys(["big", *between, "small", "skip", *turns, *known, *random, *_by_router(args)])
    drafts = (args.default_draft,) if args.default_draft else ()
    return Grid(tuple(routes), contexts=(0, *_depths(args, window, PROMPT + GENERATED)), drafts=drafts)


def _by_router(args: Config) -> list[str]:
    """The model's own router, as it is and at the shares of big that its threshold can be moved to."""
    if not args.router_choices:
        return []
    reach = [share for share, _ in args.router_offsets]
    return ["router", *(f"{PREFIX}{share:g}" for share in SHARES if reach and reach[0] <= share <= reach[-1])]


def _full(args: Config, window: int | None) -> Grid:
    """The paper's, quantised too, with longer prompts, batches, and ``dense``, which computes what routes leave out."""
    prompts = (PROMPT, LONG) if _room(args, window) >= LONG + GENERATED else (PROMPT,)
    return replace(
        _paper(args, window),
        strategies=("auto", "dense"),
        bits=(STORED, 8, 4),
        prompts=prompts,
        batches=(1, 4),
        contexts=(0, *_depths(args, window, max(prompts) + GENERATED)),
    )


def _quarters(layers: int) -> list[int]:
    return sorted({round(layers * part / 4) for part in (1, 2, 3)}, reverse=True)


def _cheapest(args: Config) -> float:
    """The fewest big layers of a pattern that is known; infinity where none is."""
    known = [args.realised(parse_pattern(each["pattern"], args.num_hidden_layers)) for each in args.best_patterns]
    return min((pattern.tolist().count(Route.BIG) for pattern in known), default=math.inf)


def _depths(args: Config, window: int | None, needed: int) -> list[int]:
    return [context for context in CONTEXTS if context + needed <= _room(args, window)]


def _room(args: Config, window: int | None) -> float:
    """Positions that a cell may need; infinity where nothing limits them."""
    return min(args.max_position_embeddings or math.inf, window or math.inf)


def check_drafts(grid: Grid) -> None:
    """Refuse drafts of which there would be no cell.

    Raises:
        DuoError: in one line.
    """
    why = ""
    if 1 not in grid.batches:
        why = "speculation is measured one sequence at a time; add --batch 1"
    elif not all(map(verifying, (grid.routes, grid.deep_routes))):
        why = "a router cannot verify; add a route that is known before its pass, such as --route big"
    if grid.drafts and why:
        raise DuoError(f"--speculate {grid.drafts[0]}: {why}")


def check(groups: Sequence[Sequence[Cell]], args: Config, window: int | None = None) -> None:
    """Refuse cells that the model has no room for, or that cannot be measured.

    Raises:
        DuoError: in one line.
    """
    limit = args.max_position_embeddings
    for cell in (cell for group in groups for cell in group):
        if limit is not None and cell.positions > limit:
            raise DuoError(
                f"--prompt-tokens {cell.prompt_tokens} with {cell.context} tokens of context before it and "
                f"{cell.generated_tokens} to generate is {cell.positions} positions; the model has {limit}"
            )
        if window and cell.positions > window:
            raise DuoError(
                f"a cell of {cell.positions} positions: this model's attention slides over {window}, and "
                "a cache that has slid cannot be taken back to be measured again; ask for less"
            )
