"""Changing a built model: fresh weights, which of them train, and what makes it ready to run.

Owns: init_weights, init_projector, freeze, resize_vocabulary, resized_rows, what changes how layers train (recompute_layers, attend_by,
compile_layers), fuse, quantize, add_lora, merge_lora and adapt; nothing else may touch a model's modules.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llavakit.errors import ConfigError
from llavakit.model.config import LlamaConfig
from llavakit.model.decoder import DecoderLayer, SwiGlu, TokenEmbedding
from llavakit.model.fused import FusedLayer, JoinedLinear
from llavakit.model.linear import Linear, PackedLinear, QuantizedLinear
from llavakit.model.llava import LlamaCore
from llavakit.model.lora import AdaptedLinear, Adapting
from llavakit.model.lora_config import LoraConfig
from llavakit.model.lora_linear import LoraLinear
from llavakit.model.projector import MultiModalProjector
from llavakit.ops.attention import Attention
from llavakit.ops.cpu.library import load_kernels
from llavakit.ops.gate import steady_gate
from llavakit.ops.quantize.weights import KINDS, quantize_nf4

__all__ = [
    "TrainableRow",
    "adapt",
    "add_lora",
    "attend_by",
    "compile_layers",
    "freeze",
    "fuse",
    "init_projector",
    "init_weights",
    "merge_lora",
    "quantize",
    "recompute_layers",
    "resize_vocabulary",
    "resized_rows",
]


@dataclass(frozen=True, slots=True)
class TrainableRow:
    """One line of the table of what trains."""

    pattern: str
    num_tensors: int
    num_parameters: int


def init_weights(model: nn.Module, std: float, generator: torch.Generator) -> None:
    """Fill all parameters in place: norms one, biases zero, everything else normal(0, std)."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.zero_()
            elif "norm" in name.rpartition(".")[0].rpartition(".")[2]:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, std, generator=generator)
        for module in model.modules():
            if isinstance(module, TokenEmbedding):
                module.zero_pad_row()


def init_projector(projector: MultiModalProjector, generator: torch.Generator) -> None:
    """Fill a projector as original LLaVA does, which leaves its layers as torch.nn.Linear draws them, in the same order."""
    with torch.no_grad():
        for layer in projector.children():
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def freeze(model: nn.Module, trainable: Sequence[str]) -> list[TrainableRow]:
    """Let only parameters train whose name matches one of the patterns (shell wildcards).

    Returns a row per pattern. Raises: ConfigError when a pattern matches nothing, or parts of a packed weight, which cannot train.
    """
    parameters = dict(model.named_parameters())
    rows = []
    for pattern in trainable:
        matched = [weight for name, weight in parameters.items() if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"no parameter matches {pattern!r}; names look like {next(iter(parameters))!r}")
        if packed := [name for name, weight in parameters.items() if fnmatch.fnmatchcase(name, pattern) and not weight.is_floating_point()]:
            raise ConfigError(f"{pattern!r} matches {packed[0]!r}, packed codes that cannot train; '*.lora_?' are the factors beside them")
        rows.append(TrainableRow(pattern, len(matched), sum(weight.numel() for weight in matched)))
    for name, weight in parameters.items():
        weight.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in trainable))
    return rows


def recompute_layers(model: nn.Module) -> None:
    """Let each decoder layer keep its input alone, and be computed again in the backward pass: memory for a third more arithmetic."""
    for layer in [module for module in model.modules() if isinstance(module, DecoderLayer)]:
        # The module itself stays in place, so that no parameter's name changes.
        setattr(layer, "forward", functools.partial(checkpoint, layer.forward, use_reentrant=False))  # noqa: B010 - a method


