"""DPO against TRL's trainer on the same tiny Llama and pairs: losses, rewards, gradients. trl_fixtures.py made what it computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llavakit.model.config import LlamaConfig
from llavakit.model.llava import LlamaCore
from llavakit.training.preference import Answered, PreferenceSample, pack_pairs
from llavakit.training.preference_config import PreferenceConfig
from llavakit.training.preference_loss import PreferenceLoss
from tests.toy_run import NO_TILES

HERE = Path(__file__).parent
FIXTURES: dict[str, Any] = json.loads((HERE / "trl_dpo.json").read_text("utf-8"))
TENSORS = load_file(HERE / "trl_dpo.safetensors")
# Measured: losses differ by 3e-6 at most (of 175), gradients by 2e-7 of their norm.
TOLERANCE = 1e-5


class Other:
    """The reference of the fixtures: another model."""

    def logprobs(self, model: Any, batch: Any, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return build("reference").logprobs_packed(batch, dtype=dtype)


def build(part: str) -> LlamaCore:
    core = LlamaCore(LlamaConfig(**FIXTURES["config"]))
    core.load_state_dict(stored(part))
    return core


def stored(part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in TENSORS.items() if name.startswith(f"{part}/")}


def pairs() -> list[PreferenceSample]:
    return [_pair(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]) for pair in FIXTURES["pairs"]]


def _pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> PreferenceSample:
    preferred, other = (Answered((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer)) for answer in (chosen, rejected))
    return PreferenceSample(preferred, other, NO_TILES, ())


def config(case: dict[str, Any]) -> PreferenceConfig:
    return PreferenceConfig(
        loss="ipo" if "ipo" in case["loss_type"] else "sigmoid",
        beta=case["beta"],
        label_smoothing=case.get("label_smoothing", 0.0),
        sft_weight=case["loss_weights"][1] if "sft" in case["loss_type"] else 0.0,
    )


@pytest.mark.parametrize("name", FIXTURES["results"])
def test_losses_rewards_and_gradients_equal_trl(name: str) -> None:
    expected, core = FIXTURES["results"][name], build("policy")
    objective = PreferenceLoss(config(expected["case"]), "float32", Other())
    each = [objective.loss(core, pack_pairs([pair])) for pair in pairs()]
    assert [float(terms.sum.detach()) for terms in each] == pytest.approx(expected["losses"], rel=TOLERANCE, abs=TOLERANCE)
    metrics = {"chosen_reward": "chosen", "rejected_reward": "rejected", "margin": "margins", "num_right": "accuracies"}
    for ours, theirs in metrics.items():
        found = [float(terms.metrics[ours]) for terms in each]
        assert found == pytest.approx(expected["metrics"][f"rewards/{theirs}"], rel=TOLERANCE, abs=TOLERANCE)
    terms = objective.loss(core, pack_pairs(pairs()))
    (terms.sum / terms.weight).backward()
    assert float(terms.sum.detach()) == pytest.approx(sum(expected["losses"]), rel=TOLERANCE)
    grads = {weight: parameter.grad for weight, parameter in core.named_parameters() if parameter.grad is not None}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert float(norm) == pytest.approx(expected["grad_norm"], rel=TOLERANCE)
    for weight, gradient in stored(name).items():
        assert float((grads[weight] - gradient).norm()) <= TOLERANCE * float(norm), weight


def test_summed_log_probabilities_equal_trl() -> None:
    sums_P2 = build("policy").logprobs_packed(pack_pairs(pairs())).detach().view(-1, 2)
    expected = FIXTURES["results"]["sigmoid"]["metrics"]
    assert sums_P2[:, 0].tolist() == pytest.approx(expected["logps/chosen"], rel=TOLERANCE)
    assert sums_P2[:, 1].tolist() == pytest.approx(expected["logps/rejected"], rel=TOLERANCE)
