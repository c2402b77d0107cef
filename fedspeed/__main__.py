"""`python -m fedspeed`, and the console script."""

import sys

from fedspeed.cli import main


def console() -> int:
    """Run the command that the arguments name; return the exit code."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
