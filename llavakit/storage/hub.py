"""From what a user calls a model to a folder on this machine.

Owns: resolve_model. Existing folders win; anything that looks like owner/name is fetched from the hub, safetensors only.
"""

from __future__ import annotations

import re
from pathlib import Path

from llavakit.errors import CheckpointError

__all__ = ["resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]


def resolve_model(model: str | Path) -> Path:
    """Return the folder of a model: a path, or a hub id that is downloaded (or found in the hub's cache).

    Raises: CheckpointError when it is neither, or the hub refuses or cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; a model is a folder with config.json and safetensors")
    if isinstance(model, Path) or _HUB_ID.fullmatch(model) is None:
        raise CheckpointError(f"there is no folder {model}, and that is not a hub id (owner/name) either")
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no model {model}, or it is private and you are not logged in (`hf auth login`)") from error
    except HFValidationError as error:
        raise CheckpointError(f"there is no folder {model}, and the hub allows no such name: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {model}; as a hub id it is not in the cache and the hub cannot be reached; check the network"
        ) from error
