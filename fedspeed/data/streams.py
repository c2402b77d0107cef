"""Numbers that keep independent draws with one run seed apart: a generator is seeded with [seed, stream,
...].
"""

SUBSET = 0  # which rows data.max_rows keeps
SPLIT = 1  # rows to clients
HOLDOUT = 2  # a client's held-out rows
EPOCH = 3  # a client's order of rows in an epoch
BUILTIN = 4  # rows of the built-in task
PRETRAIN = 5  # rows the quickstart's base is pretrained on
GENERATION = 6  # the choice of a generated token
