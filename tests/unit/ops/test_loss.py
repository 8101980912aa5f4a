"""Cross entropy and log probabilities of a linear head: against the dense computation, in any chunk size."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.loss import linear_cross_entropy, linear_logprobs, sums_by_length

ROWS, WIDTH, VOCAB = 37, 16, 50


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_MD = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    return h_MD, weight_VD, torch.randint(0, VOCAB, (ROWS,), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000])
def test_loss_and_gradients_equal_the_dense_ones(chunk_rows: int) -> None:
    h_MD, weight_VD, labels_M = given()
    dense = F.cross_entropy(h_MD @ weight_VD.t(), labels_M, reduction="sum")
    expected = torch.autograd.grad(3 * dense, (h_MD, weight_VD))
    loss, num_right = linear_cross_entropy(h_MD, weight_VD, labels_M, chunk_rows=chunk_rows)
    found = torch.autograd.grad(3 * loss, (h_MD, weight_VD))
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(found, expected)
    assert int(num_right) == int(((h_MD @ weight_VD.t()).argmax(-1) == labels_M).sum())


def test_half_precision_keeps_the_loss_in_float32_and_the_weights_dtype() -> None:
    h_MD, weight_VD, labels_M = given()
    loss, _ = linear_cross_entropy(h_MD.bfloat16(), weight_VD, labels_M)
    loss.backward()
    assert loss.dtype == torch.float32
    assert weight_VD.grad is not None
    assert weight_VD.grad.dtype == torch.float32
    dense = F.cross_entropy(h_MD @ weight_VD.t(), labels_M, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(dense.detach()), rel=0.02)


def test_a_frozen_head_gets_no_gradient() -> None:
    h_MD, weight_VD, labels_M = given()
    loss, _ = linear_cross_entropy(h_MD, weight_VD.detach(), labels_M)
    loss.backward()
    assert h_MD.grad is not None
    assert weight_VD.grad is None


def test_no_rows_give_a_zero_that_can_be_differentiated() -> None:
    h_MD, weight_VD, labels_M = given()
    loss, num_right = linear_cross_entropy(h_MD[:0], weight_VD, labels_M[:0])
    loss.backward()
    assert (float(loss.detach()), int(num_right)) == (0.0, 0)
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()


def test_large_logits_do_not_overflow() -> None:
    h_MD, weight_VD, labels_M = given()
    loss, _ = linear_cross_entropy(h_MD * 1e4, weight_VD, labels_M)
    assert loss.isfinite()


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000])
def test_log_probabilities_and_gradients_equal_the_dense_ones(chunk_rows: int) -> None:
    h_MD, weight_VD, labels_M = given()
    weights_M = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    dense_M = -F.cross_entropy(h_MD @ weight_VD.t(), labels_M, reduction="none")
    expected = torch.autograd.grad(dense_M @ weights_M, (h_MD, weight_VD))
    found_M = linear_logprobs(h_MD, weight_VD, labels_M, chunk_rows=chunk_rows)
    found = torch.autograd.grad(found_M @ weights_M, (h_MD, weight_VD))
    torch.testing.assert_close(found_M, dense_M)
    torch.testing.assert_close(found, expected)


def test_log_probabilities_add_up_to_the_cross_entropy_in_half_precision_too() -> None:
    h_MD, weight_VD, labels_M = given()
    half_MD = h_MD.bfloat16()
    loss, _ = linear_cross_entropy(half_MD, weight_VD, labels_M)
    total = -linear_logprobs(half_MD, weight_VD, labels_M).sum()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, loss)
    # The same bfloat16 products of the same gradients.
    expected, found = (torch.autograd.grad(value, (h_MD, weight_VD), retain_graph=True) for value in (loss, total))
    torch.testing.assert_close(found, expected)


def test_log_probabilities_differentiate_only_what_asks_for_it() -> None:
    h_MD, weight_VD, labels_M = given()
    linear_logprobs(h_MD.detach(), weight_VD, labels_M).sum().backward()
    assert weight_VD.grad is not None
    linear_logprobs(h_MD, weight_VD.detach(), labels_M).sum().backward()
    assert h_MD.grad is not None
    assert linear_logprobs(h_MD[:0], weight_VD, labels_M[:0]).shape == (0,)


def test_sums_follow_the_lengths() -> None:
    values_M = torch.arange(1.0, 7.0, requires_grad=True)
    sums_A = sums_by_length(values_M, torch.tensor([2, 0, 3, 1]))
    assert sums_A.tolist() == [3.0, 0.0, 12.0, 6.0]
    assert torch.autograd.grad(sums_A @ torch.tensor([1.0, 2.0, 3.0, 4.0]), values_M)[0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0, 4.0]
