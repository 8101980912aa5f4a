"""Packing: labels, boundaries, how full the packs are, and that packed equals separate."""

import random
from collections import Counter

import pytest
import torch

from llavakit.errors import DataError, ImageError
from llavakit.geometry import ImageGrid
from llavakit.model.llava import PackedBatch
from llavakit.ops.loss import IGNORE
from llavakit.training.config import DataConfig
from llavakit.training.data import Sample
from llavakit.training.packing import BestFitSource, PackedSource, Part, best_fit, pack
from tests.toy_run import NO_TILES, Repeats, toy_core

X = IGNORE


class Lengths:
    """Sample i has lengths[i] tokens, all of them i + 2."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def sample(self, index: int) -> Sample:
        length = self.lengths[index]
        return Sample((index + 2,) * length, (False,) + (True,) * (length - 1), NO_TILES, ())


def mixed_lengths(count: int) -> list[int]:
    rng = random.Random(0)
    return [min(2048, rng.choice((0, 576)) + 20 + int(rng.lognormvariate(5, 0.7))) for _ in range(count)]


def test_each_position_predicts_the_next_token_of_its_own_sequence() -> None:
    first = Sample((1, 5, 6, 7), (False, False, True, True), NO_TILES, ())
    second = Sample((1, 8, 9), (True, True, False), NO_TILES, ())  # its first token has nothing before it to predict it from
    batch = pack([first, second], multiple_of=8)
    assert batch.ids_T.tolist() == [1, 5, 6, 7, 1, 8, 9, 0]
    assert batch.labels_T.tolist() == [X, 6, 7, X, 8, X, X, X]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.cu_seqlens.dtype == torch.int32


def test_tiles_keep_the_order_of_the_samples() -> None:
    tiles = [torch.full((count, 3, 2, 2), float(count)) for count in (1, 2)]
    samples = [Sample((1, 2), (False, True), tile, (ImageGrid(2, 2),) * tile.shape[0]) for tile in (tiles[0], NO_TILES, tiles[1])]
    batch = pack(samples)
    assert batch.pixels_N3SS is not None
    assert torch.equal(batch.pixels_N3SS, torch.cat(tiles))
    assert batch.grids == (ImageGrid(2, 2),) * 3


def test_a_batch_without_supervision_is_refused() -> None:
    with pytest.raises(DataError, match="supervised"):
        pack([Sample((1, 2), (True, False), NO_TILES, ())])


def test_packed_loss_and_gradients_equal_separate_ones() -> None:
    samples = [Repeats().sample(index) for index in range(5)]
    packed, separate = toy_core(), toy_core()
    terms = packed.loss_packed(pack(samples, multiple_of=64))
    terms.sum.backward()
    parts = [separate.loss_packed(pack([sample])) for sample in samples]
    torch.stack([part.sum for part in parts]).sum().backward()
    assert int(terms.weight) == sum(int(part.weight) for part in parts)
    # Measured: 2e-7 relative; sums in another order.
    for ours, theirs in zip(packed.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_fixed_packs_follow_the_index() -> None:
    batch = PackedSource(Lengths([3, 4, 5, 6]), 2).batch(1).batch
    assert batch.ids_T.tolist() == [4] * 5 + [5] * 6 + [0] * 245


def test_best_fit_packs_everything_once_within_the_budget() -> None:
    lengths = mixed_lengths(2000)
    packs = best_fit(lengths, 2048)
    assert sorted(index for chosen in packs for index in chosen) == list(range(2000))
    assert max(sum(lengths[index] for index in chosen) for chosen in packs) <= 2048


@pytest.mark.parametrize("budget", [2048, 8192, 16384])
def test_best_fit_is_at_least_97_percent_full(budget: int) -> None:
    lengths = mixed_lengths(4096)
    # Measured: 99.8, 99.5 and 99.5 %.
    assert sum(lengths) / (len(best_fit(lengths, budget)) * budget) >= 0.97


def test_best_fit_names_a_sample_beyond_the_budget() -> None:
    with pytest.raises(DataError, match="sample 1 has 9 tokens"):
        best_fit([3, 9], 8)


def one_part(lengths: list[int], config: DataConfig) -> BestFitSource:
    return BestFitSource([Part("one", Lengths(lengths), lengths)], config)


def test_an_epoch_holds_each_usable_sample_once() -> None:
    lengths = [*mixed_lengths(300), 3000, 0]
    source = one_part(lengths, DataConfig(tokens_per_batch=4096, window=100))
    assert source.num_usable == 300
    assert sorted(index for chosen in source.packs(0) for _, index in chosen) == list(range(300))
    assert source.packs(1) != source.packs(0)
    assert source.fullness(0) > 0.95


def test_a_part_without_any_usable_sample_is_named() -> None:
    with pytest.raises(DataError, match=r"one: no sample can train with at most 2048 tokens"):
        one_part([0, 5000], DataConfig())


def test_weights_say_how_often_an_epoch_goes_through_a_part() -> None:
    lengths = [10] * 40
    parts = [Part("half", Lengths(lengths), lengths, 0.5), Part("twice", Lengths(lengths[:7]), lengths[:7], 2.0)]
    source = BestFitSource(parts, DataConfig(tokens_per_batch=100, max_sample_tokens=50))
    halves = []
    for epoch in range(4):
        drawn = [pair for chosen in source.packs(epoch) for pair in chosen]
        assert Counter(index for part, index in drawn if part == 1) == dict.fromkeys(range(7), 2)
        halves.append({index for part, index in drawn if part == 0})
    assert [len(half) for half in halves] == [20] * 4
    # Nothing comes again before everything has come.
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(40))
    assert halves[0] != halves[2]


def test_a_sample_that_cannot_be_built_is_left_out_with_the_reason() -> None:
    class Torn(Lengths):
        def sample(self, index: int) -> Sample:
            if index % 2:
                raise ImageError("the picture is torn")
            return super().sample(index)

    source = BestFitSource([Part("torn", Torn([5] * 4), [5] * 4)], DataConfig(tokens_per_batch=64, max_sample_tokens=32))
    drawn = source.batch(0)
    assert (drawn.num_samples, drawn.num_tokens) == (2, 10)
    assert sorted(drawn.left_out) == [f"torn: sample {index}: the picture is torn" for index in (1, 3)]
    assert sorted(set(drawn.batch.ids_T.tolist())) == [0, 2, 4]
    single = BestFitSource([Part("torn", Torn([30] * 4), [30] * 4)], DataConfig(tokens_per_batch=32, max_sample_tokens=32, multiple_of=1))
    drawn_all = [single.batch(number) for number in range(4)]
    assert [drawn.num_samples for drawn in drawn_all] == [1] * 4  # the next batch takes the place of one that cannot be built
    assert sum(len(drawn.left_out) for drawn in drawn_all) >= 2
    assert _equal(single.batch(2).batch, drawn_all[2].batch)
    lost = BestFitSource([Part("torn", Torn([5] * 2), [0, 5])], DataConfig(tokens_per_batch=64, max_sample_tokens=32))
    with pytest.raises(DataError, match="no sample of 1 batches in a row"):
        lost.batch(0)


def test_a_batch_depends_on_its_number_alone() -> None:
    lengths = mixed_lengths(60)
    config = DataConfig(tokens_per_batch=4096, window=30, seed=3)
    source = one_part(lengths, config)
    forward = [source.batch(number).batch for number in range(2 * source.num_batches(0))]
    fresh = one_part(lengths, config)
    backward = [fresh.batch(number).batch for number in reversed(range(len(forward)))][::-1]
    assert all(_equal(ours, theirs) for ours, theirs in zip(forward, backward, strict=True))
    assert all(batch.ids_T.numel() % 256 == 0 for batch in forward)


def _equal(ours: PackedBatch, theirs: PackedBatch) -> bool:
    return torch.equal(ours.ids_T, theirs.ids_T) and torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
