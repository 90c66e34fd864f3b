"""What is made and read before training: the tokenizer, token files, and the weights to start from."""

import hashlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from duo_mlx import checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.model import Config, Model
from duo_mlx.training import data, start, state, tokenizer
from duo_mlx.training.data import Data
from duo_mlx.training.folder import Folder
from duo_mlx.training.job import Job, Watch
from duo_mlx.training.stage import module_of


@dataclass(frozen=True)
class Prepared:
    """What rank 0 begins with.

    Args:
        recipe: all that the result depends on, in JSON's types.
        config: the model's config.json.
        weights: before training, by name, and of the types in which they will be written; unread.
        data: to train on.
    """

    recipe: dict[str, Any]
    config: dict[str, Any]
    weights: dict[str, mx.array]
    data: Data


def prepare(job: Job, folder: Folder, watch: Watch) -> Prepared:
    """Make and read it; what is in the folder already is not made again.

    Raises:
        DuoError: a text, a tokenizer, a model or the folder cannot be used, or the folder is of another recipe.
    """
    job.question.check()
    folder.begin(job.resume)
    try:
        return _prepare(job, folder, watch)
    except DuoError:
        if not job.resume:  # the same command, put right, is to find nothing
            folder.remove()
        raise


def _prepare(job: Job, folder: Folder, watch: Watch) -> Prepared:
    recipe = job.options | job.question.described() | _origin(job)
    if folder.checkpoint.exists():
        state.refuse_other(folder.checkpoint, recipe)
    if job.model is not None:
        config, weights = start.weights_of(job.model, job.config)
        limit, length = config.get("max_position_embeddings"), job.settings.length
        if limit is not None and length > limit:
            raise DuoError(f"--length {length}: the model's context is {limit}")
        _bring_tokens(job, folder, config, recipe, watch)
    else:
        assert job.sizes is not None
        config = job.sizes.config(job.vocabulary, job.settings.length)  # refused before texts are read
        config["vocab_size"] = _bring_tokens(job, folder, config, recipe, watch)
        model = Model(Config.from_dict(config))
        weights = start.initialised(model, job.settings.seed)
        weights = {name: each.astype(job.settings.dtype) for name, each in weights.items()}
    learn = list(filter(job.stage(Config.from_dict(config)).learns, weights))
    if not learn:
        raise DuoError(f"{job.model}: has nothing that learns here, such as small FFNs")
    if not all(module_of(name) == "router" for name in learn):
        for measured in ("best_patterns", "router_offsets"):  # on the weights before
            config.pop(measured, None)
    read = data.open_data(job.question, folder.tokens, config["vocab_size"], watch.stage("checking tokens"))
    read.check(job.settings.length)
    return Prepared(recipe, config, weights, read)


def _origin(job: Job) -> dict[str, Any]:
    """Which model and tokenizer training starts from, in the recipe."""
    if job.model is not None:
        return {"model": checkpoint.fingerprint(job.model)}
    if job.tokenizer is None:
        return {"vocab": job.vocabulary}
    for name in tokenizer.FILES:
        if (job.tokenizer / name).is_file():
            return {"tokenizer": hashlib.sha256((job.tokenizer / name).read_bytes()).hexdigest()}
    raise DuoError(f"--tokenizer {job.tokenizer}: holds neither a {' nor a '.join(tokenizer.FILES)}")


def _bring_tokens(job: Job, folder: Folder, config: dict[str, Any], recipe: dict[str, Any], watch: Watch) -> int:
    """Bring tokenizer and token files into the folder; how many ids the vocabulary has."""
    made = data.made(folder.tokens, recipe)
    if job.model is not None:
        vocabulary = tokenizer.bring(job.model, folder.out, config["vocab_size"])
    elif job.tokenizer is not None:
        vocabulary = tokenizer.bring(job.tokenizer, folder.out)
    elif job.question.is_token_file:
        raise DuoError("a token file needs the tokenizer that it was made with; give --tokenizer DIR")
    else:
        vocabulary = job.vocabulary
        if not made:
            watch.progress("tokenizer", 0, 1)
            tokenizer.train(job.question, folder.out, vocabulary)
            watch.progress("tokenizer", 1, 1)
    if not made and not job.question.is_token_file:
        read = checkpoint.read_tokenizer(folder.out, config)
        data.tokenise(job.question, folder.tokens, read, vocabulary, recipe, watch.stage("tokenising"))
    return vocabulary
