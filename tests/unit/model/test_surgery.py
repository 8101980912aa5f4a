"""Fresh weights and freezing."""

import pytest
import torch

from llavakit.errors import ConfigError
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.surgery import freeze, init_weights
from tests.tiny import llama_config, llava_config


def filled(seed: int) -> LlavaCore:
    core = LlavaCore(llava_config())
    init_weights(core, 0.02, torch.Generator().manual_seed(seed))
    return core


def test_fresh_weights_have_their_spread_and_depend_on_the_seed_alone() -> None:
    one, twin, other = dict(filled(1).named_parameters()), dict(filled(1).named_parameters()), dict(filled(2).named_parameters())
    for name, weight in one.items():
        assert torch.equal(weight, twin[name])
        if name.endswith(".bias"):
            assert not weight.any()
        elif "norm" in name.rsplit(".", 2)[-2]:
            assert bool((weight == 1).all())
        else:
            assert 0.012 < float(weight.detach().std()) < 0.028  # at least 32 draws each
            assert not torch.equal(weight, other[name])


def test_the_padding_row_starts_at_zero() -> None:
    config = llama_config()
    config.pad_token_id = 9
    core = LlamaCore(config)
    init_weights(core, 0.02, torch.Generator().manual_seed(0))
    assert not core.model.embed_tokens.weight[9].any()
    assert core.model.embed_tokens.weight[8].any()


def test_freeze_lets_exactly_the_matches_train_and_counts_them() -> None:
    core = filled(0)
    rows = freeze(core, ("multi_modal_projector.*", "*.embed_tokens.weight"))
    training = {name for name, weight in core.named_parameters() if weight.requires_grad}
    assert training == {
        "language_model.model.embed_tokens.weight",
        *(f"multi_modal_projector.linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")),
    }
    assert [(row.pattern, row.num_tensors) for row in rows] == [("multi_modal_projector.*", 4), ("*.embed_tokens.weight", 1)]
    assert rows[1].num_parameters == 384 * 64


def test_freezing_twice_forgets_the_first_time() -> None:
    core = filled(0)
    freeze(core, ("multi_modal_projector.*",))
    freeze(core, ("*",))
    assert all(weight.requires_grad for weight in core.parameters())


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter matches 'mm_projector"):
        freeze(filled(0), ("mm_projector.*",))
