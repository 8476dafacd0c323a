"""Training: the step, the loop and its contexts, the journal, evaluation, checkpoints, the run's directory."""
