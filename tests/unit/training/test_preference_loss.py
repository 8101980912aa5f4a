"""The preference objective: its formulas written out, its invariances, and two ways to the reference."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llavakit.config import build_run_config, run_config_to_dict
from llavakit.errors import ConfigError, DataError
from llavakit.model.linear import Linear
from llavakit.training.preference import PreferenceBatch, pack_pairs
from llavakit.training.preference_config import CorruptionConfig, PreferenceConfig
from llavakit.training.preference_loss import AdaptersOff, PreferenceLoss
from tests.preferences import Pairs
from tests.tiny import llava

MDPO = PreferenceConfig(beta=0.1, conditional_weight=1.0, anchor_weight=1.0)


class Given:
    """A model whose sums are given, and are what gradients are asked for."""

    def __init__(self, sums: list[float]) -> None:
        self.sums_A = torch.tensor(sums, requires_grad=True)

    def logprobs_packed(self, batch: PreferenceBatch, *, dtype: torch.dtype | None = None) -> Tensor:
        return self.sums_A


class Added(nn.Module):
    """A product with something added that can be switched off, as an adapter does."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.is_on = base, True
        self.extra = nn.Parameter(torch.full((base.out_features, base.in_features), 0.01))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.base(input)
        return output + input @ self.extra.t() if self.is_on else output


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    adapters = [module for module in model.modules() if isinstance(module, Added)]
    for module in adapters:
        module.is_on = False
    try:
        yield
    finally:
        for module in adapters:
            module.is_on = True


