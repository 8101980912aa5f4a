"""From what a user calls a model to a folder on this machine, and from a folder to the hub.

Owns: resolve_model (existing folders win; anything that looks like owner/name is fetched from the hub or found in its cache),
upload_folder, check_inside. Everything about endpoints, tokens, caches and offline use is huggingface_hub's: HF_ENDPOINT,
HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and `hf auth login` work as everywhere.
Refuses: files in subfolders of a repository, and pickle weights unless asked for.
Invariant: every failure is one CheckpointError that says what to do; no message holds a token.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from llavakit.errors import CheckpointError
from llavakit.storage.folder import MANIFEST_NAME

__all__ = ["HubArguments", "check_inside", "is_hub_id", "name_of_folder", "resolve_model", "upload_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[^\s/.][^\s]*")
_CACHED = re.compile(r"models--(.+?)--(.+)")
_SETTINGS = ["*.json", "*.model", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_PICKLES = ["*.bin"]
_BESIDE_ADAPTERS = ["non_lora_trainables.bin"]
_GGUF = ".gguf"
_DOCUMENTS = ["*.txt", "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# Subfolders hold other formats; consolidated.* are the same weights in another layout; the rest belongs to trainings.
_NEVER = ["*/*", "consolidated*", "training_args.bin", "optimizer.bin", "scheduler.bin"]
_XET_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """One revision of one repository, and how it may be reached."""

    model: str
    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    token: str | bool | None

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.model if self.revision is None else f"{self.model} (revision {self.revision})"


class HubArguments(TypedDict, total=False):
    """The keywords by which a caller says where on the hub something lies; resolve_model explains them."""

    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    token: str | bool | None


def resolve_model(
    model: str | Path,
    *,
    revision: str | None = None,
    parts: Literal["model", "processor"] = "model",
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Return the folder of a model (or its GGUF file): a path, or a hub id that is downloaded or, offline, found in the hub's cache.

    revision is a branch, a tag or a commit of the hub. parts "processor" leaves the weights out. Weights are safetensors; pickle
    files are fetched only where there are none and allow_pickle is set. Complete files of a broken download are kept.
    Raises: CheckpointError when it is neither, the hub refuses or cannot be reached, or a folder comes with a revision.
    """
    folder = Path(model)
    try:
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except OSError as error:
        raise CheckpointError(f"{str(model)[:100]!r} cannot be opened: {error.strerror}") from error
    if is_folder:
        if revision is not None:
            raise CheckpointError(f"{model} is a folder on this machine and has no revision {revision}; leave the revision out")
        return folder
    if is_file and folder.suffix == _GGUF and revision is None:
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; a model is a folder with config.json and safetensors, or a file *{_GGUF}")
    if not is_hub_id(model):
        raise CheckpointError(f"there is no folder {model}, and that is not a hub id (owner/name) either")
    if revision is not None and (_REVISION.fullmatch(revision) is None or ".." in revision):
        raise CheckpointError(f"{revision!r} cannot be a revision of {model}; give a branch, a tag or a commit")
    source = _Source(model=str(model), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    with _clear_errors(source):
        return _fetch(source, parts=parts, allow_pickle=allow_pickle)


def is_hub_id(model: str | Path) -> bool:
    """Whether a name has the form owner/name; a Path is always a path."""
    return isinstance(model, str) and _HUB_ID.fullmatch(model) is not None


def name_of_folder(folder: Path) -> str:
    """Return what people call a model: its hub id where the folder is one of the hub's cache, else the folder's name."""
    match = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return Path(os.path.abspath(folder)).name if match is None else f"{match[1]}/{match[2]}"


def upload_folder(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, message: str, token: str | bool | None = None
) -> str:
    """Upload a folder's files into a model repository, which is made where it is missing; returns the address of the commit.

    revision is a branch, made where it is missing. Raises: CheckpointError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    if not is_hub_id(repo_id):
        raise CheckpointError(f"{repo_id!r} is not a hub id; give owner/name")
    source = _Source(model=repo_id, revision=revision, cache_dir=None, local_files_only=False, token=token)
    with _clear_errors(source):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # Cards are edited on the hub, so a manifest of this moment would soon be wrong there.
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, ignore_patterns=[MANIFEST_NAME]
        )
        return str(commit.commit_url)


def check_inside(path: Path, folder: Path) -> None:
    """Check that a file of a folder lies in it, links of the hub's cache followed. Raises: CheckpointError."""
    real, home = path.resolve(), folder.resolve()
    if real.parent == home:
        return
    repository = home.parent.parent
    if home.parent.name == "snapshots":
        shared = repository.parent / "blobs"  # one store of all repositories: blobs/ab/ab12...
        if real.parent == repository / "blobs":
            return
        if _XET_BLOB.fullmatch(real.name) is not None and real.parent == shared / real.name[:2]:
            return
    raise CheckpointError(f"{path.name} leads outside {folder}; links may only point into the same hub repository")


def _fetch(source: _Source, *, parts: str, allow_pickle: bool) -> Path:
    if parts == "processor":
        return _snapshot(source, _SETTINGS)
    folder = _snapshot_with_documents(source, [*_SETTINGS, *_WEIGHTS])
    if any(folder.glob("*.safetensors")):
        # What LLaVA's training leaves beside an adapter is a pickle file; without it the projector would silently be the base's.
        is_adapter = (folder / "adapter_config.json").is_file()
        return _snapshot(replace(source, revision=folder.name), [*_SETTINGS, *_WEIGHTS, *_BESIDE_ADAPTERS]) if is_adapter else folder
    if not allow_pickle:
        raise CheckpointError(
            f"{source.name} has no safetensors. If it has pickle weights (.bin): these can run code when they are opened carelessly; "
            "use a repository or revision with safetensors, or, where you trust its owner, set allow_pickle"
        )
    return _snapshot(replace(source, revision=folder.name), [*_SETTINGS, *_PICKLES])


def _snapshot_with_documents(source: _Source, patterns: Sequence[str]) -> Path:
    """Fetch licences and descriptions too; in a cache that another tool filled they may be absent, which is no reason to fail."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(source, [*patterns, *_DOCUMENTS])
    except LocalEntryNotFoundError:
        with contextlib.suppress(LocalEntryNotFoundError):
            return _snapshot(replace(source, local_files_only=True), patterns)
        raise


def _snapshot(source: _Source, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            source.model,
            revision=source.revision,
            cache_dir=source.cache_dir,
            local_files_only=source.local_files_only,
            token=source.token,
            allow_patterns=list(patterns),
            ignore_patterns=_NEVER,
        )
    )


@contextlib.contextmanager
def _clear_errors(source: _Source) -> Iterator[None]:
    """Turn what huggingface_hub raises into one CheckpointError."""
    from huggingface_hub import constants, errors

    name, hub = source.name, constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        text = f"{name} is gated: accept its terms at {hub}/{source.model} and log in with `hf auth login`"
        raise CheckpointError(text) from error
    except errors.RepositoryNotFoundError as error:
        text = f"{hub} has no model {source.model}, or it is private and your login cannot see it: check the name, or `hf auth login`"
        raise CheckpointError(text) from error
    except errors.RevisionNotFoundError as error:
        text = f"{source.model} has no revision {source.revision or 'main'}; choose one of its branches, tags or commits on {hub}"
        raise CheckpointError(text) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"there is no folder {source.model}, and the hub allows no such name: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_not_cached(source, hub, error)) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{name}: {_answered(hub, error)}") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the HTTP client's own base class, whichever client it is
        text = f"{name}: the connection to {hub} failed ({type(error).__name__}); check the network and try again, complete files are kept"
        raise CheckpointError(text) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} could not be moved between {hub} and this machine: {error}") from error


def _not_cached(source: _Source, hub: str, error: OSError) -> str:
    """Say why a model that is not (wholly) in the cache could not be fetched either."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    what, cause = f"there is no folder {source.model}; as a hub id {source.name} is not, or not wholly, in the cache", error.__cause__
    if source.local_files_only or isinstance(cause, OfflineModeIsEnabled):
        return f"{what} and looking on the hub is switched off; download it once without local_files_only and HF_HUB_OFFLINE"
    if isinstance(cause, HfHubHTTPError):
        return f"{what} and {_answered(hub, cause)}"
    return f"{what} and {hub} cannot be reached; check the network (and HF_ENDPOINT, where you set it)"


def _answered(hub: str, error: OSError) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    match status:
        case 401 | 403:
            fix = "log in with `hf auth login`, with a token that may do this"
        case 429:
            fix = "it asks for fewer requests; wait a while"
        case _:
            fix = "try again later"
    return f"{hub} answered {status}; {fix}"
