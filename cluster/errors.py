"""What can go wrong in a run that the user need not have caused (exit code 1 on the command line)."""


class RunFailed(Exception):
    """A run that began and could not finish; the message says why and where to look."""


class Diverged(RunFailed):
    """The loss became NaN or infinite."""
