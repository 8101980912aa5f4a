"""Laws of checkpoint.rules over random layouts: a plan is total or lists everything that is wrong, and names go there and back.

Layouts are as real ones: some parts, each with its prefix in our models and one or more in files, prefixes lying in one another as
they like. Segments of prefixes and names inside a part come from two alphabets, as layers' names are none of parts'.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.checkpoint.layouts import LANGUAGE_MODEL, LLAMA, LLAVA_HF, LLAVA_MODULES, TOWER, original_layout
from llavakit.checkpoint.rules import Drop, Layout, Rename, plan_load
from llavakit.errors import CheckpointError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.llava_config import LlavaConfig
from tests.tiny import llama_config, llava_config

Shapes = dict[str, tuple[int, ...]]
PREFIXES = st.lists(st.sampled_from("abc"), max_size=3).map(lambda segments: "".join(f"{segment}." for segment in segments))
INNER = st.lists(st.sampled_from(["0", "1", "w", "bias"]), min_size=1, max_size=3).map(".".join)
SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)
SOME = settings(max_examples=60, deadline=None)
DROP = Drop(r"(.*\.)?skip", "of no use")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw parts with their prefixes in files, in any order."""
    ours = draw(st.lists(PREFIXES, min_size=1, max_size=4, unique=True))
    files = draw(st.lists(PREFIXES, min_size=len(ours), max_size=len(ours) + 3, unique=True))
    owners = [*ours, *(draw(st.sampled_from(ours)) for _ in files[len(ours) :])]
    renames = draw(st.permutations([Rename(source, target) for source, target in zip(files, owners, strict=True)]))
    return Layout("random", tuple(renames), (DROP,))


@dataclass(frozen=True)
class Case:
    """A model, and files of it in several parts."""

    parts: list[tuple[Layout, Shapes]]
    targets: Shapes
    plan: dict[tuple[int, str], str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a model and spell each weight's name in one of the parts, by one of the prefixes; useless tensors lie between."""
    chosen = draw(st.lists(layouts(), min_size=1, max_size=3))
    parts: list[tuple[Layout, Shapes]] = [(layout, {}) for layout in chosen]
    targets, plan = {}, {}
    for inner, shape in draw(st.dictionaries(INNER, SHAPES, min_size=1, max_size=8)).items():
        number = draw(st.integers(0, len(parts) - 1))
        rename = draw(st.sampled_from(chosen[number].renames))
        target, source = rename.target + inner, rename.source + inner
        targets[target], parts[number][1][source], plan[number, source] = shape, shape, target
    for _, sources in parts:
        sources |= dict.fromkeys(draw(st.lists(PREFIXES.map(lambda prefix: f"{prefix}skip"), max_size=2)), (9, 9))
    return Case(parts, targets, plan)


@SOME
@given(layout=layouts(), inner=INNER)
def test_names_go_there_and_back(layout: Layout, inner: str) -> None:
    for rename in layout.renames:
        name = rename.target + inner
        assert layout.target(rename.source + inner) == name
        source = layout.source(name)
        assert source is not None
        assert layout.target(source) == name
        assert source == next(other.source for other in layout.renames if other.target == rename.target) + inner


@SOME
@given(case=cases())
def test_plans_are_total(case: Case) -> None:
    assert plan_load(case.parts, case.targets, tied={}) == case.plan


@SOME
@given(case=cases(), data=st.data())
def test_everything_wrong_is_told_at_once(case: Case, data: st.DataObject) -> None:
    places = list(case.plan)
    told, faulty = [], data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    for number, source in faulty:
        target, (layout, sources) = case.plan[number, source], case.parts[number]
        shape = sources.pop(source)
        match data.draw(st.sampled_from(["missing", "misshapen", "unexpected", "doubled"])):
            case "missing":
                told.append(f"missing {target} {list(shape)}")
            case "misshapen":
                sources[source] = (*shape, 7)
                told.append(f"{source} has shape {[*shape, 7]}, expected {list(shape)}")
            case "unexpected":
                sources[source] = shape
                sources[f"{source}.more"] = shape
                told.append(f"unexpected {source}.more {list(shape)}")
            case "doubled":
                sources[source] = shape
                case.parts.append((layout, {source: shape}))
                told.append(f"{source} and {source} are both {target}")
    with pytest.raises(CheckpointError) as caught:
        plan_load(case.parts, case.targets, tied={})
    problems = str(caught.value).partition("model: ")[2].split("; ")
    assert sorted(problems) == sorted(told)


@SOME
@given(case=cases(), data=st.data())
def test_weights_that_share_anothers_may_be_missing(case: Case, data: st.DataObject) -> None:
    names = st.lists(st.sampled_from(list(case.targets)), unique=True)
    tied, missing = dict.fromkeys(data.draw(names), next(iter(case.targets))), data.draw(names)
    for number, source in [place for place, target in case.plan.items() if target in missing]:
        del case.parts[number][1][source]
    if set(missing) <= set(tied):
        expected = {place: target for place, target in case.plan.items() if target not in missing}
        assert plan_load(case.parts, case.targets, tied=tied) == expected
    else:
        with pytest.raises(CheckpointError, match="missing"):
            plan_load(case.parts, case.targets, tied=tied)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_layout_names_every_weight_and_reads_it_back(depth: int) -> None:
    kind = "linear" if depth == 1 else f"mlp{depth}x_gelu"
    with torch.device("meta"):
        core, text = LlavaCore(LlavaConfig.from_dict({**llava_config().to_dict(), "mm_projector_type": kind})), LlamaCore(llama_config())
    everything = [*(name for name, _ in core.named_parameters()), "image_newline"]
    parts = {LANGUAGE_MODEL: "language_model.", TOWER: "vision_tower."}
    for layout in (LLAVA_HF, LLAVA_MODULES, original_layout(depth), LANGUAGE_MODEL, TOWER):
        names = [name for name in everything if name.startswith(parts.get(layout, ""))]
        sources = {name: layout.source(name) for name in names}
        assert len(set(sources.values())) == len(names)
        assert {name: layout.target(str(source)) for name, source in sources.items()} == {name: name for name in names}
        assert not any(layout.drop_reason(str(source)) for source in sources.values())
    assert all(LLAMA.source(name) == LLAMA.target(name) == name for name, _ in text.named_parameters())
