"""Compare the alignment of a student with a plain computation by transformers, in double precision."""

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import pairs
from fedspeed.models.folded import module_of
from tests.engine.engines import engine, in_world
from tests.engine.small_models import drawn, write_family
from tests.processes import run_clusters
from tests.tiny import random_step

STUDENT = (0, 2)
COMMON = 3  # of 4 blocks
KL = 0.7
FIRST_RATE = 0.5  # of the step that gradients are read from: large against the rounding of weights
RATE = 0.02
SCALE = 2.0
SGD = TrainConfig(optimizer="sgd", momentum=0.0)
# On blocks 0, 2 and 3; block 1 is the teacher's alone.
TARGETS = tuple(f"{b}.self_attn.{name}" for b in (*STUDENT, COMMON) for name in ("q_proj", "v_proj"))
LORA = AdapterConfig(targets=TARGETS, lora_rank=4, alpha=SCALE * 4)


def padded_step(ranks=1, rank=0):
    step = random_step(3, 2, 2, ranks, rank)
    for batch in step.micro:  # rows of different lengths, so that micro-batches differ in tokens
        batch.attention_mask[0, -5:] = 0
        batch.labels[0, -5:] = -100
    step.micro[1].attention_mask[1, -9:] = 0
    step.micro[1].labels[1, -9:] = -100
    return step


def is_trained(name):
    return any(f".layers.{b}." in name for b in STUDENT)


def aligned(rank, base, kinds, kl, numeric):
    """Return by kind (this rank's sums before and after three steps, start, state after the first one)."""
    found = {}
    dtype, clients = numeric
    for kind in kinds:
        with engine(
            base,
            kind,
            dtype,
            clients,
            adapter=LORA,
            train=SGD,
            join=False,
            options=EngineConfig(activation_checkpointing=kind == "zero1"),
        ) as client_engine:
            start = drawn(client_engine.state(), scale=0.05)
            frozen = frozenset(name for name in start if not is_trained(name))
            step = padded_step(*client_engine.data_share)

            def stepped(rate, client_engine=client_engine, step=step):
                sums = client_engine.distil(step, student=STUDENT, common=COMMON, kl=kl)
                assert client_engine.step(rate) == [True]
                return sums

            client_engine.load(start, frozen=frozen)
            before = stepped(FIRST_RATE)
            arrays = [{n: t.numpy().copy() for n, t in s.items()} for s in (start, client_engine.state())]
            client_engine.load(start, frozen=frozen)
            after = [stepped(RATE) for _ in range(4)][-1]
            found[kind] = before, after, *arrays
            client_engine.close()
    return found


