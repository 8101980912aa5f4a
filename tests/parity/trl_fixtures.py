"""Make trl_dpo.json and trl_dpo.safetensors: what TRL computes for fixed pairs on a tiny random Llama. Never run by the tests.

It needs an environment of its own: pip install torch==2.13.0 trl==1.16.0 transformers==5.24.0, then
python -m tests.parity.trl_fixtures (from the root). TRL's "sigmoid" has no label smoothing any more; its "aot" with one pair a batch
is the same formula, since sorting one value does nothing.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
VOCAB = 48
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"], "beta": 0.1},
    "sigmoid-strong": {"loss_type": ["sigmoid"], "beta": 0.7},
    "ipo": {"loss_type": ["ipo"], "beta": 0.25},
    "smoothed": {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2},
    "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def build(seed: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 1.0 if weight.shape[0] == VOCAB else weight.shape[1] ** -0.5, generator=generator)
    return model


def draw_pairs(count: int) -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    lengths = [(rng.randint(2, 9), rng.randint(1, 7), rng.randint(1, 7)) for _ in range(count)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: [rng.randrange(3, VOCAB) for _ in range(length)] for name, length in zip(names, row, strict=True)} for row in lengths]


def build_trainer(policy: LlamaForCausalLM, reference: LlamaForCausalLM, case: dict[str, Any], folder: str) -> DPOTrainer:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w0")
    rows = Dataset.from_list([{"prompt": "w3", "chosen": " w4", "rejected": " w5"}] * 2)  # the pairs are collated by hand
    args = DPOConfig(folder, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, **case)
    return DPOTrainer(policy, reference, args=args, train_dataset=rows, processing_class=tokenizer)


def run(case: dict[str, Any], pairs: list[dict[str, list[int]]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Compute each pair as a batch of its own; gradients are those of the mean loss."""
    policy, reference = build(1), build(2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(policy, reference, case, folder)
        losses = []
        for pair in pairs:
            loss = trainer.compute_loss(trainer.model, trainer.data_collator([pair]))
            (loss / len(pairs)).backward()
            losses.append(loss.item())
        metrics = {name: list(trainer._metrics["train"][name]) for name in METRICS}
    grads = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    return {"case": case, "losses": losses, "metrics": metrics, "grad_norm": norm}, grads


def main() -> None:
    pairs = draw_pairs(6)
    results: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, case in CASES.items():
        results[name], grads = run(case, pairs)
        if name in ("sigmoid-strong", "ipo"):
            tensors |= {f"{name}/{weight}": grad for weight, grad in grads.items()}
    for part, seed in (("policy", 1), ("reference", 2)):
        tensors |= {f"{part}/{name}": weight.detach().clone() for name, weight in build(seed).named_parameters()}
    save_file(tensors, HERE / "trl_dpo.safetensors")
    values = {"config": CONFIG, "pairs": pairs, "results": results}
    (HERE / "trl_dpo.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
