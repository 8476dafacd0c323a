"""Trackers: a run's parameters, metrics, report and model where people compare runs: MLflow, W&B, TensorBoard."""
