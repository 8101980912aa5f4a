"""Scenes: reproducible, without overlaps, without held-out pairs unless asked."""

import random

import pytest

from llavakit.world.scenes import HELD_OUT, MAX_THINGS, Scene, draw_scene, inset

SEEDS = range(200)


def overlaps(scene: Scene) -> bool:
    boxes = [scene.box(thing) for thing in scene.things]
    return any(
        one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
        for index, one in enumerate(boxes)
        for other in boxes[index + 1 :]
    )


def test_same_seed_gives_same_scene() -> None:
    assert draw_scene(random.Random(7)) == draw_scene(random.Random(7))


@pytest.mark.parametrize("aspect", [0.75, 1.0, 4 / 3, 1.6])
def test_things_lie_inside_and_apart(aspect: float) -> None:
    for seed in SEEDS:
        scene = draw_scene(random.Random(seed), aspect=aspect)
        assert 1 <= len(scene.things) <= MAX_THINGS
        assert all(0 <= edge <= 1 for thing in scene.things for edge in scene.box(thing))
        assert not overlaps(scene)


def test_training_scenes_hold_no_held_out_pair() -> None:
    pairs = {(thing.color, thing.name) for seed in SEEDS for thing in draw_scene(random.Random(seed)).things}
    assert not pairs & HELD_OUT


def test_held_out_scenes_hold_one() -> None:
    for seed in SEEDS:
        scene = draw_scene(random.Random(seed), held_out=True)
        assert any((thing.color, thing.name) in HELD_OUT for thing in scene.things)


def test_inset_keeps_sizes_and_order() -> None:
    rng = random.Random(3)
    scene = draw_scene(rng)
    wider = inset(rng, scene, 1.5)
    assert [thing.height for thing in wider.things] == [thing.height for thing in scene.things]
    order = sorted(range(len(scene.things)), key=lambda index: scene.things[index].x)
    assert order == sorted(range(len(scene.things)), key=lambda index: wider.things[index].x)
    assert wider.panel is not None
    assert all(wider.panel.left <= thing.x <= wider.panel.right for thing in wider.things)
