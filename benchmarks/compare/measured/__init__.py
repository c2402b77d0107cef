"""Methods side by side on this machine: memory, bytes, seconds by cause, and losses."""

from benchmarks.compare.measured.command import add as add
