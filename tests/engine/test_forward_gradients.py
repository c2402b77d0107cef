"""Derivatives along random directions, computed forwards: they are right, they estimate the gradient, and no
activations are saved.
"""

import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.capabilities import check_capabilities
from fedspeed.errors import ConfigError, ModelError
from fedspeed.models.config import AdapterConfig
from fedspeed.planner.memory import SCORE_BYTES
from tests.engine.engines import engine, in_world
from tests.processes import Scenarios, run_clusters, run_ranks
from tests.tiny import random_step, write_llama

SGD = TrainConfig(optimizer="sgd", momentum=0.0)
LORA = AdapterConfig(targets="all-linear", lora_rank=2)
VOCAB = 64
LR = 0.25
K = 10_000
FAMILIES = ("gemma3_text", "gpt2", "qwen3_moe")  # with caps and windows, with Conv1D, and with experts


def step_of(seed, ranks=1, rank=0, *, length=24):
    return random_step(seed, 4 // ranks, 2, ranks, rank, vocab=VOCAB, length=length)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return run_ranks(1, written, str(tmp_path_factory.mktemp("forward") / "llama"))[0]


def written(rank, folder, layers=2):
    return write_llama(folder, hidden=32, layers=layers, vocab=VOCAB, intermediate=48, heads=2, kv_heads=1)


def adapted(base, adapter=LORA):
    """Return a tiny Llama in float64, and the tensors of its LoRA, whose B is not zero."""
    import torch
    from peft import get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from fedspeed.models.adapters import lora_config

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, lora_config(adapter, model)).double()
    # transformers computes this norm in fp32, too coarse for a difference quotient.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                exact = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, exact)
    generator = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model, trained


def checked(rank, base):
    found = Scenarios()
    found.play("differences", differences, base)
    found.play("estimates", estimates, base)
    found.play("loss", losses, base)
    found.play("unsupported", unsupported, base)
    for family in FAMILIES:
        found.play(family, of_family, family, f"{base}-{family}")
    return found


def differences(base):
    """(derivative, central difference) in float64 along directions of some tensors, of all, and of one."""
    import torch

    from fedspeed.engine.forward_mode import AnswerLoss, loss_along, tangents_of

    model, trained = adapted(base)
    loss = AnswerLoss(model, 5)
    batch = step_of(0).micro[0]
    names = sorted(trained)
    pairs = []
    for seed, chosen in enumerate((names, names[:2], names[-2:], names[3:4])):
        values = {name: trained[name] for name in chosen}
        tangents = tangents_of(values, seed)
        _, derivative = loss_along(loss, batch, values, tangents)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, value in values.items():
                    value += sign * 1e-6 * tangents[name]
                ends.append(loss(batch).item())
                for name, value in values.items():
                    value -= sign * 1e-6 * tangents[name]
        pairs.append((derivative.item(), (ends[0] - ends[1]) / 2e-6))
    return pairs


def losses(base):
    """(the loss of answer tokens, a few at a time; the same from all logits at once)."""
    import torch

    from fedspeed.engine.forward_mode import AnswerLoss

    model, _ = adapted(base)
    batch = step_of(0).micro[0]
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits[:, :-1]
    labels = torch.from_numpy(batch.labels)[:, 1:]
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return AnswerLoss(model, 5)(batch).item(), whole.item()


def estimates(base):
    """(the gradient by backpropagation, by forward passes along all unit vectors, the mean of K estimates and
    its standard error, derivatives along some directions by a pass and from the gradient) of one module.
    """
    import numpy as np
    import torch

    from fedspeed.engine.directions import direction
    from fedspeed.engine.forward_mode import AnswerLoss, loss_along, tangents_of

    model, trained = adapted(base)
    chosen = {name: p for name, p in trained.items() if "layers.0.self_attn.k_proj" in name}
    loss = AnswerLoss(model, 5)
    batch = step_of(0, length=8).micro[0]
    loss(batch).backward()
    backward = np.concatenate([p.grad.numpy().reshape(-1) for p in chosen.values()])
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    forward = []
    for unit in torch.eye(len(backward), dtype=torch.float64):
        parts = unit.split([p.numel() for p in chosen.values()])
        tangents = {name: part.view(shapes[name]) for name, part in zip(chosen, parts)}
        forward.append(loss_along(loss, batch, chosen, tangents)[1].item())
    seeds = range(K, 2 * K)
    drawn = np.stack([
        np.concatenate([direction(seed, name, shapes[name]).reshape(-1) for name in chosen]) for seed in seeds
    ])
    derivatives = drawn @ np.array(forward)
    single = derivatives[:, None] * drawn
    passes = [loss_along(loss, batch, chosen, tangents_of(chosen, seed))[1].item() for seed in seeds[:4]]
    error = single.std(axis=0) / np.sqrt(K)
    return backward, np.array(forward), single.mean(axis=0), error, (passes, derivatives[:4])


