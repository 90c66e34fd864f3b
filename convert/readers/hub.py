"""A hub id: the repository's list of files first, then only those that are needed, through the cache.

`huggingface_hub` does the work: HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they always mean.
"""

import re
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from duo_mlx.convert.readers import local, meta, shards
from duo_mlx.convert.readers.text import one_line, read_object
from duo_mlx.errors import DuoError

# beside the weights: what the model and its tokenizer need
SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "params.json", "adapter_config.json"),
)
ANSWERS = (  # a gated repository is a kind of absent one
    (GatedRepoError, "it is gated; ask for access on its page and log in"),
    (RepositoryNotFoundError, "it has no such repository, or not for you"),
    (RevisionNotFoundError, "it has no such revision"),
)
_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<file>.+))?", re.ASCII)


def parse(source: str) -> tuple[str, str | None] | None:
    """OWNER/NAME and, from OWNER/NAME:FILE, the file; None if ``source`` is no hub id."""
    match = _ID.fullmatch(source)
    if match is None or match["name"].startswith((".", "-")) or match["name"].endswith((*local.SUFFIXES, ".json")):
        return None
    return match["name"], match["file"]


def fetch(
    name: str, file: str | None, revision: str | None, judge: Callable[[dict[str, Any]], object] | None = None
) -> tuple[Path, Path]:
    """The local copy of a repository: its directory in the cache, and in that the weights file or index.

    Args:
        name: OWNER/NAME.
        file: the weights file to read; None: the one that `choose` finds.
        revision: branch, tag or commit; None: main.
        judge: is called with what config.json says before anything large is downloaded, and may raise.

    Raises:
        DuoError: there is no such repository, revision or file, or the hub is out of reach and the cache lacks it.
    """
    try:
        names, directory = _list(name, revision)
        chosen = choose(name, names, file)
        folder = PurePosixPath(chosen).parent
        parts = shards.siblings(PurePosixPath(chosen).name) + ([] if file else _of_meta(chosen, names))
        wanted = [str(folder / small) for small in (*SMALL, *parts)]
        if directory is not None:  # offline: what is there must do
            return directory, directory / chosen
        config = str(folder / "config.json")
        if judge is not None and config in names and not chosen.endswith(local.GGUF):
            directory = _download(name, revision, [config])
            judge(read_object(directory / config))
            revision = directory.name  # the commit
        directory = _download(name, revision, wanted)
        if chosen.endswith(shards.SUFFIX):
            listed = set(shards.read_map(directory / chosen).values())
            _download(name, directory.name, [str(folder / part) for part in listed])
        return directory, directory / chosen
    except DuoError:
        raise
    except HFValidationError:
        raise DuoError(f"{name}: there is no such file or directory, and it is no hub id (OWNER/NAME) either") from None
    except Exception as error:  # HTTP clients have their own, and huggingface_hub changes them
        reason = next((words for kind, words in ANSWERS if isinstance(error, kind)), None)
        reason = reason or one_line(error).partition(". ")[0]
        which = name if revision is None else f"{name} (revision {revision})"
        raise DuoError(
            f"{which}: there is no such file or directory, and the hub does not give it: {reason}"
        ) from error


def choose(name: str, names: Iterable[str], file: str | None = None) -> str:
    """The weights file, or index, of a repository that holds ``names``.

    Raises:
        DuoError: ``file`` is not there; or none is given, and there are several or none.
    """
    names = set(names)
    if file is not None:
        if file not in names:
            raise DuoError(f"{name}: holds no {file}")
        if not file.endswith((*local.SUFFIXES, shards.SUFFIX)):
            raise DuoError(f"{name}:{file}: is no weights file; known are {', '.join(local.SUFFIXES)}")
        return file
    found = local.candidates(names)
    if len(found) == 1:
        return found[0]
    if found:
        raise DuoError(f"{name}: holds several weights files ({', '.join(found)}); name one: {name}:{found[0]}")
    raise DuoError(f"{name}: holds no weights file; it must have one of {', '.join(local.NAMES)} or a .gguf")


def _of_meta(chosen: str, names: Iterable[str]) -> list[str]:
    """The other shards beside Meta's first one."""
    return [name for name in names if chosen == local.META and meta.SHARD.fullmatch(name)]


def _list(name: str, revision: str | None) -> tuple[list[str], Path | None]:
    """The repository's files, or those of it in the cache and where that is."""
    try:
        return [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or []], None
    except HFValidationError:
        raise
    except Exception as error:  # noqa: BLE001 (out of reach or refused: what was fetched before is still good)
        try:
            # no pattern: huggingface_hub wants all files that a pattern matches
            directory = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
        except LocalEntryNotFoundError:
            raise error from None
    return [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()], directory


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    return Path(snapshot_download(name, revision=revision, allow_patterns=[escape(file) for file in files]))
