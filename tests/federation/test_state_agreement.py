"""The union of the arrays of all roles, and what is refused of what participants announce."""

import json

import numpy as np
import pytest

from fedspeed.errors import ConfigError
from fedspeed.federation import state_agreement
from fedspeed.federation.state_agreement import announced, announcement, contradiction, united_arrays

NAMES = ("client 0", "the server", "client 1")
SERVER = 1


def arrays(**values):
    return {name: np.full(shape, value, np.float32) for name, (shape, value) in values.items()}


CLIENT = arrays(common=((2, 3), 1.0), own=((4,), 2.0))
SERVED = arrays(common=((2, 3), 1.0), body=((2, 2), 3.0), folded=((1, 5), 4.0)) | {
    "folded:x.left": np.full((3, 1), 5.0, np.float32)
}


class Link:
    """The link of a participant; the others have announced and send what is prescribed."""

    def __init__(self, number, announced, sent=SERVED | CLIENT):
        self.number = number
        self.announced = announced
        self.sent = sent
        self.shared = 0

    def gather(self, values):
        if values.size == 40:
            return np.stack([state_agreement._header(text) for text in self.announced])
        return np.stack([np.frombuffer(text.ljust(values.size), np.uint8) for text in self.announced])

    def share(self, vector, priority):
        self.shared += vector.size
        names = ("body", "folded", "folded:x.left") if vector.size > 4 else ("own",)
        return np.concatenate([np.asarray(self.sent[name]).reshape(-1) for name in sorted(names)])


def united(number, *, texts=None, max_mib=1, **kept):
    own = SERVED if number == SERVER else CLIENT
    texts = texts or [announcement(SERVED if n == SERVER else CLIENT) for n in range(3)]
    link = Link(number, texts, **kept)
    return link, united_arrays(
        link, own, server=SERVER, is_server=number == SERVER, names=NAMES, method="unlike", max_mib=max_mib
    )


@pytest.mark.parametrize("number", range(3))
def test_all_ranks_have_the_arrays_of_all_roles(number):
    _, found = united(number)
    assert found.arrays.keys() == (CLIENT | SERVED).keys()
    assert all(np.array_equal(found.arrays[name], array) for name, array in (CLIENT | SERVED).items())
    assert found.server_only == {"body", "folded"} and found.clients_only == {"own"}


def test_nothing_is_sent_where_all_have_the_same():
    link, found = united(0, texts=[announcement(CLIENT)] * 3)
    assert found.arrays is CLIENT and not found.server_only and not link.shared


def test_an_array_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="not finite before any training"):
        united(0, sent=CLIENT | SERVED | {"body": np.full(4, np.inf)})


def test_clients_must_have_the_same_arrays_and_roles_one_shape():
    shapes = [{"a": (2, 2)}, {"b": (1,)}, {"a": (2, 2), "c": (3,)}]
    message = contradiction("m", NAMES, shapes, SERVER)
    assert "in addition to 1 that all have, client 0 has no more; client 1 has c [3]. All clients" in message
    shapes = [{"a": (2, 2)}, {"a": (2, 4), "b": (1,)}, {"a": (2, 2)}]
    message = contradiction("m", NAMES, shapes, SERVER)
    assert "client 0 has a [2, 2]; the server has a [2, 4]. All clients" in message
    assert contradiction("m", NAMES, [{"a": (2, 2)}, {"b": (1,)}, {"a": (2, 2)}], SERVER) == ""


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        [["a"]],
        [["a", [1]], ["a", [1]]],
        [["a b", [1]]],
        [["", [1]]],
        [["a/../b", [1]]],
        [[7, [1]]],
        [["a", []]],
        [["a", [0]]],
        [["a", [-1]]],
        [["a", [True]]],
        [["a", [1.0]]],
        [["a", [1, 1, 1, 1, 1]]],
        [["a", [1 << 40]]],
        [["a", "11"]],
    ],
)
def test_what_is_no_announcement_is_refused_with_its_sender(value):
    with pytest.raises(ConfigError, match="^client 1 announced arrays that cannot be read"):
        announced(json.dumps(value).encode(), "client 1")


def test_more_than_a_message_may_have_is_refused_before_memory_is_taken():
    huge = json.dumps([["body", [1 << 30, 1 << 30]], ["common", [2, 3]]]).encode()
    with pytest.raises(ConfigError, match="^routing.message_mib=1: .*unlike, the server alone would send"):
        united(0, texts=[announcement(CLIENT), huge, announcement(CLIENT)])


def test_a_length_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setattr(state_agreement, "MAX_TEXT", 60)
    with pytest.raises(ConfigError, match="^the server announced names of arrays of less than one byte"):
        united(0)
