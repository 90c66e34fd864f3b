"""From a checkpoint to a model directory, whole or not at all: a Duo as it is, or a dense model grafted."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.convert import calibration, dense, guard, packing, plan
from duo_mlx.convert.calibration import Calibration, Text
from duo_mlx.convert.sorting import sort_neurons
from duo_mlx.convert.source import Source, open_source
from duo_mlx.convert.tensors import Tensors, dtype_name
from duo_mlx.convert.tokenizer import write_tokenizer
from duo_mlx.convert.writer import write_more, write_weights
from duo_mlx.errors import DuoError
from duo_mlx.files import output_directory, refuse_existing, refuse_overlap, writing

if TYPE_CHECKING:
    from duo_mlx.convert.graft import Graft
    from duo_mlx.convert.parity import Parity


FLOAT = 16  # bits that mean: leave it in floating point


class DisagreementError(Exception):
    """``--verify`` found a difference beyond the tolerance; nothing was written."""


@dataclass(frozen=True)
class Bits:
    """How to quantise; see `duo_mlx.convert.quantise.quantise`."""

    bits: int | None = None
    small_bits: int | None = None
    group_size: int = 64


@dataclass(frozen=True)
class Watch:
    """Who is told what happens."""

    progress: Callable[[str, float, float], object] = lambda *_: None  # stage, what is done and what is to be
    note: Callable[[str], object] = lambda _: None  # a line
    parity: Callable[[str, "list[Parity]"], object] = lambda *_: None  # what was verified, and what was found

    def stage(self, name: str) -> Callable[[float, float], object]:
        """`progress` of one stage."""
        return lambda done, total: self.progress(name, done, total)


def convert(
    source: str | Path,
    destination: Path,
    *,
    config: Path | None = None,
    revision: str | None = None,
    key_map: str | None = None,
    rope: str | None = None,
    dtype: str | None = None,
    default_route: str | None = None,
    router_choices: str | None = None,
    slicing: str | None = None,
    graft: "Graft | None" = None,
    calibrate: Calibration | None = None,
    bits: Bits | None = None,
    allow_nonfinite: bool = False,
    verify: bool = False,
    force: bool = False,
    watch: Watch | None = None,
) -> None:
    """Write the model directory ``destination`` from ``source``.

    Args:
        source, config, revision, key_map, rope, dtype, default_route, router_choices, slicing: see
            `duo_mlx.convert.source.open_source`.
        destination: it must not exist, unless ``force`` is given.
        graft: how to make a Duo of a dense model; its state is kept beside ``destination`` until that is there, so that
            a graft which was interrupted goes on. None: the source is a Duo.
        calibrate: the texts of the graft and of measuring best patterns.
        bits: write a quantised model.
        allow_nonfinite: take NaN and infinity in weights.
        verify: compare with another implementation, see `duo_mlx.convert.parity`, before anything has its name.
        force: replace an existing model directory.
        watch: is told of progress, of what was verified, and of what is worth a line.

    Raises:
        DuoError: the source cannot be converted, or the destination not be written; `MisfitError`: tensors do not fit
            the configuration.
        DisagreementError: ``verify`` found a difference.
    """
    watch = watch or Watch()
    refuse_existing(destination, force)
    paths = calibrate.texts if calibrate else ()
    for read in (Path(source), config, key_map and Path(key_map), *paths):
        if read and read.exists():
            refuse_overlap(read, destination)
    if verify and (graft is None or bits is not None):
        require_torch()
    if graft is not None and calibrate is None:
        raise DuoError("a graft needs calibration texts; give them with --calibrate")
    texts = calibration.read_texts(paths)
    found = open_source(
        source,
        graft=graft is not None,
        config=config,
        revision=revision,
        key_map=key_map,
        rope=rope,
        dtype=dtype,
        default_route=default_route,
        router_choices=router_choices,
        slicing=slicing,
    )
    found.check()
    for line in (*found.checkpoint.notes, *found.notes):
        watch.note(line)
    if verify and (graft is None or bits is not None):
        from duo_mlx.convert import references

        if line := references.note(found.config):
            watch.note(line)
    refuse_overlap(found.checkpoint.source, destination)
    if bits is not None and bits.bits not in (None, FLOAT) and packing.is_quantised(found.config):
        raise DuoError(
            f"--bits: {source} is quantised, and big stays as it is stored; --small-bits alone is for small FFNs"
        )
    if graft is not None and graft.small_layers is not None:
        _check_layers(graft.small_layers, found)
    state = destination.absolute().with_name(f".{destination.absolute().name}.graft")
    job = _Job(found, texts, watch, graft, calibrate, bits, allow_nonfinite, verify, state)
    try:
        with output_directory(destination, force) as directory:
            job.fill(directory)
    except DisagreementError:  # the same graft would give the same model again
        if graft is not None:
            shutil.rmtree(state, ignore_errors=True)
        raise
    except (Exception, KeyboardInterrupt):
        if graft is not None and state.exists():
            watch.note(f"what was grafted is kept in {state}; the same command goes on from there")
        raise
    if graft is not None:
        shutil.rmtree(state, ignore_errors=True)


def require_torch() -> None:
    """Say that PyTorch is missing before the work, not after it.

    Raises:
        DuoError: it is not installed.
    """
    if find_spec("torch") is None:
        raise DuoError("--verify needs PyTorch: pip install 'duo-mlx[torch]'")


def judge(watch: Watch, what: str, found: "list[Parity]", *, identical_argmax: bool = False) -> None:
    """Hand on what was found by verifying ``what``.

    Raises:
        DisagreementError: it is beyond the tolerance.
    """
    from duo_mlx.convert import parity

    watch.parity(what, found)
    if parity.failures(found, identical_argmax=identical_argmax):
        raise DisagreementError(f"beyond the tolerance of {parity.TOLERANCE:g}; nothing was written")


def _check_layers(small_layers: tuple[int, ...], found: Source) -> None:
    layers = Config.from_dict(found.config).num_hidden_layers
    if beyond := [layer for layer in small_layers if layer >= layers]:
        raise DuoError(f"--small-layers: there is no layer {beyond[0]}; {found.name} has layers 0 to {layers - 1}")


@dataclass(frozen=True)
class _Job:
    """One conversion, whose source is open and whose options are known."""

    source: Source
    texts: list[Text]
    watch: Watch
    graft: "Graft | None"
    calibrate: Calibration | None
    bits: Bits | None
    allow_nonfinite: bool
    verify: bool
    state: Path  # where a graft keeps what it has

    def fill(self, directory: Path) -> None:
        """Write everything into the new ``directory``."""
        if self.bits is None:
            self._write(directory)
            return
        self._write(staged := _made(directory / "float"))
        self._quantise(staged, directory)
        shutil.rmtree(staged)

    def _write(self, directory: Path) -> None:
        """The model in float."""
        self._bring_tokenizer(directory)
        ids = self._divide(directory)
        tensors, config = self.source.tensors, self.source.config
        write_weights(directory, tensors, allow_nonfinite=self.allow_nonfinite, progress=self.watch.stage("writing"))
        checkpoint.save_config(directory, config)
        guard.check(directory, self.source.stock, Config.from_dict(self.source.config).base)
        if ids and self.graft:
            config = self._graft(directory, ids)
            checkpoint.read_model(directory)  # which has a guard of its own
        if ids is not None and ids.windows is not None:
            best = calibration.measure(directory, ids.windows, self.texts, self._measured)
            checkpoint.save_config(directory, config | {"best_patterns": best})
        elif config.get("best_patterns"):
            self._bring_record(directory)
        if self.verify:
            self._verify(directory, config, tensors)

    def _measured(self, share: float) -> None:
        self.watch.progress("measuring", share, 1)

    def _bring_tokenizer(self, directory: Path) -> None:
        try:
            note = write_tokenizer(self.source.checkpoint, directory, Config.from_dict(self.source.config).vocab_size)
        except OSError as error:
            raise DuoError(f"{error.filename2 or error.filename or directory}: {error.strerror or error}") from error
        if note:
            self.watch.note(note)

    def _bring_record(self, directory: Path) -> None:
        """What stands beside ``best_patterns`` that are taken as they are."""
        beside = self.source.checkpoint.files[0].parent / calibration.RECORD
        if beside.is_file():
            with writing(directory / beside.name):
                shutil.copyfile(beside, directory / beside.name)

    def _divide(self, directory: Path) -> calibration.Split | None:
        """The token ids of the texts, in the words of the tokenizer in ``directory``."""
        if self.calibrate is None:
            return None
        wanted = self.graft.tokens if self.graft else 0
        longest = Config.from_dict(self.source.config).max_position_embeddings
        ids = calibration.encode(directory, self.source.config, self.texts)
        found = calibration.split(
            ids, wanted, self.calibrate.measure_tokens, longest if type(longest) is int and longest > 0 else None
        )
        if found.note:
            self.watch.note(found.note)
        return found

    def _graft(self, directory: Path, ids: calibration.Split) -> dict[str, Any]:
        """Add small FFNs to the dense model that was written into ``directory``; return the Duo's configuration.

        Raises:
            MisfitError: the graft made something else than a Duo.
        """
        from duo_mlx.convert.graft import graft as make_small

        assert self.graft is not None
        model = dense.host(dense.written(directory), self.source.config)
        dtype = dtype_name(model.dtype)
        made = make_small(model, ids.graft, self.graft, self.state, self.watch.stage("grafting"), self.watch.note)
        without = {key: value for key, value in self.source.config.items() if key != "small_layers"}
        config = {key: value for key, value in (without | made.config).items() if value is not None}
        expected = plan.expected_shapes(Config.from_dict(config))
        of_small = {
            name: shape
            for name, shape in expected.items()
            if name.startswith(tuple(f"{path}.small." for path in model.ffn_paths))
        }
        if misfits := plan.misfits(made.tensors, of_small):
            raise plan.MisfitError(self.source.name, misfits)
        if made.orders:
            sort_neurons(directory, model, made.orders)
        write_more(directory, {name: tensor.astype(dtype) for name, tensor in made.tensors.items()}, "model-small")
        checkpoint.save_config(directory, config)
        return config

    def _verify(self, directory: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
        from duo_mlx.convert import parity

        if self.graft is None:
            judge(self.watch, "the model", parity.measure(directory, dict(config), tensors, note=self.watch.note))
            return
        judge(self.watch, "all big and the dense model", parity.measure_dense(directory), identical_argmax=True)

    def _quantise(self, directory: Path, quantised: Path) -> None:
        from duo_mlx.convert.quantise import quantise

        assert self.bits is not None
        made = quantise(
            directory,
            quantised,
            bits=self.bits.bits,
            small_bits=self.bits.small_bits,
            group_size=self.bits.group_size,
            progress=self.watch.stage("quantising"),
        )
        self.watch.note(str(made))
        guard.check(quantised)
        if self.verify:
            from duo_mlx.convert import parity

            judge(self.watch, "the quantised model", parity.measure_quantised(quantised))


def _made(directory: Path) -> Path:
    with writing(directory):
        directory.mkdir()
    return directory
