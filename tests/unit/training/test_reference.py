"""Reference values on disk: equal to what the model says, found by content, not computed twice, not lost by a kill."""

import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llavakit.errors import DataError
from llavakit.model.llava import AnswerBatch
from llavakit.training.preference import PreferenceSample, pack_pairs
from llavakit.training.reference import Filled, ReferencedSource, ReferenceStore, sample_digest
from tests.preferences import Pairs
from tests.tiny import llava

PAIRS = Pairs(spoilt=True)


def test_the_values_are_the_models_own(tmp_path: Path) -> None:
    core = llava()
    store = ReferenceStore(tmp_path / "reference", core, "float32")
    assert store.fill(PAIRS, range(5), pairs_per_batch=2) == Filled(5, 0, 0)
    source = ReferencedSource(PAIRS, store.read())
    batch = pack_pairs([source.sample(index) for index in range(5)])
    assert batch.reference_A is not None
    # Other company in the batch, other order of sums.
    torch.testing.assert_close(batch.reference_A, core.logprobs_packed(batch).detach(), rtol=1e-5, atol=1e-5)
    assert batch.reference_A.dtype == torch.float32


def test_what_is_known_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core, num_calls = llava(), 0
    compute = core.logprobs_packed

    def count(batch: AnswerBatch, *, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return compute(batch, dtype=dtype)

    monkeypatch.setattr(core, "logprobs_packed", count)
    store = ReferenceStore(tmp_path, core, "float32")
    with pytest.raises(KeyboardInterrupt):
        store.fill(PAIRS, range(6), pairs_per_batch=2)
    assert store.fill(PAIRS, range(6), pairs_per_batch=2) == Filled(2, 4, 0)
    assert store.fill(PAIRS, [*range(6), 0], pairs_per_batch=2) == Filled(0, 7, 0)
    assert num_calls == 4


def test_a_kill_loses_one_batch_at_most(tmp_path: Path) -> None:
    core = llava()
    store = ReferenceStore(tmp_path, core, "float32")

    class Deadly:
        def sample(self, index: int) -> PreferenceSample:
            if index == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return PAIRS.sample(index)

    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        store.fill(Deadly(), range(8), pairs_per_batch=2)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert store.fill(PAIRS, range(8), pairs_per_batch=2) == Filled(4, 4, 0)


def test_other_weights_and_dtypes_have_other_files(tmp_path: Path) -> None:
    core = llava()
    paths = [ReferenceStore(tmp_path, core, dtype).path for dtype in ("float32", "bfloat16")]
    with torch.no_grad():
        core.get_parameter("language_model.lm_head.weight")[0, 0] += 1e-3
    paths.append(ReferenceStore(tmp_path, core, "float32").path)
    assert len(set(paths)) == 3
    assert ReferenceStore(tmp_path, llava(), "float32").path == paths[0]


def test_a_changed_row_is_not_given_an_old_value(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, llava(), "float32")
    store.fill(PAIRS, range(2))

    class Changed:
        def sample(self, index: int) -> PreferenceSample:
            sample = PAIRS.sample(index)
            return replace(sample, tiles_N3SS=sample.tiles_N3SS + 1e-3)

    with pytest.raises(DataError, match="fill the store again"):
        ReferencedSource(Changed(), store.read()).sample(0)


def test_the_digest_covers_what_is_scored() -> None:
    sample = PAIRS.sample(0)
    assert sample.spoilt_N3SS is not None
    masked = replace(sample.chosen, loss_mask=(*sample.chosen.loss_mask[:-1], False))
    others = (
        replace(sample, chosen=masked),
        replace(sample, rejected=replace(sample.rejected, ids=(*sample.rejected.ids[:-1], 9))),
        replace(sample, tiles_N3SS=-sample.tiles_N3SS),
        replace(sample, spoilt_N3SS=-sample.spoilt_N3SS),
        replace(sample, spoilt_N3SS=None),
        replace(sample, grids=()),
    )
    assert len({sample_digest(each) for each in (sample, *others)}) == 1 + len(others)
    assert sample_digest(replace(sample, reference=(0.0, 0.0, 0.0))) == sample_digest(sample)


def test_pairs_that_cannot_be_built_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Holed:
        def sample(self, index: int) -> PreferenceSample:
            if index == 1:
                raise DataError("picture 'b.png' is damaged")
            return PAIRS.sample(index)

    with caplog.at_level(logging.WARNING, logger="llavakit"):
        assert ReferenceStore(tmp_path, llava(), "float32").fill(Holed(), range(3)) == Filled(2, 0, 1)
    assert "pair 1 is left out: picture 'b.png' is damaged" in caplog.text
