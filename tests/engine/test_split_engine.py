"""Both parts of a split model against the whole one, computed by torch and PEFT, and all that goes between
them.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.engine.split.messages import Limits
from fedspeed.errors import FedSpeedError
from tests.engine.engines import engine, in_world
from tests.processes import Scenarios, run_clusters, run_ranks

LAYERS = 3
HIDDEN = 64
LR = 1.0
MOST = Limits(rows=4, tokens=32)
LENGTHS = ((9, 24, 5), (17, 3, 12))  # of the rows of two micro-batches


def write_bases(rank, folder):
    from tests.tiny import write_llama

    return {
        tied: write_llama(folder / f"tied-{tied}", HIDDEN, LAYERS, tie_word_embeddings=tied)
        for tied in (False, True)
    }


def step_of(lengths=LENGTHS, seed=1):
    """Return a step with padding: rows of some lengths, with their answers at the end."""
    from fedspeed.data.batches import StepBatches, collate
    from fedspeed.data.encode import Example

    rng = np.random.default_rng(seed)

    def example(length):
        return Example(rng.integers(3, 260, length).astype(np.int32), labels_start=max(1, length // 2))

    micro = [collate([example(n) for n in some], pad_id=0) for some in lengths]
    return StepBatches(micro, sum(batch.answer_tokens for batch in micro))


def whole_model(base, step, batches):
    """Return the loss, the gradients and the held-out loss of the whole model, computed row by row; and the
    adapter that it was computed with. The first held-out row is given the answer that the model would give.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    parameters = {n: p for n, p in sorted(model.named_parameters()) if p.requires_grad}
    rng = np.random.default_rng(3)
    state = {n: (0.1 * rng.standard_normal(tuple(p.shape))).astype(np.float32) for n, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(state[name]))

    def loss_of(batch):
        losses = []
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask):
            real = torch.from_numpy(ids[: mask.sum()])
            logits = model(input_ids=real[None]).logits[0]
            targets = torch.from_numpy(labels[: mask.sum()])
            losses.append(functional.cross_entropy(logits[:-1], targets[1:], reduction="sum"))
        return sum(losses)

    first = batches[0]
    last = int(first.attention_mask[0].sum()) - 1
    answer = model(input_ids=torch.from_numpy(first.input_ids[:1, :last])).logits[0, -1].argmax().item()
    first.input_ids[0, last] = answer
    first.labels[0] = -100
    first.labels[0, last] = answer
    total = sum(loss_of(batch) for batch in step.micro)
    (total / step.step_answer_tokens).backward()
    return SimpleNamespace(
        loss=total.item(),
        gradients={n: p.grad.numpy() for n, p in parameters.items()},
        held_out=sum(loss_of(batch).item() for batch in batches),
        state=state,
    )


def both(base, first, last, *, dtype="fp32", clients=((0,),), slots=1, **options):
    """Return contexts of the engines of both parts."""
    from fedspeed.data.config import TrainConfig
    from fedspeed.models.config import AdapterConfig

    common = {
        "dtype": dtype,
        "clients": clients,
        "join": False,
        "adapter": AdapterConfig(targets="all-linear", lora_rank=4, alpha=8.0),
        "train": TrainConfig(optimizer="sgd", momentum=0.0),
        **options,
    }
    end = LAYERS - last
    ends = (*range(first), *range(end, LAYERS))
    return (
        engine(base, "resident", part="ends", blocks=ends, **common),
        engine(base, "resident", part="body", blocks=tuple(range(first, end)), client_slots=slots, **common),
    )


class Post:
    """Carries messages to a body in the same process, and notes them."""

    def __init__(self, body):
        self.body = body
        self.train = True
        self.notes = []

    def __call__(self, message):
        from safetensors.numpy import load, save

        message = load(save(message))
        answer = load(save(self.body.answer(0, message, most=MOST, train=self.train)))
        self.notes += [{name: array for name, array in one.items()} for one in (message, answer)]
        return answer


def stepped(base, at, state, step, batches, **options):
    """Take an optimizer step in both parts, and evaluate before it.

    Args:
        at: numbers of the first and of the last blocks that clients have.
    """
    import torch

    tensors = {n: torch.from_numpy(a) for n, a in state.items()}
    ends_of, body_of = both(base, *at, **options)
    with ends_of as ends, body_of as body:
        ends.elsewhere = frozenset(body.names)
        body.elsewhere = frozenset(ends.names)
        assert not set(ends.names) & set(body.names)
        ends.load(tensors)
        body.load(tensors)
        post = Post(body)
        with ends.asking(post):
            post.train = False
            with ends.matched_passes(ends.eval_passes([list(batches)]), backward=False):
                [evaluated] = ends.evaluate([list(batches)])
            post.train = True
            asked = len(post.notes)
            [sums] = ends.gradients([step])
            trained = post.notes[asked:]
        assert ends.step(LR) == body.step(LR) == [True]
        after = {n: t.numpy() for part in (ends, body) for n, t in part.state().items()}
        sizes = {"ends": ends.base_bytes, "body": body.base_bytes}
    gradients = {n: (state[n] - after[n]) / LR for n in state}
    return SimpleNamespace(
        sums=sums, evaluated=evaluated, gradients=gradients, trained=trained, sizes=sizes, notes=post.notes
    )


