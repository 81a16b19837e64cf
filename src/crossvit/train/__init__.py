"""Training: the recipe, the optimiser and its schedule, checkpoints, and the loop."""
