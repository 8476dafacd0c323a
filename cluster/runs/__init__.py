"""A whole run: what is refused before it starts, where it is trained, how it ended."""
