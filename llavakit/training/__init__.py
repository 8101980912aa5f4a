"""Training: data, workers, packing, objective, optimiser, state, reporting, trainer."""
