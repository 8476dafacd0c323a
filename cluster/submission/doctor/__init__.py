"""Doctor: what would end, slow or falsify a long job, found out on every node before it starts."""
