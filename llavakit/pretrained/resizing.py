"""The vocabulary of the public classes: embeddings, head, and their number of rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from llavakit.errors import InputError
from llavakit.model.decoder import LlamaDecoder, TokenEmbedding
from llavakit.model.llava import LlamaCore, LlavaCore
from llavakit.model.surgery import resize_vocabulary

__all__ = ["ResizableVocabulary"]


class ResizableVocabulary(nn.Module):
    """Access to the token embedding and the head of a class that is a core or a decoder."""

    config: Any

    def get_input_embeddings(self) -> TokenEmbedding:
        """Return the table of token embeddings."""
        return self._decoder().embed_tokens

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the head, or None for a bare decoder."""
        match self:
            case LlavaCore():
                return self.language_model.lm_head
            case LlamaCore():
                return self.lm_head
        return None

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None) -> TokenEmbedding:
        """Give embedding and head new_num_tokens rows (None: as many as now), rounded up to a multiple; returns the embedding.

        Old rows keep their bits, new ones are the mean of the old, the padding row is zero; config.vocab_size follows.
        Raises: InputError for a number below 1; ConfigError as resize_vocabulary.
        """
        embedding, text = self.get_input_embeddings(), self.config.get_text_config()
        wanted = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if wanted < 1 or (pad_to_multiple_of is not None and pad_to_multiple_of < 1):
            raise InputError(f"new_num_tokens and pad_to_multiple_of must be at least 1, got {new_num_tokens} and {pad_to_multiple_of}")
        wanted += -wanted % (pad_to_multiple_of or 1)
        resize_vocabulary(embedding, self.get_output_embeddings(), text, wanted)
        if text is not self.config and "vocab_size" in self.config.to_dict():
            self.config.vocab_size = wanted  # transformers 4.x kept a copy beside text_config
        if embedding.has_pad_row():
            embedding.settle()
        return embedding

    def _decoder(self) -> LlamaDecoder:
        match self:
            case LlavaCore():
                return self.language_model.model
            case LlamaCore():
                return self.model
            case LlamaDecoder():
                return self
        raise TypeError(f"{type(self).__name__} has no decoder")
