"""Compare generation and scoring by engines of every tier with plain transformers."""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.engine.config import EngineConfig
from fedspeed.errors import FedSpeedError, ModelError
from tests.engine.engines import engine
from tests.engine.small_models import LORA, stirred, write_family
from tests.processes import run_clusters
from tests.tiny import write_llama

MAX_NEW = 9
_RNG = np.random.default_rng(1)
EXAMPLES = _RNG.integers(3, 260, 6)  # the common prefix of all prompts
PROMPTS = [np.concatenate([EXAMPLES, _RNG.integers(3, 260, length)]) for length in (5, 1, 8, 5, 2)]
SPANS = [(9, 11), (6, 7), (2, 14), (1, 11), (7, 8)]
# Three continuations of the same prompt, of different lengths, as in a choice task.
CHOICES = [np.concatenate([PROMPTS[0], _RNG.integers(3, 260, length)]) for length in (3, 1, 4)]
SEQUENCES = [*PROMPTS, *CHOICES]
ASKED = [*SPANS, *((len(PROMPTS[0]), len(choice)) for choice in CHOICES)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {family: write_family(family, folder / family) for family in ("llama", "qwen2", "gpt2")}
    return made | {"tied": write_llama(folder / "tied", layers=4, tie_word_embeddings=True)}


SAMPLED = {"max_new": MAX_NEW, "temperature": 1.3, "top_p": 0.9, "n": 3, "seed": 7}


def asked(client_engine, stop=()):
    """Return all results that are compared, of an engine whose adapter is `stirred`."""
    return {
        "greedy": client_engine.generate(PROMPTS, max_new=MAX_NEW, stop=stop),
        "sampled": client_engine.generate(PROMPTS, **SAMPLED),
        "ended": client_engine.generate(PROMPTS, **SAMPLED, is_done=is_done),
        "alone": client_engine.generate(PROMPTS[2:3], max_new=MAX_NEW),
        "logprobs": client_engine.logprobs(SEQUENCES, ASKED),
        "likeliest": likeliest(client_engine),
    }


def likeliest(client_engine):
    """Return which tokens are the most likely ones in greedy answers, and in such answers with another token
    in the middle.
    """
    answers = [one for [one] in client_engine.generate(PROMPTS, max_new=3)]
    answers += [np.array([first, (second + 1) % 260]) for first, second, _ in answers]
    sequences = [np.concatenate(pair) for pair in zip([*PROMPTS, *PROMPTS], answers)]
    spans = [(len(prompt), len(sequence)) for prompt, sequence in zip([*PROMPTS, *PROMPTS], sequences)]
    return [scores.likeliest.tolist() for scores in client_engine.token_scores(sequences, spans)]


LIKELIEST = [[True] * 3] * len(PROMPTS) + [[True, False]] * len(PROMPTS)


def is_done(tokens):
    """End an answer after its second token at the earliest, and mostly before the last one that is asked."""
    return len(tokens) > 1 and sum(tokens) % 4 == 0


def ended(answer):
    """Return an answer up to where `is_done` ends it."""
    tokens = list(answer)
    return next((tokens[:end] for end in range(1, len(tokens)) if is_done(tokens[:end])), tokens)


def ends_where_it_is_done(found):
    """Assert that answers which were ended are the beginnings of those that were not."""
    whole = [[one.tolist() for one in some] for some in found["sampled"]]
    same_answers(found["ended"], [[ended(one) for one in some] for some in whole])
    assert len({len(one) for some in found["ended"] for one in some}) > 2


def of_tiers(rank, base, kinds, stop, nvme, *, options=None):
    """Return the results of engines of several tiers, built one after the other, and the loads that prompts
    cost.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = {}
    loads = {}
    for kind in kinds:
        with engine(base, kind, adapter=LORA, nvme=nvme, join=False, options=options) as client_engine:
            client_engine.load(stirred(client_engine.state()))
            found[kind] = asked(client_engine, stop)
            if kind == "ram":
                for prompts in (1, 5):
                    client_engine.store.take_loads()
                    client_engine.generate(PROMPTS[:prompts], max_new=MAX_NEW)
                    loads[prompts] = client_engine.store.take_loads().count
            client_engine.close()
    leave_world()
    return found, loads


def plain(base, stop, seed=5):
    """Return the greedy answers and the log-probabilities of an ordinary model with the same adapter, one
    sequence at a time.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fedspeed.models.adapters import initial_adapter, lora_config

    model = AutoModelForCausalLM.from_pretrained(base)
    targets = lora_config(LORA, model).target_modules
    model = get_peft_model(
        model, LoraConfig(r=LORA.lora_rank, lora_alpha=LORA.alpha, target_modules=targets)
    ).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in stirred(
            {n: initial_adapter(n, p.shape, 0) for n, p in trained.items()}, seed
        ).items():
            trained[name].copy_(value)
        answers = []
        logprobs = []
        for prompt in PROMPTS:
            ids = torch.from_numpy(prompt)[None]
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            answers.append(whole[: whole.index(stop)] if stop in whole else whole)
        for sequence, (a, b) in zip(SEQUENCES, ASKED):
            ids = torch.from_numpy(sequence)
            logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            logprobs.append(logits[a - 1 : b - 1].gather(-1, ids[a:b, None])[:, 0].numpy())
    return answers, logprobs


def same_answers(found, expected):
    assert [[answer.tolist() for answer in answers] for answers in found] == expected


def shown(ways, *slow):
    """Return the names, with those in `slow` marked as slow because another case shows the same."""
    return [pytest.param(way, marks=pytest.mark.slow) if way in slow else way for way in ways]


@pytest.mark.parametrize("family", shown(["llama", "tied", "qwen2", "gpt2"], "tied", "qwen2"))
def test_every_tier_answers_as_transformers_does(bases, tmp_path, family):
    free, _ = plain(bases[family], -1)
    stop = free[2][4]  # stops one answer in its middle
    greedy, logprobs = plain(bases[family], stop)
    assert greedy[2] != free[2] and len({tuple(answer) for answer in greedy}) > 1
    [(found, loads)] = run_clusters(
        [1],
        of_tiers,
        bases[family],
        ("zero0", "zero3", "resident", "ram", "nvme"),
        (stop,),
        tmp_path,
        options=EngineConfig(block_slots=2),
    )
    for kind, answers in found.items():
        same_answers(answers["greedy"], [[answer] for answer in greedy])
        same_answers(answers["alone"], [[free[2]]])
        same_answers(
            answers["sampled"], [[one.tolist() for one in some] for some in found["zero0"]["sampled"]]
        )
        ends_where_it_is_done(answers)
        assert answers["likeliest"] == LIKELIEST
        for values, expected in zip(answers["logprobs"], logprobs, strict=True):
            assert np.abs(values - expected).max() < 1e-5
    samples = {tuple(one.tolist()) for one in found["ram"]["sampled"][0]}
    assert len(samples) == 3
    for kind in ("ram", "nvme"):  # bit for bit
        for values, expected in zip(found[kind]["logprobs"], found["resident"]["logprobs"]):
            assert np.array_equal(values, expected)
    # A token step loads each of the 4 blocks, the embedding and the head at most once; the prefix and the
    # rest of the prompts take a pass each.
    assert loads[5] <= (MAX_NEW + 1) * (4 + 2)
    assert loads[1] <= loads[5] <= loads[1] + 4 + 2


def of_client(rank, base, kind, ranks, nvme, *, options=None):
    with engine(
        base,
        kind,
        clients=(tuple(range(ranks)),),
        adapter=LORA,
        nvme=nvme,
        options=options or EngineConfig(block_slots=2),
    ) as client_engine:
        client_engine.load(stirred(client_engine.state()))
        found = asked(client_engine)
        client_engine.close()
        return found


WAYS = {
    "zero3": ("zero3", 2, None),
    "client": ("client", 2, None),
    "pipeline": ("resident", 3, EngineConfig(pipeline="client")),
    "streamed pipeline": ("ram", 2, EngineConfig(pipeline="client", block_slots=1)),
}


@pytest.mark.parametrize("way", shown(WAYS, "client", "pipeline"))
def test_the_ranks_of_a_client_share_the_work_and_all_know_the_answers(bases, tmp_path, way):
    kind, ranks, options = WAYS[way]
    [alone] = run_clusters([1], of_client, bases["gpt2"], "resident", 1, tmp_path)
    for found in run_clusters([ranks], of_client, bases["gpt2"], kind, ranks, tmp_path, options=options):
        ends_where_it_is_done(found)
        assert found["likeliest"] == LIKELIEST
        for name in ("greedy", "sampled", "alone", "ended"):
            same_answers(found[name], [[one.tolist() for one in some] for some in alone[name]])
        for values, expected in zip(found["logprobs"], alone["logprobs"], strict=True):
            assert np.abs(values - expected).max() < 1e-5


def uneven(rank, base, kind, clients, nvme, *, options):
    """Two clients that share a base and ask for different numbers of answers, one of them in the end for
    none.
    """
    second = rank in clients[1]
    with engine(base, kind, clients=clients, adapter=LORA, nvme=nvme, options=options) as client_engine:
        client_engine.load(stirred(client_engine.state(), seed=6 if second else 5))
        first = client_engine.generate(
            PROMPTS[: 3 if second else 1], max_new=2 if second else MAX_NEW, n=1 if second else 2
        )
        last = client_engine.generate([] if second else PROMPTS, max_new=MAX_NEW, is_done=is_done)
        scores = client_engine.logprobs(SEQUENCES, ASKED)
        client_engine.close()
        return first, last, scores


SHARED = {
    "zero3": ("zero3", ((0,), (1,)), None),
    "gathered": ("cluster", ((0,), (1,)), None),
    "pipeline": ("resident", ((0,), (1,)), EngineConfig(pipeline="cluster")),
    "pipeline of three": ("resident", ((0, 1), (2,)), EngineConfig(pipeline="cluster")),
}


@pytest.mark.parametrize("way", shown(SHARED, "gathered", "pipeline"))
def test_clients_that_share_a_base_ask_each_for_what_they_like(bases, tmp_path, way):
    kind, clients, options = SHARED[way]
    free, _ = plain(bases["llama"], -1)
    other, logprobs = plain(bases["llama"], -1, seed=6)
    answered = run_clusters(
        [sum(map(len, clients))], uneven, bases["llama"], kind, clients, tmp_path, options=options
    )
    for rank in clients[0]:
        same_answers(answered[rank][0], [[free[0]] * 2])
        same_answers(answered[rank][1], [[ended(answer)] for answer in free])
        assert len({len(answer) for (answer,) in answered[rank][1]}) > 1
    for rank in clients[1]:
        same_answers(answered[rank][0], [[answer[:2]] for answer in other[:3]])
        assert answered[rank][1] == []
        assert (
            max(
                np.abs(values - expected).max()
                for values, expected in zip(answered[rank][2], logprobs, strict=True)
            )
            < 1e-5
        )


def in_narrow_rooms(rank, base, nvme):
    """What two tiers answer in bf16, with all the room there is, and with hardly any; and how many passes
    that took.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = []
    for kind in ("resident", "ram"):
        with engine(base, kind, "bf16", adapter=LORA, nvme=nvme, join=False) as client_engine:
            client_engine.load(stirred(client_engine.state()))
            limits = client_engine._batch_limits()
            passes = []
            compute = client_engine.compute_pieces
            client_engine.compute_pieces = lambda pieces: passes.append(len(pieces)) or compute(pieces)
            for narrow in (limits, replace(limits, batch_tokens=12, piece_tokens=8, step_tokens=4)):
                client_engine._batch_limits = lambda narrow=narrow: narrow
                passes.clear()
                answers = client_engine.generate(PROMPTS, max_new=4, temperature=1.0, n=2, seed=1)
                found.append((answers, client_engine.logprobs(SEQUENCES, ASKED), len(passes)))
            client_engine.close()
    leave_world()
    return found


def test_little_room_takes_more_passes_to_the_same_answers(bases, tmp_path):
    [found] = run_clusters([1], in_narrow_rooms, bases["gpt2"], tmp_path)
    wide, narrow, streamed, streamed_narrow = found
    assert wide[2] == streamed[2] == (1 + 4) + 2 and narrow[2] == streamed_narrow[2] > 2 * wide[2]
    for one, other in ((wide, streamed), (narrow, streamed_narrow)):  # bit for bit, in 16 bit too
        same_answers(other[0], [[answer.tolist() for answer in some] for some in one[0]])
        assert all(np.array_equal(*pair) for pair in zip(one[1], other[1], strict=True))
    assert (
        max(np.abs(one - other).max() for one, other in zip(wide[1], narrow[1])) < 0.05
    )  # matrix products of other sizes round differently


def refused(rank, base):
    messages = []
    with engine(base, "resident", adapter=LORA) as client_engine:
        for call in (
            lambda: client_engine.generate([PROMPTS[0], PROMPTS[0][:0]], max_new=1),
            lambda: client_engine.generate([PROMPTS[0]], max_new=118),
            lambda: client_engine.logprobs([PROMPTS[0]], [(0, 3)]),
            lambda: client_engine.logprobs([PROMPTS[0]], [(3, 12)]),
            lambda: client_engine.generate([PROMPTS[0]], max_new=1, n=0),
        ):
            try:
                call()
            except (ModelError, FedSpeedError) as error:
                messages.append(str(error))
        full = client_engine.generate([PROMPTS[0]], max_new=117)  # all positions of the table
        return messages, len(full[0][0])


def test_what_cannot_be_asked_is_refused_by_its_number(bases):
    [(messages, full)] = run_clusters([1], refused, bases["gpt2"])
    for message, expected in zip(
        messages,
        ("prompt 1 is empty", "11 tokens, and 118 more", "span 0:3", "span 3:12", "n=0"),
        strict=True,
    ):
        assert expected in message
    assert full == 117
