"""checkpoint.rules and layouts: a plan is total, or it lists everything that is wrong."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from llavakit.checkpoint.layouts import LLAMA, LLAMA_DECODER, LLAVA_HF
from llavakit.checkpoint.rules import Drop, Layout, Rename
from llavakit.checkpoint.rules import plan_load as plan_parts
from llavakit.errors import CheckpointError


def plan_load(
    layout: Layout, sources: Mapping[str, tuple[int, ...]], targets: Mapping[str, tuple[int, ...]], *, tied: Mapping[str, str]
) -> dict[str, str]:
    """Plan for a model in one part."""
    return {source: target for (_, source), target in plan_parts([(layout, sources)], targets, tied=tied).items()}


PLAIN = Layout("plain", (Rename("old.", "new."), Rename("", "")), (Drop(r".*\.skip", "of no use"),))


def test_plan_maps_every_source() -> None:
    sources = {"old.a": (1,), "b": (2, 3), "b.skip": (9,)}
    assert plan_load(PLAIN, sources, {"new.a": (1,), "b": (2, 3)}, tied={}) == {"old.a": "new.a", "b": "b"}


def test_all_problems_are_listed_at_once() -> None:
    sources = {"old.a": (1,), "new.a": (1,), "b": (3, 2), "strange": (7,)}
    with pytest.raises(CheckpointError) as caught:
        plan_load(PLAIN, sources, {"new.a": (1,), "b": (2, 3), "c": (4,), "d": ()}, tied={})
    for text in (
        "new.a and old.a are both new.a",
        "b has shape [3, 2], expected [2, 3]",
        "unexpected strange [7]",
        "missing c [4]",
        "missing d []",
    ):
        assert text in str(caught.value)


def test_long_lists_are_counted() -> None:
    with pytest.raises(CheckpointError, match="and 70 more"):
        plan_load(PLAIN, {}, {f"t{i}": (1,) for i in range(100)}, tied={})


def test_tied_targets_may_be_missing_but_not_misshapen() -> None:
    targets, tied = {"a": (2,), "head": (2,)}, {"head": "a"}
    assert plan_load(PLAIN, {"a": (2,)}, targets, tied=tied) == {"a": "a"}
    assert plan_load(PLAIN, {"a": (2,), "head": (2,)}, targets, tied=tied) == {"a": "a", "head": "head"}
    with pytest.raises(CheckpointError, match="head has shape"):
        plan_load(PLAIN, {"a": (2,), "head": (3,)}, targets, tied=tied)


@pytest.mark.parametrize(
    ("layout", "source", "target"),
    [
        (LLAVA_HF, "language_model.model.norm.weight", "language_model.model.norm.weight"),
        (LLAVA_HF, "model.language_model.norm.weight", "language_model.model.norm.weight"),
        (LLAVA_HF, "language_model.lm_head.weight", "language_model.lm_head.weight"),
        (LLAVA_HF, "lm_head.weight", "language_model.lm_head.weight"),
        (LLAVA_HF, "vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        (LLAVA_HF, "vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        (LLAVA_HF, "model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        (LLAVA_HF, "model.vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        (LLAVA_HF, "model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        (LLAVA_HF, "image_newline", "image_newline"),
        (LLAVA_HF, "model.image_newline", "image_newline"),
        (LLAVA_HF, "newline", None),
        (LLAVA_HF, "model.layers.0.mlp.up_proj.weight", None),
        (LLAMA, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        (LLAMA_DECODER, "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        (LLAMA_DECODER, "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
    ],
)
def test_names(layout: Layout, source: str, target: str | None) -> None:
    assert layout.target(source) == target


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "model.vision_tower.embeddings.position_ids",
    ],
)
def test_buffers_of_old_versions_are_dropped_with_a_reason(name: str) -> None:
    assert LLAVA_HF.drop_reason(name)
    assert LLAVA_HF.drop_reason(name + ".weight") is None
