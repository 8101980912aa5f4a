"""Expanding image placeholders in batches of ids."""

import pytest
import torch

from llavakit.errors import InputError
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.splice import Slots, splice

IMAGE, PER_IMAGE = 9, 3


def rows(*values: list[int]) -> torch.Tensor:
    return torch.tensor(values)


def test_ids_without_pictures_stay_the_same_objects() -> None:
    ids, mask, labels = rows([1, 2]), rows([1, 1]), rows([1, 2])
    spliced = splice(ids, mask, labels, slots=Slots(image_id=IMAGE, counts=[PER_IMAGE] * 6))
    assert torch.equal(spliced.ids_BS, ids)
    assert spliced.attention_mask is mask
    assert spliced.labels is labels


def test_both_placeholders_expand_and_shorter_rows_are_filled_up_on_the_right() -> None:
    ids = rows([1, -200, 2], [IMAGE, 5, 6], [4, 5, 6])
    spliced = splice(ids, None, ids, slots=Slots(image_id=IMAGE, counts=[PER_IMAGE] * 6))
    assert spliced.ids_BS.tolist() == [[1, 9, 9, 9, 2], [9, 9, 9, 5, 6], [4, 5, 6, 0, 0]]
    assert spliced.attention_mask is not None
    assert spliced.attention_mask.tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert spliced.labels is not None
    assert spliced.labels.tolist() == [[1, *[IGNORE] * 3, 2], [*[IGNORE] * 3, 5, 6], [4, 5, 6, IGNORE, IGNORE]]


def test_runs_that_are_expanded_already_stay() -> None:
    ids = rows([1, 9, 9, 9, 2, 9, 9, 9, 9, 9, 9])
    assert splice(ids, None, None, slots=Slots(image_id=IMAGE, counts=[PER_IMAGE] * 6)).ids_BS.tolist() == ids.tolist()


def test_placeholders_side_by_side_are_one_picture_each() -> None:
    for ids in (rows([1, -200, -200]), rows([1, IMAGE, IMAGE]), rows([1, -200, IMAGE])):
        assert splice(ids, None, None, slots=Slots(image_id=IMAGE, counts=[PER_IMAGE] * 6)).ids_BS.tolist() == [[1, *[9] * 6]]


def test_an_expanded_run_and_a_placeholder_may_share_a_row() -> None:
    spliced = splice(rows([9, 9, 9, 1, -200]), None, None, slots=Slots(image_id=IMAGE, counts=[PER_IMAGE] * 6))
    assert spliced.ids_BS.tolist() == [[9, 9, 9, 1, 9, 9, 9]]


def test_masks_widen_with_the_ids() -> None:
    spliced = splice(rows([7, -200, 2]), rows([0, 1, 1]), None, slots=Slots(image_id=IMAGE, counts=[PER_IMAGE] * 6))
    assert spliced.attention_mask is not None
    assert spliced.attention_mask.tolist() == [[0, 1, 1, 1, 1]]


def test_one_token_per_picture_needs_no_expansion() -> None:
    assert splice(rows([1, -200, 2]), None, None, slots=Slots(image_id=IMAGE, counts=[1] * 6)).ids_BS.tolist() == [[1, 9, 2]]


def test_pictures_of_different_lengths_expand_in_order_and_runs_of_several_are_recognised() -> None:
    ids = rows([1, -200, 9, 9, 9, 9, 9, 2], [IMAGE, 5, 6, 7, 7, 7, 7, 7])
    spliced = splice(ids, None, None, slots=Slots(image_id=IMAGE, counts=[2, 4, 1, 3]))
    assert spliced.ids_BS.tolist() == [[1, 9, 9, 9, 9, 9, 9, 9, 2, 0], [9, 9, 9, 5, 6, 7, 7, 7, 7, 7]]
    assert spliced.attention_mask is not None
    assert spliced.attention_mask.sum(1).tolist() == [9, 10]


def test_rows_may_be_filled_up_on_the_left() -> None:
    slots = Slots(image_id=IMAGE, counts=[3], is_left=True)
    spliced = splice(rows([1, -200], [5, 6]), None, rows([1, 1], [5, 6]), slots=slots)
    assert spliced.ids_BS.tolist() == [[1, 9, 9, 9], [0, 0, 5, 6]]
    assert spliced.attention_mask is not None
    assert spliced.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert spliced.labels is not None
    assert spliced.labels.tolist() == [[1, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 5, 6]]


def test_masks_cover_what_is_cached_and_stay_away_where_nothing_is_hidden() -> None:
    slots = Slots(image_id=IMAGE, counts=[3])
    assert splice(rows([1, -200]), None, None, slots=slots, num_past=2).attention_mask is None
    spliced = splice(rows([1, -200]), rows([0, 1, 1, 1]), None, slots=slots, num_past=2)
    assert spliced.attention_mask is not None
    assert spliced.attention_mask.tolist() == [[0, 1, 1, 1, 1, 1]]


def test_labels_of_placeholders_are_ignored_also_where_a_picture_is_one_position() -> None:
    spliced = splice(rows([1, -200, 5]), None, rows([1, -200, 5]), slots=Slots(image_id=IMAGE, counts=[1]))
    assert spliced.labels is not None
    assert spliced.labels.tolist() == [[1, IGNORE, 5]]


def test_rows_beyond_the_tokenizers_length_are_refused() -> None:
    with pytest.raises(InputError, match="4 positions with their pictures, tokenizer_model_max_length is 3"):
        splice(rows([1, -200]), None, None, slots=Slots(image_id=IMAGE, counts=[3], max_len=3))
