"""What people run: the command line, the built-in recipes, the report."""
