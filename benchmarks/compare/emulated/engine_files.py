"""Names of the variables by which a rank with timed compute finds its files. Without torch."""

SECONDS_FILE = "FEDSPEED_BENCH_SECONDS"  # sleeps by host, JSON
MARKS_FOLDER = "FEDSPEED_BENCH_MARKS"  # where a rank writes what it has measured
