"""What is asked for: the recipe and its sections, how they are read, and whether all fits the data."""