def held_out():
    return step_of(((7, 11), (30,)), seed=2).micro


def all_parts(rank, bases):
    out = Scenarios()
    for tied, (first, last), options in (
        (False, (1, 0), {}),
        (True, (1, 1), {}),
        (False, (1, 1), {"recompute": True}),
        (False, (2, 0), {}),
    ):
        out.play((tied, first, last), compared, bases[tied], first, last, **options)
    out.play("bf16", compared, bases[True], 1, 1, dtype="bf16")
    out.play("refused", refused, bases[False])
    out.play("slots", slots_apart, bases[False])
    return out


def compared(base, first, last, *, recompute=False, **options):
    from fedspeed.engine.config import EngineConfig

    step = step_of()
    batches = held_out()
    expected = whole_model(base, step, batches)
    options["options"] = EngineConfig(activation_checkpointing=recompute)
    return expected, stepped(base, (first, last), expected.state, step, batches, **options)


def refused(base):
    """What a body says of messages that are not due."""
    import torch

    _, body_of = both(base, 1, 0)
    found = []
    with body_of as body:
        good = {"hidden": np.zeros((3, HIDDEN), np.float32), "lengths": np.array([2, 1])}
        for message in (
            {},
            {"hidden": good["hidden"]},
            {**good, "labels": np.zeros(3)},
            {**good, "lengths": np.array([2, 2])},
            {**good, "lengths": np.array([2, 0, 1])},
            {**good, "lengths": np.array([3.0])},
            {**good, "lengths": np.array([33])},
            {**good, "lengths": np.zeros(0, np.int64)},
            {**good, "hidden": good["hidden"].astype(np.float64)},
            {**good, "hidden": good["hidden"][:, :8]},
            {"output_gradient": good["hidden"]},
            {"hidden": np.zeros((36, HIDDEN), np.float32), "lengths": np.array([32, 1, 1, 1, 1])},
            {**good, "hidden": np.where(np.arange(3)[:, None] == 1, np.float32(np.nan), good["hidden"])},
        ):
            try:
                body.answer(0, message, most=MOST, train=True)
            except FedSpeedError as error:
                found.append(str(error))
        body.answer(0, good, most=MOST, train=True)
        for message in (good, {"output_gradient": good["hidden"][:1]}):
            try:
                body.answer(0, message, most=MOST, train=True)
            except FedSpeedError as error:
                found.append(str(error))
        body.load({name: torch.full_like(tensor, 1e30) for name, tensor in body.state().items()})
        try:
            body.answer(0, {**good, "hidden": good["hidden"] + 1}, most=MOST, train=True)
        except FedSpeedError as error:
            found.append(str(error))
        body.load({name: torch.zeros_like(tensor) for name, tensor in body.state().items()})
        answer = body.answer(0, good, most=MOST, train=False)
        assert torch.is_tensor(torch.from_numpy(answer["output"]))
    return found


def slots_apart(base):
    """Return what two clients' slots of a body hold, after both sent hidden states and only one took a
    step.
    """
    step = step_of()
    ones = np.ones((3, HIDDEN), np.float32)
    ends_of, body_of = both(base, 1, 0, slots=2)
    with ends_of as ends, body_of as body:
        start = {n: t.clone() for n, t in body.state().items()}
        for slot in (0, 1):
            body.load(start, slot=slot)
        with ends.asking(lambda message: body.answer(1, message, most=MOST, train=True)):
            body.answer(0, {"hidden": ones, "lengths": np.array([3])}, most=MOST, train=True)
            ends.gradients([step])
        body.answer(0, {"output_gradient": ones}, most=MOST, train=True)
        assert body.step(LR, only={1}) == [True]
        first = [{n: t.numpy().copy() for n, t in body.state(slot).items()} for slot in (0, 1)]
        assert body.step(LR) == [True], "slot 0 has still to take its own"
        second = [{n: t.numpy().copy() for n, t in body.state(slot).items()} for slot in (0, 1)]
    return {n: t.numpy() for n, t in start.items()}, first, second


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return run_ranks(1, write_bases, tmp_path_factory.mktemp("bases"))[0]


@pytest.fixture(scope="module")
def seen(bases):
    return run_clusters((1,), in_world, all_parts, bases)[0]


CASES = ((False, 1, 0), (True, 1, 1), (False, 1, 1), (False, 2, 0))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_whole_model(seen, case):
    expected, found = seen[case]
    assert found.sums.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(found.gradients[name], gradient, atol=1e-5, err_msg=name)
    assert found.evaluated.loss == pytest.approx(expected.held_out, rel=1e-5)
    assert (found.evaluated.exact, found.evaluated.rows) == (1, 3)


