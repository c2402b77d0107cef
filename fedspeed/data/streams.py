"""Numbers of independent random streams of one run: a generator is seeded with [seed, stream, ...]."""

SUBSET = 0  # choice of data.max_rows rows
SPLIT = 1  # assignment of rows to clients
HOLDOUT = 2  # choice of a client's held-out rows
EPOCH = 3  # order of a client's rows in an epoch
BUILTIN = 4  # rows of the built-in task
PRETRAIN = 5  # rows for the pretraining of the quickstart's base
GENERATION = 6  # sampling of generated tokens
EVAL_ITEMS = 7  # choice of some items of an evaluation task
PACKING = 8  # order in which rows are packed into sequences; without the run's seed
