"""A run's model as a file for others: numbers as files hold them in, classes and numbers in their units out."""
