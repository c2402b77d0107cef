"""`python -m benchmarks.compare`, which `fedspeed bench` starts."""

import sys

from benchmarks.compare.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