def of_family(family, folder):
    """(derivative of a family's tiny model along a direction, the same by backpropagation)."""
    import torch
    from transformers import AutoModelForCausalLM

    from fedspeed.engine.forward_mode import AnswerLoss, loss_along, tangents_of
    from fedspeed.models.adapters import add_adapter
    from tests.engine.family_bases import write_base

    model = AutoModelForCausalLM.from_pretrained(write_base(family, folder), dtype=torch.float32)
    model = add_adapter(model, AdapterConfig(targets="attention", lora_rank=2))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    for parameter in trained.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tangents = tangents_of(trained, 3)
    loss = AnswerLoss(model, 5)
    batch = step_of(0).micro[0]
    _, derivative = loss_along(loss, batch, trained, tangents)
    loss(batch).backward()
    return derivative.item(), sum((p.grad * tangents[name]).sum().item() for name, p in trained.items())


def unsupported(base):
    """What is raised where the model has an operator without a forward derivative."""
    import torch

    from fedspeed.engine.forward_mode import AnswerLoss, loss_along, tangents_of

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    model, trained = adapted(base)
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: Opaque.apply(out))
    try:
        loss_along(AnswerLoss(model, 5), step_of(0).micro[0], trained, tangents_of(trained, 0))
    except ModelError as error:
        return str(error)


@pytest.fixture(scope="module")
def found(base):
    return run_ranks(1, checked, base)[0]


def test_the_loss_is_that_of_all_answer_tokens(found):
    in_pieces, at_once = found["loss"]
    assert in_pieces == pytest.approx(at_once, rel=1e-12)


def test_a_derivative_is_a_central_difference(found):
    for derivative, difference in found["differences"]:
        assert abs(derivative) > 0.01
        assert derivative == pytest.approx(difference, rel=1e-6, abs=1e-7)


