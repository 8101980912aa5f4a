"""Training: data, packing, objective, optimiser, state, trainer."""
