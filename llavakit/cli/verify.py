"""llava verify: whether two checkpoints hold the same model, or a folder is what was saved."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llavakit.cli.convert import show_progress
from llavakit.errors import ConfigError
from llavakit.logs import show_logs

if TYPE_CHECKING:
    from llavakit.checkpoint.verify import Verification

__all__ = ["verify"]

_SAME, _DIFFERENT = 0, 1


def verify(
    first: str | None = None,
    second: str | None = None,
    *,
    manifest: Path | None = None,
    base: str | None = None,
    vision_tower: str | None = None,
    second_base: str | None = None,
    second_vision_tower: str | None = None,
    atol: float = 0.0,
    logits_atol: float = 1e-4,
    tensors_only: bool = False,
    allow_pickle: bool = False,
    json: bool = False,
) -> int:
    """Compare two checkpoints, tensor by tensor and by logits on a fixed prompt with a picture; exit with 1 where they differ.

    Parameters
    ----------
    first
        Folder or hub id.
    second
        Folder or hub id to compare with.
    manifest
        Instead of two checkpoints: a folder to check against the sums that were written when it was saved.
    base
        Folder or hub id of the model that the first belongs to, where it is an adapter, a delta or a projector.
    vision_tower
        Folder or hub id of the first one's tower, in place of the one that its config names.
    second_base
        As base, for the second.
    second_vision_tower
        As vision_tower, for the second.
    atol
        Largest difference of a weight that still counts as the same.
    logits_atol
        Largest difference of a logit that does.
    tensors_only
        Do not run the models.
    allow_pickle
        Read pickle files (.bin, .pth) too.
    json
        Print one JSON object instead of lines.
    """
    if manifest is not None:
        if first is not None:
            raise ConfigError("verify takes two checkpoints, or --manifest and one folder, not both")
        return _verify_manifest(manifest)
    if first is None or second is None:
        raise ConfigError("verify takes two checkpoints to compare, or --manifest and a folder")

    from llavakit.checkpoint.parts import Sources
    from llavakit.checkpoint.verify import Comparison
    from llavakit.checkpoint.verify import verify as verify_folders
    from llavakit.storage.hub import resolve_model

    show_logs()
    how = Comparison(
        sources=Sources(base=base, vision_tower=vision_tower, allow_pickle=allow_pickle),
        second_sources=Sources(base=second_base, vision_tower=second_vision_tower, allow_pickle=allow_pickle),
        atol=atol,
        logits_atol=logits_atol,
        runs_models=not tensors_only,
    )
    one, two = (resolve_model(name, allow_pickle=allow_pickle) for name in (first, second))
    with show_progress() as progress:
        found = verify_folders(one, two, how, progress)
    sys.stdout.write(json_format.dumps(found.to_dict(), indent=2) + "\n" if json else "".join(f"{line}\n" for line in _lines(found)))
    return _SAME if found.is_same else _DIFFERENT


def _lines(found: Verification) -> list[str]:
    return [
        f"{found.num_tensors} tensors compared, {found.num_identical} equal bit for bit",
        f"weights: largest difference {found.max_weight_difference:.6g}",
        *([] if found.first_different is None else [f"first tensor that differs: {found.first_different}"]),
        *([] if found.max_logit_difference is None else [f"logits: largest difference {found.max_logit_difference:.6g}"]),
        *([] if found.first_layer is None else [f"first layer that differs: {found.first_layer}"]),
        *(f"note: {note}" for note in found.notes),
        *(f"problem: {problem}" for problem in found.problems),
        "the same model" if found.is_same else "not the same model",
    ]


def _verify_manifest(folder: Path) -> int:
    from llavakit.storage.folder import manifest_problems, read_manifest

    problems = manifest_problems(folder, check_hashes=True)
    entries = read_manifest(folder)
    is_hashed = entries is not None and all(entry.sha256 is not None for entry in entries.values())
    good = f"{folder} is what was saved{'' if is_hashed else ', by its sizes; it was saved without sums'}\n"
    sys.stdout.write("".join(f"problem: {problem}\n" for problem in problems) or good)
    return _DIFFERENT if problems else _SAME
