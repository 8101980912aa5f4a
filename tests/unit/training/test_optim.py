"""Optimisers: groups, schedules, clipping."""

import pytest
import torch
from torch.nn import Parameter

from llavakit.errors import ConfigError
from llavakit.training.adam import HalfStateAdamW, rounded_by_chance
from llavakit.training.config import GroupConfig, OptimConfig
from llavakit.training.muon import Muon, orthogonalize
from llavakit.training.optim import build_optimizers, clip_gradients, lr_scale, plan_groups, set_lr
from tests.toy_run import toy_core


def test_only_matrices_decay() -> None:
    parameters = dict(toy_core().named_parameters())
    (adamw,) = build_optimizers(parameters, OptimConfig(lr=0.1, weight_decay=0.3))
    by_decay = {group["weight_decay"]: group["params"] for group in adamw.param_groups}
    assert {weight.dim() for weight in by_decay[0.3]} == {2}
    assert {weight.dim() for weight in by_decay[0.0]} == {1}
    assert sum(map(len, by_decay.values())) == len(parameters)


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest() -> None:
    parameters = dict(toy_core().named_parameters())
    adamw, muon = build_optimizers(parameters, OptimConfig(lr=0.1, name="muon"))
    inner = {id(weight) for group in muon.param_groups for weight in group["params"]}
    assert inner == {id(weight) for name, weight in parameters.items() if ".layers." in name and weight.dim() == 2}
    rest = {id(weight) for group in adamw.param_groups for weight in group["params"]}
    assert inner | rest == {id(weight) for weight in parameters.values()}
    assert not inner & rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_updates_as_torchs_own_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 24), (16, 16))]
    ours, theirs = [Parameter(weight.clone()) for weight in start], [Parameter(weight.clone()) for weight in start]
    muon = Muon(ours, lr=0.1, weight_decay=0.2, dtype=dtype)
    oracle = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        muon.step()
        oracle.step()
    # An update's entries are up to 0.1 * 0.2 * sqrt(24) * 1.2 = 0.12; torch's iteration rounds each product to bfloat16 (2^-8).
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=6e-3)


def test_orthogonalized_singular_values_lie_around_one() -> None:
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    torch.testing.assert_close(orthogonalize(x.mT), orthogonalize(x).mT)


def test_muon_leaves_parameters_without_a_gradient_alone() -> None:
    weight = Parameter(torch.ones(2, 2))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_schedules_at_their_corners() -> None:
    cosine = OptimConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    assert [lr_scale(cosine, step, 110) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert lr_scale(cosine, 60, 110) == pytest.approx(0.55)
    wsd = OptimConfig(lr=1.0, schedule="wsd", decay_share=0.2)
    assert [lr_scale(wsd, step, 100) for step in (0, 80, 90, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.05])
    assert lr_scale(OptimConfig(lr=1.0, schedule="constant"), 99, 100) == 1.0


def test_the_rate_reaches_all_groups() -> None:
    optimizers = build_optimizers(dict(toy_core().named_parameters()), OptimConfig(lr=0.1, name="muon"))
    set_lr(optimizers, 0.25)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.025}


def test_groups_have_rates_and_decays_of_their_own() -> None:
    parameters = dict(toy_core().named_parameters())
    config = OptimConfig(
        lr=0.1, weight_decay=0.3, groups=(GroupConfig(pattern="*mlp*", lr=0.02), GroupConfig(pattern="lm_head*", lr=0.5, weight_decay=0.0))
    )
    planned = plan_groups(parameters, config)
    assert sorted(name for group in planned for name in group.names) == sorted(parameters)
    by_name = {name: (group.lr, group.weight_decay) for group in planned for name in group.names}
    assert by_name["model.layers.0.mlp.up_proj.weight"] == (0.02, 0.3)
    assert by_name["lm_head.weight"] == (0.5, 0.0)
    assert by_name["model.norm.weight"] == (0.1, 0.0)
    optimizers = build_optimizers(parameters, config)
    set_lr(optimizers, 0.5)
    assert {group["lr"] for group in optimizers[0].param_groups} == {0.01, 0.05, 0.25}


def test_a_group_that_nothing_is_left_for_is_named() -> None:
    config = OptimConfig(lr=0.1, groups=(GroupConfig(pattern="*", lr=0.2), GroupConfig(pattern="lm_head*", lr=0.5)))
    with pytest.raises(ConfigError, match=r"lm_head\*"):
        plan_groups(dict(toy_core().named_parameters()), config)


def test_states_in_bfloat16_follow_torchs_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 32, generator=generator)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    half = HalfStateAdamW([ours], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    oracle = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(200):
        grad = theirs.detach() + torch.randn(64, 32, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        half.step()
        oracle.step()
    assert {value.dtype for name, value in half.state[ours].items() if name != "step"} == {torch.bfloat16}
    # The second moment moves by a thousandth a step, which rounding to the nearest would lose: it is followed to a hundredth.
    theirs_sq, ours_sq = oracle.state[theirs]["exp_avg_sq"], half.state[ours]["exp_avg_sq"].float()
    assert ((ours_sq - theirs_sq).mean() / theirs_sq.mean()).abs() < 0.01
    assert (ours - theirs).norm() / (start - theirs).norm() < 0.02


def test_rounding_by_chance_keeps_the_mean_and_is_the_same_again() -> None:
    values = torch.full((100_000,), 1.001)
    rounded = rounded_by_chance(values, torch.Generator().manual_seed(1))
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert abs(float(rounded.double().mean()) - 1.001) < 1e-4
    assert torch.equal(rounded, rounded_by_chance(values, torch.Generator().manual_seed(1)))


def test_clipping_returns_the_norm_from_before() -> None:
    weight = Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    clip_gradients([weight], 1.0)
    assert weight.grad.norm().item() == pytest.approx(1.0, abs=1e-5)
