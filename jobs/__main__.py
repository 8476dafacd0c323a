"""`python -m jobs` is `manta`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
