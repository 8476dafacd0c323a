"""Sweeps: the space that trials are drawn from, the searchers that draw them, the trials themselves."""
