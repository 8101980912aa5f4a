"""Kept features: the losses of a run without them, an interrupted build that goes on, and what cannot be kept."""

from pathlib import Path

import pytest
import torch

from llavakit.errors import ConfigError, DataError
from llavakit.model.llava import LlavaCore
from llavakit.training.data import Sample
from llavakit.training.features import build_features
from llavakit.training.packing import PackedSource
from tests.distributed.toy_ranks import Mixed, model


class Reading(Mixed):
    """Samples that count how often they are built; one cannot be."""

    def __init__(self) -> None:
        self.built: list[int] = []

    def sample(self, index: int) -> Sample:
        if index == 5:
            raise DataError("torn")
        self.built.append(index)
        return super().sample(index)


def losses(core: LlavaCore, source: PackedSource) -> list[float]:
    return [core.loss_packed(source.batch(number).batch).sum.item() for number in range(3)]


def test_losses_are_those_without_and_gradients_reach_the_projector(tmp_path: Path) -> None:
    core = model()
    kept = build_features(core, Mixed(), range(6), tmp_path, dtype=torch.float32)
    assert losses(core, PackedSource(kept, 2)) == pytest.approx(losses(core, PackedSource(Mixed(), 2)), rel=1e-6)
    batch = PackedSource(kept, 2).batch(0).batch
    assert batch.pixels_N3SS is None
    core.loss_packed(batch).sum.backward()
    assert all(weight.grad is not None for weight in core.multi_modal_projector.parameters())


def test_a_build_goes_on_with_the_chunks_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit.training.features._CHUNK", 4)
    first = Reading()
    build_features(model(), first, range(12), tmp_path, dtype=torch.bfloat16)
    assert first.built == [index for index in range(12) if index != 5]
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "1.part").write_bytes(b"torn")
    second = Reading()
    kept = build_features(model(), second, range(12), tmp_path, dtype=torch.bfloat16)
    assert second.built == [4, 6, 7]
    assert kept.sample(9).ids == Mixed().sample(9).ids
    assert kept.sample(9).seen_NPD is not None
    assert kept.sample(10).seen_NPD is None
    with pytest.raises(ConfigError, match="sample 5"):
        kept.sample(5)
