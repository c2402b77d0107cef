"""One rank of `fedspeed run` with timed compute; takes its arguments. Started by a launcher, as launch.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ENGINE = "benchmarks.compare.emulated.engine"


def main() -> int:
    """Run the rank with the timed engine in place of every kind."""
    sys.path.insert(0, str(ROOT))
    from fedspeed.cli import main as fedspeed
    from fedspeed.engine.build import BUILDERS

    BUILDERS.update(dict.fromkeys(BUILDERS, ENGINE))
    return fedspeed(["run", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
