"""Lists of cells: a serial counts where an entry has it, and nowhere between two."""

import os

from fedspeed.routing.anonymous.crypto import DIGEST
from fedspeed.routing.anonymous.lists import has_once

A = os.urandom(16)
B = os.urandom(16)
END = bytes(DIGEST)


def test_a_serial_is_found_once_at_its_places_only():
    assert has_once(A + B + END, A) and has_once(B + A + END, A)
    assert not has_once(A + A + END, A)
    assert not has_once(B + B + END, A)
    assert not has_once(B[:8] + A + B[8:] + END, A)
    assert has_once(B[:8] + A + B[8:] + A + END, A)
    assert not has_once(B + B + A + A, A)  # in the digest