def test_the_estimate_has_no_bias(found):
    """The mean of 10 000 estimates is within three standard errors of backpropagation in every element."""
    import numpy as np

    backward, forward, mean, error, (passes, expected) = found["estimates"]
    np.testing.assert_allclose(forward, backward, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(passes, expected, rtol=1e-5)  # of directions drawn in fp32
    assert len(mean) == 96
    assert (np.abs(mean - backward) < 3 * error).all()
    assert np.mean(((mean - backward) / error) ** 2) == pytest.approx(1, abs=0.4)
    assert np.abs(backward).max() > 10 * error.max(), "else a mean of zero would pass"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_derivatives(found, family):
    derivative, expected = found[family]
    assert abs(expected) > 1
    assert derivative == pytest.approx(expected, rel=1e-3)


def test_an_operator_without_a_derivative_is_named(found):
    assert "llama has an operator without a forward derivative" in found["unsupported"]


# By the engine.


def flat(arrays, names):
    import numpy as np

    return np.concatenate([np.asarray(arrays[name], np.float64).reshape(-1) for name in sorted(names)])


def stirred(tensors, scale=0.1):
    import torch

    generator = torch.Generator().manual_seed(5)
    return {
        n: v + scale * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for n, v in sorted(tensors.items())
    }


def by_kinds(rank, base, kinds, clients):
    """By kind of engine: (derivatives, loss, start, end of a step on the estimate from them)."""
    from fedspeed.engine.directions import combined

    found = {}
    for kind in kinds:
        with engine(base, kind, clients=clients, adapter=LORA, train=SGD, join=False) as client_engine:
            start = stirred(client_engine.state())
            client_engine.load(start)
            names = [name for name in client_engine.names if "layers.1" in name]
            work = step_of(1, *client_engine.data_share)
            (along,) = client_engine.forward_gradients([work], [[3, 4]], [frozenset(names)])
            estimate = combined({n: start[n].shape for n in names}, [3, 4], along.derivatives / 2)
            client_engine.add_to_gradients(0, estimate, 1.0)
            assert client_engine.step(LR) == [True]
            loss = client_engine.sum_over_client(_as_vector(along.sums))
            found[kind] = (along.derivatives, loss, _as_numpy(start), _as_numpy(client_engine.state()))
    return found, estimate


def _as_vector(sums):
    import numpy as np

    return np.array([sums.loss, sums.tokens])


def _as_numpy(tensors):
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def by_ranks(base, ranks, kinds=("zero0", "zero2")):
    clients = (tuple(range(ranks)),)
    return run_clusters([ranks], in_world, by_kinds, base, kinds, clients)


def test_ranks_of_a_client_have_the_derivatives_of_one(base):
    """Of their rows together, and a step on the estimate counts it once."""
    import numpy as np

    [(alone, estimate)] = by_ranks(base, 1)
    together = by_ranks(base, 2)
    for found, _ in [(alone, estimate), *together]:
        for derivatives, (loss, tokens), start, end in found.values():
            reference = alone["zero0"]
            np.testing.assert_allclose(derivatives, reference[0], rtol=1e-4)
            assert (loss, tokens) == pytest.approx(tuple(reference[1]), rel=1e-5)
            for name in start:
                expected = start[name] - LR * estimate.get(name, 0.0)
                np.testing.assert_allclose(end[name], expected, atol=2e-6)
    assert len({tuple(found["zero2"][0]) for found, _ in together}) == 1


def measured(rank, base):
    """Memory and saved bytes of both kinds of gradients, the cosine of an estimate with the gradient, and
    derivatives under dropout.
    """
    import torch

    from fedspeed.engine.directions import combined
    from fedspeed.engine.memory_counter import TensorMemoryCounter

    class Saved(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            self.bytes = 0
            super().__init__(self.pack, lambda tensor: tensor)

        def pack(self, tensor):
            self.bytes += tensor.nbytes
            return tensor

    out = {}
    with engine(written(rank, f"{base}-deep", 8), adapter=LORA, train=SGD, join=False) as client_engine:
        work = random_step(1, 16, 1, vocab=VOCAB, length=16)
        names = frozenset(name for name in client_engine.names if "layers.0" not in name)
        ways = {
            "forward": lambda: client_engine.forward_gradients([work], [[1]], [names]),
            "backward": lambda: client_engine.gradients([work]),
        }
        for way, compute in ways.items():
            saved = Saved()
            with saved, TensorMemoryCounter() as counter:
                compute()
            out[way] = (counter.peak, saved.bytes)
        client_engine.load(client_engine.state())
        long = random_step(1, 2, 1, vocab=VOCAB, length=256)
        with TensorMemoryCounter() as counter:
            client_engine.forward_gradients([long], [[1]], [names])
        out["long rows"] = counter.peak / (2 * 2 * 256**2)  # by rows, heads and scores
    with engine(base, adapter=LORA, train=SGD, join=False) as client_engine:
        start = stirred(client_engine.state())
        client_engine.load(start)
        names = frozenset(client_engine.names)
        tokens = step_of(1, length=8)
        some = [name for name in names if "layers.0.self_attn.v_proj" in name]
        size = sum(start[name].numel() for name in some)
        seeds = list(range(size))
        client_engine.gradients([tokens])
        client_engine.step(LR)
        end = client_engine.state()
        client_engine.load(start)
        (along,) = client_engine.forward_gradients([tokens], [seeds], [frozenset(some)])
        estimate = combined({n: start[n].shape for n in some}, seeds, along.derivatives / size)
        out["cosine"] = (flat(estimate, some), flat({n: start[n] - end[n] for n in some}, some))
    dropped = AdapterConfig(targets="all-linear", lora_rank=2, dropout=0.3)
    with engine(base, adapter=dropped, train=SGD, join=False) as client_engine:
        found = []
        for seed in (1, 2):
            client_engine.load(start, seed=seed)
            (along,) = client_engine.forward_gradients([tokens], [[7, 7]], [names])
            found.append(along.derivatives.tolist())
        out["dropout"] = found
    return out


@pytest.fixture(scope="module")
def memory(base):
    return run_clusters([1], in_world, measured, base)[0]


def test_no_activations_are_saved(memory):
    peak, saved = memory["forward"]
    peak_backward, saved_backward = memory["backward"]
    assert saved == 0 < saved_backward
    assert peak < peak_backward / 4


def test_the_planner_knows_the_scores_of_long_rows(memory):
    assert SCORE_BYTES == pytest.approx(memory["long rows"], rel=0.15)


def test_the_estimate_points_along_the_gradient(memory):
    """As many directions as values: the cosine is then 0.71 on average."""
    import numpy as np

    estimate, gradient = memory["cosine"]
    cosine = estimate @ gradient / np.linalg.norm(estimate) / np.linalg.norm(gradient)
    assert len(estimate) == 96
    assert cosine > 0.9 * np.sqrt(0.5)


def test_directions_of_a_step_see_the_same_dropout(memory):
    (first, again), (other, _) = memory["dropout"]
    assert first == again != other


@pytest.mark.parametrize(("kind", "stage"), [("streamed", 0), ("client_pipeline", 0), ("stock", 3)])
def test_engines_that_cannot_are_refused(kind, stage):
    check_capabilities({"forward_gradients"}, "stock", "federation.method=x", zero_stage=2)
    with pytest.raises(
        ConfigError, match=f"forward_gradients, which {kind}.* is not.*stock with .*stage=2 or less"
    ):
        check_capabilities({"forward_gradients"}, kind, "federation.method=x", zero_stage=stage)