def attend_by(model: nn.Module, context: Callable[[Tensor, int | None], Attention]) -> None:
    """Let a language model attend by another context where it trains."""
    for module in model.modules():
        if isinstance(module, LlamaCore):
            module.training_attention = context


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile each decoder layer for any number of tokens; they attend by a context that is an operator (ops/segmented)."""
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            module.compile(backend=backend, dynamic=True, fullgraph=True)


def fuse(model: nn.Module, dtype: torch.dtype) -> bool:
    """Make a model on the CPU one for inference in dtype alone: faster, and each row's result the same in any company.

    Products are cast and packed one after another (those of one input together) and the weights they had are let go, so that memory holds
    what is being packed three times at most; the model can neither train nor be saved afterwards. Layers become fused ones where the
    kernels can do that. Returns whether the promise about company holds for every product.
    """
    steady: list[bool] = []
    kernels = load_kernels() if dtype in (torch.float32, torch.bfloat16) else None

    def fused(_: str, layer: DecoderLayer) -> nn.Module:
        if kernels is None or any(isinstance(module, QuantizedLinear | LoraLinear) for module in layer.modules()):
            return layer
        made = FusedLayer(layer, dtype, kernels)
        steady.append(made.is_steady)
        return made

    def packed(_: str, child: Linear) -> PackedLinear:
        product = PackedLinear(child.weight.to(dtype), None if child.bias is None else child.bias.to(dtype), num_slices=child.num_slices)
        steady.append(product.is_steady)
        return product

    _replace(model, (DecoderLayer,), fused)
    _replace(model, (Linear,), packed)
    for module in model.modules():
        if isinstance(module, SwiGlu):
            module.gate = steady_gate
    return all(steady)


def quantize(model: nn.Module, kind: str, device: torch.device, *, has_double_scales: bool = False) -> None:
    """Store the products of a decoder's layers as small integers ("int8" or "nf4") on a device, one after another, and move the rest there.

    Tower, projector, embedding and head keep their dtype, and the config stays as it is. The products are frozen from then on: what trains
    stands beside them (add_lora). has_double_scales stores the scales of nf4 in 8 bits, as QLoRA does. Raises: ConfigError.
    """
    if kind not in KINDS or (has_double_scales and kind != "nf4"):
        raise ConfigError(f"products are stored as {' or '.join(KINDS)}, with double scales as nf4; got {kind!r}, {has_double_scales=}")
    pack = functools.partial(quantize_nf4, is_double=True) if has_double_scales else KINDS[kind]

    def quantized(_: str, child: Linear) -> QuantizedLinear:
        bias = None if child.bias is None else child.bias.detach().to(device)
        return QuantizedLinear(pack(child.weight.detach().to(device)), bias)

    for layer in [module for module in model.modules() if isinstance(module, DecoderLayer)]:
        _replace(layer, (Linear,), quantized)
    model.to(device)


def add_lora(model: nn.Module, config: LoraConfig, generator: torch.Generator) -> list[str]:
    """Put trainable factors beside each product that config.targets match, freezing its weight, and return the products' paths.

    freeze sees them as PATH.lora_A and PATH.lora_B, and the weight as PATH.base.weight; a head is no target, since losses read its weight
    and not its product. Raises: ConfigError, before anything is changed, when a target matches nothing, or anything but a loaded product.
    """
    modules = dict(model.named_modules())
    paths: dict[str, None] = {}
    for target in config.targets:
        matched = [path for path in modules if fnmatch.fnmatchcase(path, target)]
        if not matched:
            raise ConfigError(f"no module matches lora.targets {target!r}; names look like {_some_product(modules)!r}")
        for path in matched:
            if not isinstance(modules[path], Linear | QuantizedLinear) or path.rpartition(".")[2] == "lm_head":
                kind = type(modules[path]).__name__
                raise ConfigError(f"lora.targets {target!r} matches {path!r}, a {kind}; only products other than the head get factors")
            if next(modules[path].parameters()).is_meta:
                raise ConfigError(f"{path!r} has no weight yet; load the model before factors are added")
        paths |= dict.fromkeys(matched)
    for path in (path for path in modules if path in paths):
        model.set_submodule(path, LoraLinear(modules[path], config, generator))
    return [path for path in modules if path in paths]


def merge_lora(model: nn.Module) -> None:
    """Put back the products that add_lora changed, with the factors in their weights; they stay frozen. Raises: ConfigError.

    Packed weights cannot take them.
    """
    adapted = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear)]
    if packed := [path for path, module in adapted if isinstance(module.base, QuantizedLinear)]:
        raise ConfigError(f"{packed[0]!r} is packed and cannot take factors; save them as an adapter, and merge it into the dense model")

    def merged(_: str, child: LoraLinear) -> nn.Module:
        child.base.weight = nn.Parameter(child.merged_weight(), requires_grad=False)
        return child.base

    _replace(model, (LoraLinear,), merged)


def _some_product(modules: Mapping[str, nn.Module]) -> str:
    return next((path for path, module in modules.items() if isinstance(module, Linear | QuantizedLinear)), "")


def adapt(model: nn.Module) -> Adapting:
    """Make place for adapters beside every product but the head, whose rows are others; fuse comes before it."""
    adapting = Adapting()

    def adapted(path: str, child: Linear | PackedLinear | QuantizedLinear) -> nn.Module:
        if path.rpartition(".")[2] == "lm_head":
            return child
        if isinstance(child, JoinedLinear):
            layer = path.rpartition(".")[0]
            return AdaptedLinear(child, {f"{layer}.{name}": num_outputs for name, num_outputs in child.parts.items()}, adapting)
        return AdaptedLinear(child, {path: child.out_features}, adapting)

    _replace(model, (Linear, PackedLinear, QuantizedLinear), adapted)
    return adapting


def _replace(model: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[str, Any], nn.Module]) -> None:
    """Put what make returns for a path and a module in the place of every module of these kinds, and keep none of the old ones alive."""
    parents = [(path, module) for path, module in model.named_modules() if any(isinstance(child, kinds) for child in module.children())]
    for path, parent in parents:
        for name in [name for name, child in parent.named_children() if isinstance(child, kinds)]:
            setattr(parent, name, make(f"{path}.{name}" if path else name, getattr(parent, name)))


def resize_vocabulary(embedding: TokenEmbedding, head: nn.Linear | None, config: LlamaConfig, num_tokens: int) -> None:
    """Give embedding and head num_tokens rows, keeping the old ones bit for bit, and write vocab_size.

    New rows are the mean of the old ones, so that new tokens are neither likely nor unlikely; the row that is or becomes the config's
    pad_token_id is zero in the embedding. A head that shares the embedding's weight goes on sharing it.
    Raises: ConfigError when num_tokens is not positive.
    """
    if num_tokens < 1:
        raise ConfigError(f"an embedding needs at least one row, got {num_tokens}")
    num_old = embedding.num_embeddings
    is_tied = head is not None and head.weight is embedding.weight
    if num_tokens != num_old:
        embedding.weight = _with_rows(embedding.weight, num_tokens)
        embedding.num_embeddings = num_tokens
        if head is not None:
            head.weight = embedding.weight if is_tied else _with_rows(head.weight, num_tokens)
            head.out_features = num_tokens
        config.restructure(vocab_size=num_tokens)
        embedding.fresh_rows = {row for row in embedding.fresh_rows if row < num_tokens} | set(range(num_old, num_tokens))


def resized_rows(table_VD: Tensor, num_rows: int) -> Tensor:
    """Cut a table, or extend it by copies of its mean row, into memory of its own."""
    rows = table_VD[:num_rows]
    if num_rows > rows.shape[0]:
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        return torch.cat((rows, mean.expand(num_rows - rows.shape[0], -1)))
    return rows.clone()


def _with_rows(weight: Tensor, num_rows: int) -> nn.Parameter:
    return nn.Parameter(resized_rows(weight.detach(), num_rows), requires_grad=weight.requires_grad)