@pytest.mark.parametrize("case", CASES)
def test_nothing_but_states_gradients_and_lengths_of_real_tokens_is_sent(seen, case):
    """Four messages a micro-batch, whose sizes are those of its real tokens."""
    _, found = seen[case]
    ups_and_downs = [{"hidden", "lengths"}, {"output"}, {"output_gradient"}, {"hidden_gradient"}]
    names = [set(message) for message in found.trained]
    assert names == [*ups_and_downs, {"hidden", "lengths"}, {"output"}] + [
        {"output_gradient", "last"},
        {"hidden_gradient"},
    ]
    for number, message in enumerate(found.trained):
        lengths = LENGTHS[number // 4]
        for name, array in message.items():
            shape = {"lengths": (3,), "last": (0,)}.get(name, (sum(lengths), HIDDEN))
            assert array.shape == shape, name
            assert array.dtype == {"lengths": np.int64, "last": np.uint8}.get(name, np.float32)
        if "lengths" in message:
            assert tuple(message["lengths"]) == lengths
    evaluated = found.notes[: -len(found.trained)]
    assert [set(message) for message in evaluated] == [{"hidden", "lengths"}, {"output"}] * 2


def test_each_part_has_the_weights_of_its_own_blocks_only(seen):
    _, found = seen[False, 1, 1]
    _, other = seen[False, 2, 0]
    block = found.sizes["body"] - HIDDEN * 4  # the final norm is everywhere
    assert found.sizes["ends"] == other.sizes["ends"] > 2 * 260 * HIDDEN * 4 + 2 * block
    assert other.sizes["body"] == found.sizes["body"] < 260 * HIDDEN * 4 + block


def test_in_16_bit_messages_have_16_bit(seen):
    expected, found = seen["bf16"]
    assert found.sums.loss == pytest.approx(expected.loss, rel=2e-2)
    for message in found.trained:
        assert all(
            array.dtype == np.int16 for name, array in message.items() if name not in ("lengths", "last")
        )
    largest = max(np.abs(g).max() for g in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, atol=0.05 * largest, err_msg=name)


def test_messages_that_are_not_due_are_refused(seen):
    texts = seen["refused"]
    assert len(texts) == 16 and all(text.startswith("a message ") for text in texts[:15])
    assert "should have hidden, lengths, and has ['hidden', 'labels', 'lengths']" in texts[2]
    assert all("impossible lengths of rows" in texts[number] for number in (4, 6, 11))
    assert "up to 4 rows (train.micro_batch times the client's ranks) of 1 to 32 tokens" in texts[11]
    assert "should have hidden as float32 (3, 64), and has float64 (3, 64)" in texts[8]
    assert texts[12] == "a message has values of hidden that are not finite; lower train.lr"
    assert "should have output_gradient or output_gradient, last, and has" in texts[13]
    assert texts[15] == "the answer to a message has values of output that are not finite; lower train.lr"


def test_clients_that_are_served_at_the_same_time_have_adapters_of_their_own(seen):
    start, first, second = seen["slots"]
    assert all(np.array_equal(first[0][n], start[n]) for n in start)
    assert any(not np.array_equal(first[1][n], start[n]) for n in start)
    assert any(not np.array_equal(second[0][n], start[n]) for n in start)
    assert all(np.array_equal(second[1][n], first[1][n]) for n in start)


def shared_step(rank, base, state):
    """Return what a client of two ranks, and a body on both, come to: half of the rows on each rank."""
    return stepped(base, (1, 1), state, _half(step_of(), rank), held_out()[rank:], clients=((0, 1),))


def _half(step, rank):
    from fedspeed.data.batches import Batch, StepBatches

    def rows(batch):
        own = slice(0, 1) if rank == 0 else slice(1, 3)
        labels = batch.labels[own]
        tokens = int((labels[:, 1:] != -100).sum())
        return Batch(batch.input_ids[own], labels, batch.attention_mask[own], tokens)

    return StepBatches([rows(batch) for batch in step.micro], step.step_answer_tokens)


def test_ranks_of_a_client_send_one_message_for_all_their_rows(bases, seen):
    """The second rank evaluates fewer batches, and trains on other rows."""
    expected, _ = seen[True, 1, 1]
    ranks = run_clusters((2,), in_world, shared_step, bases[True], expected.state)
    assert sum(rank.sums.loss for rank in ranks) == pytest.approx(expected.loss, rel=1e-5)
    for rank in ranks:
        for name, gradient in expected.gradients.items():
            np.testing.assert_allclose(rank.gradients[name], gradient, atol=1e-5, err_msg=name)
        assert [message["lengths"].tolist() for message in rank.trained if "lengths" in message] == [
            list(lengths) for lengths in LENGTHS
        ]
    assert [rank.evaluated.rows for rank in ranks] == [3, 1]
    assert ranks[0].evaluated.loss > ranks[1].evaluated.loss > 0
