"""A hub data set -> the files of one of its splits, at one commit.

Which files make up a split is asked of `datasets`, which knows READMEs and naming customs. The files themselves are
downloaded and read like local ones: rows keep their lines, and JSON does not pass through Arrow, which would add nulls.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from sft_dist.data.readers import SUFFIXES, suffix_of
from sft_dist.data.strict_json import one_line
from sft_dist.errors import DataError

PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class HubSplit:
    """files: paths inside the repository, in reading order."""

    path: str
    commit: str
    files: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What origins and errors call the files."""
        return tuple(f"{self.path}/{file}@{self.commit[:7]}" for file in self.files)

    def fetch(self, file: str) -> Path:
        """The file on this machine, downloaded unless it is there already."""
        import huggingface_hub

        try:
            found = huggingface_hub.hf_hub_download(self.path, file, repo_type="dataset", revision=self.commit)
        except client_failures() as error:
            raise DataError(f"{self.path}/{file}@{self.commit[:7]}: cannot be downloaded: {_reason(error)}") from None
        return Path(found)


def find_split(path: str, split: str, revision: str | None) -> HubSplit:
    """The files of a split.

    Raises DataError if the hub does not answer or has no such data set, revision or split, or if a file of the split
    is of a kind that is not read.
    """
    commit, splits = _find_splits(path, revision)
    if split not in splits:
        raise DataError(f"{path}: the hub data set has no split {split!r}; it has {', '.join(splits)}")
    for file in splits[split]:
        if suffix_of(file) is None:
            raise DataError(
                f"{path}/{file}: unknown kind of file in split {split!r}; expected files ending in "
                f"{', '.join(SUFFIXES)}: convert it and give the files"
            )
    return HubSplit(path, commit, tuple(splits[split]))


@lru_cache(maxsize=64)
def _find_splits(path: str, revision: str | None) -> tuple[str, Mapping[str, list[str]]]:
    """The commit that a revision stands for, and the files of each split.

    Cached: a process sees one commit, even if the data set moves on meanwhile.
    """
    from huggingface_hub import constants

    known = _read_record(path, revision)
    if known is not None and (constants.HF_HUB_OFFLINE or known["commit"] == revision):
        return known["commit"], known["splits"]
    commit = _ask_commit(path, revision)
    at_commit = _read_record(path, commit)
    splits = at_commit["splits"] if at_commit is not None else _ask_splits(path, commit)
    record = {"commit": commit, "splits": splits}
    for name in (revision, commit):
        # One that says the same is left alone: the folder may be shared, and not writable.
        if _read_record(path, name) != record:
            _write_record(path, name, record)
    return commit, splits


def _ask_commit(path: str, revision: str | None) -> str:
    """One short request, so that a mistyped path does not wait for the retries of larger ones."""
    import huggingface_hub
    from huggingface_hub import errors

    neither = f"{path}: neither a file (looked in {Path.cwd()}) nor a reachable hub data set"
    try:
        info = huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=PROBE_TIMEOUT_S, expand=["sha"])
    except errors.RevisionNotFoundError:
        raise DataError(f"{path}: the hub data set has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"{neither}: the hub has none of this name, or it is private and needs a login") from None
    except errors.OfflineModeIsEnabled:
        raise DataError(f"{neither}: HF_HUB_OFFLINE is set, and it was not read here before") from None
    except client_failures() as error:
        hint = ""
        if _read_record(path, revision) is not None:
            hint = "; HF_HUB_OFFLINE=1 takes the version that was read here before"
        raise DataError(f"{neither}: {_reason(error)}{hint}") from None
    if not info.sha:
        raise DataError(f"{neither}: the hub names no commit")
    return info.sha


def _ask_splits(path: str, commit: str) -> dict[str, list[str]]:
    import datasets  # seconds to import, and only hub data needs it

    odd_cards = (TypeError, KeyError, RuntimeError, yaml.YAMLError, datasets.exceptions.DatasetsError)
    try:
        builder = datasets.load_dataset_builder(path, revision=commit)
    except (*client_failures(), *odd_cards) as error:
        raise DataError(f"{path}: the splits of this hub data set cannot be found: {_reason(error)}") from None
    return {
        str(split): [_inside(url, path, commit) for url in urls]
        for split, urls in (builder.config.data_files or {}).items()
    }


def _inside(url: str, path: str, commit: str) -> str:
    start = f"hf://datasets/{path}@{commit}/"
    if not url.startswith(start):
        raise DataError(f"{path}: its file {url} lies outside the data set; download it and give the file")
    return url.removeprefix(start)


# What was found is kept beside the hub's own cache: offline there is nobody to ask.


def _record_file(path: str, revision: str | None) -> Path:
    from huggingface_hub import constants

    name = quote(f"{path}@{revision or 'main'}", safe="@")
    return Path(constants.HF_HOME) / "sft_dist" / f"{name}.json"


def _read_record(path: str, revision: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(_record_file(path, revision).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= {"commit", "splits"} else None


def _write_record(path: str, revision: str | None, record: Mapping[str, Any]) -> None:
    file = _record_file(path, revision)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record))
        temporary.replace(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}; set HF_HOME to a folder that can") from None


def client_failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it does not get through; its version decides on which library it is built."""
    return (OSError, ValueError, *(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules))


def _reason(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__