def by_hand(rank, base, start, kl, steps):
    """Return ((mean of the relative errors, mean divergence, tokens), gradients by name), in fp64."""
    import torch
    from transformers import AutoModelForCausalLM

    factors = {n: torch.tensor(v, dtype=torch.float64, requires_grad=is_trained(n)) for n, v in start.items()}
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) for _ in range(2)]
    teacher, student = models
    inputs = {}

    def adapt(model, off):
        modules = dict(model.named_modules())
        for a, b in pairs(factors):
            if not (off and is_trained(a)):
                modules[module_of(a).removeprefix("base_model.model.")].register_forward_hook(
                    lambda module, args, out, a=a, b=b: out + SCALE * args[0] @ factors[a].T @ factors[b].T
                )
        model.model.layers[COMMON].register_forward_pre_hook(
            lambda module, args: inputs.__setitem__(model, args[0])
        )

    adapt(teacher, off=True)
    adapt(student, off=False)
    kept = (*STUDENT, COMMON)
    student.model.layers = torch.nn.ModuleList(student.model.layers[b] for b in kept)
    student.model.config.num_hidden_layers = len(kept)
    student.model.config.layer_types = [student.model.config.layer_types[b] for b in kept]
    errors = []
    divergences = []
    for batch in [batch for step in steps for batch in step.micro]:
        ids, mask = (torch.from_numpy(array) for array in (batch.input_ids, batch.attention_mask))
        logits = [model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in models]
        for row, column in mask.nonzero().tolist():
            h_star, h = (inputs[model][row, column] for model in models)
            errors.append((((h_star - h) / h_star.square().mean().sqrt()) ** 2).mean())
            p_star, p = (each[row, column].softmax(-1) for each in logits)
            divergences.append((p_star * (p_star.log() - p.log())).sum())
    error, divergence = (torch.stack(values).mean() for values in (errors, divergences))
    trained = [name for name in factors if is_trained(name)]
    gradients = torch.autograd.grad(error + kl * divergence, [factors[name] for name in trained])
    sums = error.item(), divergence.item(), len(errors)
    return sums, {name: gradient.numpy() for name, gradient in zip(trained, gradients)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Blocks with full attention and with a sliding window, so that masks differ between blocks."""
    return write_family("qwen2", tmp_path_factory.mktemp("base") / "qwen2")


@pytest.mark.parametrize(
    "kinds,kl,dtype,clients",
    [
        pytest.param(("zero0", "zero1", "zero2"), KL, "fp32", ((0,),), id="fp32"),
        pytest.param(("zero0",), 0.0, "fp32", ((0,),), id="without divergence"),
        pytest.param(("zero0", "zero2"), KL, "fp16", ((0,),), id="fp16"),
        pytest.param(("zero2",), KL, "fp32", ((0, 1),), id="two ranks", marks=pytest.mark.slow),
    ],
)
def test_an_alignment_is_the_plain_computation(base, kinds, kl, dtype, clients):
    ranks = len(clients[0])
    found = run_clusters([ranks], in_world, aligned, base, kinds, kl, (dtype, clients))
    [expected] = run_clusters(
        [1], by_hand, base, found[0][kinds[0]][2], kl, [padded_step(ranks, rank) for rank in range(ranks)]
    )
    (error, divergence, tokens), gradients = expected
    rounding = 1e-4 if dtype == "fp32" else 0.03
    for kind in kinds:
        before, after = (sum_of([each[kind][i] for each in found]) for i in (0, 1))
        assert before[2] == tokens, "padding does not count"
        np.testing.assert_allclose(before[0] / tokens, error, rtol=rounding)
        np.testing.assert_allclose(before[1] / tokens, divergence if kl else 0.0, rtol=rounding)
        assert after[0] + kl * after[1] < 0.95 * (before[0] + kl * before[1]), "three steps align it"
        for start, end in (each[kind][2:] for each in found):
            for name, array in start.items():
                taken = (array - end[name]) / FIRST_RATE
                if not is_trained(name):
                    assert not taken.any(), f"{kind}: {name} is frozen"
                    continue
                largest = np.abs(gradients[name]).max()
                assert largest > 1e-6
                # Each weight is rounded to fp32 once, and masters are read as fp32.
                bound = rounding * largest + np.abs(array).max() * 2.0**-23 / FIRST_RATE
                assert np.abs(taken - gradients[name]).max() < bound, f"{kind}: {name}"


def sum_of(sums):
    return sum(s.hidden for s in sums), sum(s.kl for s in sums), sum(s.tokens for s in sums)


def pieces(rank, base):
    """Return the sums and the first step's end with logits of one token at a time, and with all at once."""
    from fedspeed.engine.compute import micro_batches

    found = [aligned(rank, base, ("zero0",), KL, ("fp32", ((0,),)))["zero0"]]
    micro_batches.logits_bytes = lambda *_: 1
    return [*found, aligned(rank, base, ("zero0",), KL, ("fp32", ((0,),)))["zero0"]]


def test_logits_of_few_tokens_at_a_time_give_the_same(base):
    [(whole, single)] = run_clusters([1], in_world, pieces, base)
    assert whole[0].kl == pytest.approx(single[0].kl, rel=1e-5)
    for name, array in whole[3].items():
        np.testing.assert_allclose(array, single[3][name], atol=1e-6)
