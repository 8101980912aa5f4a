"""Cross entropy of a linear head: against the dense computation, in any chunk size."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.ops.loss import linear_cross_entropy

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
