"""`python -m jobs` is `manta`."""

import os
import sys

# Python puts the current directory first: there a user's file may have the name of a library, or of a package of ours.
# It stays where the packages are in it themselves, which nobody has installed.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from jobs.cli import main

if __name__ == "__main__":
    main()
