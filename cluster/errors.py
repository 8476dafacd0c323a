"""What can go wrong in a run that the user need not have caused (exit code 1 on the command line)."""


class RunFailed(Exception):
    """A run that began and could not finish; the message says why and where to look."""


class Diverged(RunFailed):
    """The loss became NaN or infinite."""


class Lost(RunFailed):
    """What the run needs has gone. Nothing is wrong with the run itself: once that is back, it can go on."""


class RayLost(Lost):
    """A process of Ray's without which its driver cannot go on has died."""


class StorageFailed(Lost):
    """A disk is full, or a directory or an object store has gone: the message has path and fix."""
