"""Adversarial training: the two halves, in one process or as actors, their coordinator and the quality monitor."""
