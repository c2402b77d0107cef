"""Named tensors as one vector, and the ledger, which is one too."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedspeed.evaluation.config import EVAL_TASKS
from fedspeed.federation.layout import Layout
from fedspeed.federation.ledger import CLIENT_SIGNALS, RANK_SIGNALS, Ledger
from fedspeed.monitor.metrics import registry

SHAPES = st.dictionaries(
    st.text("abAB.", min_size=1, max_size=6), st.lists(st.integers(1, 4), max_size=3).map(tuple), max_size=6
)


def drawn(shapes):
    rng = np.random.default_rng(0)
    return {n: np.asarray(rng.standard_normal(s), dtype=np.float32) for n, s in shapes.items()}


@given(SHAPES)
def test_unflatten_undoes_flatten(shapes):
    tensors = drawn(shapes)
    layout = Layout.of(tensors)
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.size,) and vector.dtype == np.float32
    back = layout.unflatten(vector)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape
        np.testing.assert_array_equal(back[name], tensor)
    np.testing.assert_array_equal(layout.flatten(back), vector)


@given(SHAPES, st.randoms())
def test_the_order_is_of_names_not_of_the_dict(shapes, random):
    names = list(shapes)
    random.shuffle(names)
    tensors = drawn(shapes)
    assert Layout.of({n: tensors[n] for n in names}) == Layout.of(tensors)


@given(SHAPES)
def test_without_leaves_the_others_in_place(shapes):
    gone = set(list(shapes)[::2])
    left = Layout.of(drawn(shapes)).without(gone)
    assert left == Layout.of({n: t for n, t in drawn(shapes).items() if n not in gone})


def test_views_share_the_vector():
    """Copies of a full model's state would double its memory."""
    layout = Layout(("a", "b"), ((2,), (3, 1)))
    vector = np.zeros(5, dtype=np.float32)
    layout.unflatten(vector)["b"][2, 0] = 7.0
    assert vector[4] == 7.0


def test_ledgers_of_all_ranks_add_up_to_one():
    parts = [Ledger(2, 3) for _ in range(3)]
    parts[0].add_client(0, train_loss=4.0, tokens=8)
    parts[0].add_client(0, train_loss=1.0)
    parts[2].add_client(1, tokens=5)
    for slot, part in enumerate(parts):
        part.set_rank(slot, compute_s=float(slot), stop=float(slot == 1))
    whole = Ledger(2, 3, sum(p.vector for p in parts))
    assert whole.of_clients("train_loss").tolist() == [5.0, 0.0] and whole.of_clients("tokens").tolist() == [
        8.0,
        5.0,
    ]
    assert whole.of_ranks("compute_s").tolist() == [0.0, 1.0, 2.0] and whole.of_ranks("stop").tolist() == [
        0.0,
        1.0,
        0.0,
    ]


def test_no_two_words_of_a_ledger_share_a_slot():
    ledger = Ledger(2, 2, tasks=EVAL_TASKS)
    value = 0
    expected = {}
    for index in range(2):
        for word in (*registry.slots("client", False), *CLIENT_SIGNALS):
            value += 1
            ledger.add_client(index, **{word: value})
            expected["client", word, index] = value
        for word in (*registry.slots("rank", False), *RANK_SIGNALS):
            value += 1
            ledger.set_rank(index, **{word: value})
            expected["rank", word, index] = value
    assert sorted(ledger.vector) == list(range(1, value + 1))
    for (kind, word, index), number in expected.items():
        assert (ledger.of_clients if kind == "client" else ledger.of_ranks)(word)[index] == number
