"""Sources: where rows come from before they are shards; `catalogue` lists them all."""
