"""A decoder layer for inference on a CPU: fewer and larger products, and one pass over memory where the plain layer makes several.

Owns: FusedLayer and JoinedLinear. The layer computes what decoder.DecoderLayer, its reference, computes, and rounds where that rounds.
Invariant: a row's bits depend on the row alone.
Legend: T tokens  D model width  N heads  K key-value heads  H head width
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llavakit.model.decoder import DecoderLayer
from llavakit.model.linear import Linear, PackedLinear
from llavakit.ops.attention import Attention
from llavakit.ops.cpu.library import Kernels, LayerWeights
from llavakit.ops.rope import Rope

__all__ = ["FusedLayer", "JoinedLinear"]


class JoinedLinear(PackedLinear):
    """Products of one input as one: their outputs stand beside one another."""

    def __init__(self, products: Mapping[str, Linear], dtype: torch.dtype) -> None:
        """Take products by their names in the layer; of several, none may be cut into slices."""
        first, *others = products.values()
        weight: Tensor = first.weight
        bias: Tensor | None = first.bias
        if others:
            weight = torch.cat([product.weight.to(dtype) for product in products.values()])
            bias = None if bias is None else torch.cat([product.bias for product in products.values()])
        super().__init__(weight.to(dtype), None if bias is None else bias.to(dtype), num_slices=first.num_slices)
        self.parts = {name: product.out_features for name, product in products.items()}
        """Outputs of each product, by its name in the layer."""


class FusedLayer(nn.Module):
    """One layer, with our kernels, in one dtype."""

    def __init__(self, layer: DecoderLayer, dtype: torch.dtype, kernels: Kernels) -> None:
        """Take a layer's weights away from it and pack them, one product after another."""
        super().__init__()
        attention = layer.self_attn
        self.layer, self.kernels = attention.layer, kernels
        self.num_heads = attention.q_proj.out_features // attention.head_dim
        self.num_kv_heads = attention.k_proj.out_features // attention.head_dim
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        # Plain tensors, which stay where they are: the kernels are told their addresses once.
        self.norms = [(norm.weight.detach().to(dtype).contiguous(), norm.eps) for norm in (before, after)]
        self.qkv = _joined(layer, dtype, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = _joined(layer, dtype, "self_attn.o_proj")
        self.gate_up = _joined(layer, dtype, "mlp.gate_proj", "mlp.up_proj")
        self.down = _joined(layer, dtype, "mlp.down_proj")
        self.is_steady = all(product.is_steady for product in (self.qkv, self.out, self.gate_up, self.down))
        self._weights = self._layer_weights(attention.head_dim)

    def forward(self, x_TD: Tensor, rope: Rope, attn: Attention) -> Tensor:
        """Return the stream after this layer, same shape and dtype."""
        kernels, weights, ((before_D, before_eps), (after_D, after_eps)) = self.kernels, self._weights, self.norms
        assert x_TD.dtype == before_D.dtype, "a fused layer computes in the dtype it was made for"
        x_TD = x_TD.contiguous()
        if weights is not None and (isinstance(self.qkv, JoinedLinear) or not self.qkv.adapting.active):
            return kernels.after_attention(weights, x_TD, attn.attend(self.layer, *kernels.before_attention(weights, x_TD, *rope)))
        x_TD, h_TD = kernels.norm(x_TD, before_D, before_eps)
        q_TNH, k_TKH, v_TKH = kernels.rotary(self.qkv(h_TD), *rope, self.num_heads, self.num_kv_heads)
        attended_TD = self.out(attn.attend(self.layer, q_TNH, k_TKH, v_TKH).flatten(-2))
        x_TD, h_TD = kernels.norm(x_TD, after_D, after_eps, attended_TD)
        return x_TD + self.down(kernels.gate_halves(self.gate_up(h_TD)))  # type: ignore[no-any-return]

    def _layer_weights(self, head_dim: int) -> LayerWeights | None:
        """Return the layer as two calls take it; None where products are cut into slices, or rows would have to be filled up."""
        products = (self.qkv, self.out, self.gate_up, self.down)
        packed = [product.slices[0] for product in products if len(product.slices) == 1]
        if len(packed) < len(products) or any(weight.num_filled > weight.num_inputs for weight in packed[:-1]):
            return None
        (before_D, before_eps), (after_D, after_eps) = self.norms
        return LayerWeights(
            *(weight.pointers() for weight in packed),
            input_norm=before_D.data_ptr(),
            inner_norm=after_D.data_ptr(),
            width=packed[0].num_inputs,
            inner=packed[-1].num_inputs,
            filled=packed[-1].num_filled,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=head_dim,
            input_eps=before_eps,
            inner_eps=after_eps,
        )


def _joined(layer: DecoderLayer, dtype: torch.dtype, *names: str) -> JoinedLinear:
    """Join products and let go of the layer's own."""
    joined = JoinedLinear({name: layer.get_submodule(name) for name in names}, dtype)  # type: ignore[misc]
    for name in names:
        parent, _, child = name.rpartition(".")
        delattr(layer.get_submodule(parent), child)
    return joined
