"""Rows: from named sources to shards, in one global order, to batches."""
