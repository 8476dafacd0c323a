"""Training: the recipe, the loop and its contexts, checkpoints, the run's directory."""
