"""Checkpoints: names, loading, saving."""
