"""Entries and tensors for the tests of the journal."""

import numpy as np

from fedspeed.checkpoint.journal import Entry


def entry(round, **fields):
    return Entry(round, "marks", 7, {"run": {"seed": 7}}, **fields)


def tensors(round, size=50):
    return {
        "global/a": np.full((size, 2), round, dtype=np.float32),
        "server/m/a": np.arange(size, dtype=np.float32) * round,
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
    )


def round_folders(journal):
    return sorted(p.name for p in journal.folder.glob("round-*"))
