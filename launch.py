"""Start a federated run: the script that deepspeed, mpirun, srun, torchrun and plain python start. See
`python launch.py --help`.
"""

import sys

from fedspeed.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
