"""Tensor mathematics: attention contexts, rotary embedding, loss, sampling."""