def adapted(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("q_proj", "down_proj", "linear_1") and isinstance(child, Linear):
                setattr(module, name, Added(child))
    return model


def batch_with(references: list[tuple[float, ...]], *, spoilt: bool) -> PreferenceBatch:
    """Pack pairs 0, 1, ...: the even ones have pictures."""
    samples = [Pairs(spoilt=spoilt).sample(index) for index in range(len(references))]
    return pack_pairs([replace(sample, reference=values) for sample, values in zip(samples, references, strict=True)])


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def test_the_mdpo_terms_are_the_formula() -> None:
    """Each term written out for one pair with a picture and one without, which has no conditional term."""
    beta, (win, lose, spoilt, win2, lose2) = 0.1, (-10.0, -12.5, -11.0, -7.0, -3.0)
    ref_win, ref_lose, ref_spoilt, ref_win2, ref_lose2 = -11.0, -12.0, -10.5, -6.0, -5.0
    expected = -log_sigmoid(beta * ((win - ref_win) - (lose - ref_lose)))
    expected += -log_sigmoid(beta * ((win - ref_win) - (spoilt - ref_spoilt)))
    expected += -log_sigmoid(beta * (win - ref_win))
    expected += -log_sigmoid(beta * ((win2 - ref_win2) - (lose2 - ref_lose2))) - log_sigmoid(beta * (win2 - ref_win2))
    batch = batch_with([(ref_win, ref_lose, ref_spoilt), (ref_win2, ref_lose2)], spoilt=True)
    model = Given([win, lose, spoilt, win2, lose2])
    terms = PreferenceLoss(MDPO, "float32").loss(model, batch)
    assert float(terms.sum.detach()) == pytest.approx(expected, rel=1e-6)
    assert int(terms.weight) == 2
    # d/dw of each -log sigmoid(x) is -(1 - sigmoid(x)) times that of x.
    terms.sum.backward()
    assert model.sums_A.grad is not None
    slope = [1 - math.exp(log_sigmoid(x)) for x in (beta * 1.5, beta * 1.5, beta * 1.0)]
    assert model.sums_A.grad.tolist()[:3] == pytest.approx([-beta * sum(slope), beta * slope[0], beta * slope[1]], rel=1e-5)


def test_weights_scale_their_terms() -> None:
    batch = batch_with([(-11.0, -12.0, -10.5)], spoilt=True)
    sums = [-10.0, -12.5, -11.0]

    def value(**weights: float) -> float:
        terms = PreferenceLoss(PreferenceConfig(beta=0.1, **weights), "float32").loss(Given(sums), batch)  # type: ignore[arg-type]
        return float(terms.sum.detach())

    plain = value()
    length = int(batch.lengths_A[0])
    assert value(sft_weight=0.5) - plain == pytest.approx(0.5 * 10.0 / length, rel=1e-5)
    assert value(conditional_weight=3.0) - plain == pytest.approx(3 * (value(conditional_weight=1.0) - plain), rel=1e-5)
    assert value(anchor_weight=0.25) - plain == pytest.approx(-0.25 * log_sigmoid(0.1), rel=1e-5)


def test_metrics_count_pairs_and_sum_rewards() -> None:
    batch = batch_with([(-11.0, -12.0), (-6.0, -5.0)], spoilt=False)
    terms = PreferenceLoss(PreferenceConfig(beta=0.5), "float32").loss(Given([-10.0, -12.5, -7.0, -3.0]), batch)
    assert {name: float(value) for name, value in terms.metrics.items()} == pytest.approx(
        {"num_pairs": 2, "num_right": 1, "margin": 0.5 * (1.5 - 3.0), "chosen_reward": 0.0, "rejected_reward": 0.5 * 1.5}
    )
    assert next(iter(terms.metrics)) == "num_pairs"  # the others are shares of the first
    assert not any(value.requires_grad for value in terms.metrics.values())


@pytest.mark.parametrize(
    "config",
    [PreferenceConfig(label_smoothing=0.1, sft_weight=0.3), PreferenceConfig(loss="ipo"), MDPO],
    ids=["smoothed", "ipo", "mdpo"],
)
def test_order_and_split_into_microbatches_change_nothing(config: PreferenceConfig) -> None:
    core = adapted(llava())
    objective = PreferenceLoss(config, "float32", AdaptersOff(switched_off))
    samples = [Pairs(spoilt=config.spoils is not None).sample(index) for index in range(5)]
    results = []
    for parts in ([samples], [samples[::-1]], [samples[:1], samples[1:4], samples[4:]]):
        terms = [objective.loss(core, pack_pairs(part)) for part in parts]
        total = torch.stack([term.sum for term in terms]).sum()
        total.backward()
        grads = [weight.grad.clone() for weight in core.parameters() if weight.grad is not None]
        core.zero_grad()
        results.append((float(total.detach()), torch.cat([grad.flatten() for grad in grads]), sum(int(term.weight) for term in terms)))
    for found, gradient, weight in results[1:]:
        assert found == pytest.approx(results[0][0], rel=1e-5)
        assert float((gradient - results[0][1]).norm()) <= 1e-5 * float(results[0][1].norm())
        assert weight == 5


def test_both_ways_to_the_reference_agree() -> None:
    samples = [Pairs(spoilt=True).sample(index) for index in range(4)]
    before = llava().logprobs_packed(pack_pairs(samples)).tolist()  # the model before its adapters
    known = []
    for sample in samples:
        known.append(replace(sample, reference=tuple(before[: sample.num_answers])))
        before = before[sample.num_answers :]
    core = adapted(llava())
    toggled = PreferenceLoss(MDPO, "float32", AdaptersOff(switched_off)).loss(core, pack_pairs(samples))
    stored = PreferenceLoss(MDPO, "float32").loss(core, pack_pairs(known))
    assert float(toggled.sum.detach()) == float(stored.sum.detach())
    assert {name: float(value) for name, value in toggled.metrics.items()} == {name: float(value) for name, value in stored.metrics.items()}
    assert float(stored.metrics["margin"]) != 0.0
    weights = [core.get_parameter(name) for name in ("language_model.lm_head.weight", "multi_modal_projector.linear_1.extra")]
    assert all(map(torch.equal, torch.autograd.grad(toggled.sum, weights), torch.autograd.grad(stored.sum, weights)))


def test_an_unchanged_model_has_no_margin() -> None:
    core, samples = llava(), [Pairs().sample(index) for index in range(3)]
    sums = core.logprobs_packed(pack_pairs(samples)).view(-1, 2).tolist()
    batch = pack_pairs([replace(sample, reference=tuple(values)) for sample, values in zip(samples, sums, strict=True)])
    terms = PreferenceLoss(PreferenceConfig(), "float32").loss(core, batch)
    assert float(terms.sum.detach()) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert int(terms.metrics["num_right"]) == 0


def test_gradients_reach_projector_and_language_model_in_bfloat16() -> None:
    core = llava()
    batch = batch_with([(-90.0, -80.0), (-60.0, -50.0)], spoilt=False)
    PreferenceLoss(PreferenceConfig(), "bfloat16").loss(core, batch).sum.backward()
    for name in (
        "multi_modal_projector.linear_1.weight",
        "language_model.model.layers.0.self_attn.k_proj.weight",
        "language_model.lm_head.weight",
    ):
        grad = core.get_parameter(name).grad
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.any()


def test_missing_references_and_pictures_are_named() -> None:
    batch = pack_pairs([Pairs().sample(0)])
    with pytest.raises(DataError, match="no reference log probabilities"):
        PreferenceLoss(PreferenceConfig(), "float32").loss(Given([-1.0, -2.0]), batch)
    with pytest.raises(DataError, match="no picture of the batch was spoilt"):
        PreferenceLoss(MDPO, "float32").loss(Given([-1.0, -2.0]), batch)
    text_only = pack_pairs([replace(Pairs(pictures=False).sample(0), reference=(-1.0, -2.0))])
    assert PreferenceLoss(MDPO, "float32").loss(Given([-1.0, -2.0]), text_only).sum.isfinite()


def test_the_config_is_strict_and_survives_json() -> None:
    config = PreferenceConfig(conditional_weight=1.0, corruption=CorruptionConfig(kind="noise"))
    assert build_run_config(PreferenceConfig, run_config_to_dict(config)) == config
    assert config.spoils == config.corruption
    assert PreferenceConfig().spoils is None
    wrong: tuple[dict[str, Any], ...] = (
        {"beta": 0.0},
        {"label_smoothing": 0.5},
        {"sft_weight": -1.0},
        {"loss": "ipo", "label_smoothing": 0.1},
        {"loss": "ipo", "anchor_weight": 1.0},
        {"loss": "hinge"},
        {"corruption": {"crop_share": 0.0}},
        {"corruption": {"noise_share": 1.5}},
        {"gamma": 1.0},
    )
    for values in wrong:
        with pytest.raises(ConfigError):
            build_run_config(PreferenceConfig, values)
