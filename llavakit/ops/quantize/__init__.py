"""Weights as small integers: how they lie in memory, and what they stand for."""
