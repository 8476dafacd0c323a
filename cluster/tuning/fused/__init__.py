"""Trials that train together as one batched model."""
