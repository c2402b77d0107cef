"""`python -m fedspeed`."""

import sys

from fedspeed.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
