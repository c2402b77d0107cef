"""Device memory of every method in a local step, against the depth of the model and on one of over 1 B."""

from benchmarks.compare.memory.command import add as add
