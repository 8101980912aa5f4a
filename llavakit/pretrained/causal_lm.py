"""LlamaModel, LlamaForCausalLM and LlavaLlamaForCausalLM: the classes that people know.

Owns: their forward. Everything else is the packed core (model/), the attention context (dense), the loop (engine).
forward takes and returns [B, S] tensors and equals transformers' eager path at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from llavakit.errors import InputError
from llavakit.model.config import ForwardConfig, LlamaConfig
from llavakit.model.decoder import LlamaDecoder
from llavakit.model.llava import LlamaCore, LlavaCore, check_ids
from llavakit.model.llava_config import LlavaConfig
from llavakit.ops.loss import IGNORE
from llavakit.pretrained.dense import DenseInput, DenseResult, run_dense
from llavakit.pretrained.files import PretrainedFiles
from llavakit.pretrained.generation import Generation
from llavakit.pretrained.inputs import Batch, check_batch, num_cached
from llavakit.pretrained.outputs import BaseModelOutputWithPast, Cache, CausalLMOutputWithPast
from llavakit.pretrained.pictures import gather
from llavakit.pretrained.resizing import ResizableVocabulary
from llavakit.pretrained.splice import Slots, has_images, splice

__all__ = ["LlamaForCausalLM", "LlamaModel", "LlavaLlamaForCausalLM"]


class LlamaModel(PretrainedFiles, ResizableVocabulary, LlamaDecoder):
    """The decoder without a head; a LlavaConfig stands for its language model."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig | LlavaConfig) -> None:
        config.validate()
        config = config.get_text_config()
        super().__init__(config)
        self.config = config
        config.mark_built()
        self.init_if_real()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run [B, S] ids or [B, S, D] embeddings. Raises: InputError for what does not fit, before anything is computed."""
        batch = Batch(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past_key_values,
        )
        check_batch(batch, self.config)
        given = _given(batch, self.config, self._embed, _recorded(self.config, output_attentions, output_hidden_states))
        result = run_dense(self.forward_packed, given)
        output = BaseModelOutputWithPast(
            last_hidden_state=result.h_BSD,
            past_key_values=_kept(result, use_cache, self.config.use_cache),
            hidden_states=result.hidden_states,
            attentions=result.attentions,
        )
        return output if _flag(return_dict, self.config.return_dict) else output.to_tuple()

    def _embed(self, ids_BS: Tensor) -> Tensor:
        check_ids(ids_BS, self.config.vocab_size)
        x_BSD: Tensor = self.embed_tokens(ids_BS)
        return x_BSD


class LlamaForCausalLM(PretrainedFiles, ResizableVocabulary, Generation, LlamaCore):
    """A Llama language model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.init_if_real()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run [B, S] ids or [B, S, D] embeddings; labels are compared with the next position's logits, -100 ignored.

        Raises: InputError for what does not fit, before anything is computed.
        """
        batch = Batch(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past_key_values,
            labels=labels,
        )
        check_batch(batch, self.config)
        given = _given(batch, self.config, self.embed, _recorded(self.config, output_attentions, output_hidden_states))
        output = _causal_output(self, given, labels, _flag(use_cache, self.config.use_cache))
        return output if _flag(return_dict, self.config.return_dict) else output.to_tuple()


class LlavaLlamaForCausalLM(PretrainedFiles, ResizableVocabulary, Generation, LlavaCore):
    """LLaVA: pictures and text in, text out."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.init_if_real()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run [B, S] ids with the pictures that their image ids stand for, in order over the whole batch.

        images (pixel_values is the same) is [N, 3, side, side]; for the forms of v1.6, and image_sizes, see pictures.gather. An image
        id standing alone (-200 or config.image_token_index) is expanded to all features of its picture, and the outputs are longer
        accordingly; a full run keeps its length.
        Raises: InputError when ids and pictures do not fit, and for whatever else does not.
        """
        num_past = num_cached(past_key_values)
        pictures = gather(self.config, images=images, pixel_values=pixel_values, image_sizes=image_sizes)
        if input_ids is not None and num_past and input_ids.shape[-1] == 1 and not has_images(input_ids, self.config):
            pictures = None  # a cached step: original LLaVA hands its pictures on at every one
        if pictures is not None and input_ids is None:
            raise InputError("pictures go where input_ids have image ids; inputs_embeds hold their features already")
        if input_ids is not None and pictures is not None:
            slots = Slots.of(self.config, pictures.counts)
            spliced = splice(input_ids, attention_mask, labels, slots=slots, num_past=num_past)
            input_ids, attention_mask, labels = spliced.ids_BS, spliced.attention_mask, spliced.labels
        batch = Batch(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past_key_values,
            labels=labels,
        )
        check_batch(batch, self.text_config)
        features_FD = None if pictures is None else self.encode_images(pictures.tiles_N3SS, pictures.grids)

        def embed(ids_BS: Tensor) -> Tensor:
            x_BSD: Tensor = self.embed(ids_BS.flatten(), features_FD).unflatten(0, ids_BS.shape)
            return x_BSD

        given = _given(batch, self.text_config, embed, _recorded(self.config, output_attentions, output_hidden_states))
        output = _causal_output(self, given, labels, _flag(use_cache, self.config.text_config.use_cache))
        return output if _flag(return_dict, self.config.return_dict) else output.to_tuple()


def _recorded(config: ForwardConfig, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
    """Say whether attentions and hidden states are kept: as the call says, else as the config does."""
    return _flag(output_attentions, config.output_attentions), _flag(output_hidden_states, config.output_hidden_states)


def _given(batch: Batch, config: LlamaConfig, embed: Callable[[Tensor], Tensor], recorded: tuple[bool, bool]) -> DenseInput:
    x_BSD = batch.inputs_embeds if batch.input_ids is None else embed(batch.input_ids)
    assert x_BSD is not None  # check_batch has seen one of the two
    return DenseInput(
        x_BSD=x_BSD,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        past=batch.past,
        window=config.window,
        record_attentions=recorded[0],
        record_hidden=recorded[1],
    )


def _causal_output(core: LlamaCore | LlavaCore, given: DenseInput, labels: Tensor | None, keep_cache: bool) -> CausalLMOutputWithPast:
    result = run_dense(core.forward_packed, given)
    logits = core.logits(result.h_BSD)
    loss = None
    if labels is not None:
        shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten().long()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), shifted, ignore_index=IGNORE)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=result.cache if keep_cache else None,
        hidden_states=result.hidden_states,
        attentions=result.attentions,
    )


def _flag(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _kept(result: DenseResult, asked: bool | None, default: bool) -> Cache | None:
    return result.cache if _flag(asked, default) else None
