"""LoRA adapters for use beside a loaded model.

Owns: load_lora, from a PEFT folder to a Lora whose modules are the model's, and open_for_core. What cannot be added to a product's result
at run time (weights that are replaced, embeddings, the head, magnitudes of DoRA) is refused with the way out: merging.
"""

from __future__ import annotations

from pathlib import Path

from llavakit.checkpoint.adapters import Adapter
from llavakit.checkpoint.layouts import LLAMA, LLAVA_HF, original_layout
from llavakit.checkpoint.rules import Layout
from llavakit.errors import CheckpointError, shortened
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.lora import AdaptedLinear, Lora
from llavakit.storage.hub import resolve_model

__all__ = ["load_lora", "open_for_core"]


def load_lora(source: str | Path, core: LlamaCore | LlavaCore, *, revision: str | None = None, allow_pickle: bool = False) -> Lora:
    """Load a PEFT adapter's folder or hub id for a model that was made ready by surgery.adapt.

    Raises: CheckpointError for one that does not fit the model, or changes more than products.
    """
    folder = resolve_model(source, revision=revision, allow_pickle=allow_pickle)
    adapter = open_for_core(folder, core, allow_pickle=allow_pickle)
    try:
        adapted = [module for module in core.modules() if isinstance(module, AdaptedLinear)]
        shapes = {f"{name}.weight": shape for module in adapted for name, shape in module.shapes.items()}
        unfit = [change.path for target, change in adapter.changes.items() if target not in shapes or not change.is_sum]
        if unfit:
            raise CheckpointError(
                f"the adapter {folder} cannot be used beside the model, since it does more than add to products, or to others than the "
                f"model has: {'; '.join(shortened(unfit))}; llava merge makes a whole model of it"
            )
        if problems := adapter.problems(shapes):
            raise CheckpointError(f"the adapter {folder} does not fit the model: {'; '.join(shortened(problems))}")
        weight = core.get_input_embeddings().weight
        factors = {target.removesuffix(".weight"): adapter.factors(target) for target in adapter.changes}
        return Lora(factors, weight.dtype, weight.device)
    finally:
        adapter.close()


def open_for_core(folder: Path, core: LlamaCore | LlavaCore, *, allow_pickle: bool) -> Adapter:
    """Open an adapter with the names that modules have in the class in which it was trained. Raises: CheckpointError."""
    layouts: list[Layout] = [LLAVA_HF, original_layout(core.config.projector_depth)] if isinstance(core, LlavaCore) else [LLAMA]
    for layout in layouts[:-1]:
        try:
            return Adapter(folder, layout, allow_pickle=allow_pickle)
        except CheckpointError:  # names of the other class; what else is wrong is said below
            continue
    return Adapter(folder, layouts[-1], allow_pickle=allow_pickle)
