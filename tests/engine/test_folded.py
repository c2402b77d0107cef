"""Compare the folded adapter with the same matrices merged into the base's files, in every execution."""

import shutil

import numpy as np
import pytest

from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, as_factors, folded_parts, module_of, named
from tests.engine.engines import engine, find_optional, in_world
from tests.engine.small_models import stirred, write_family
from tests.processes import run_clusters
from tests.tiny import random_step

LORA = AdapterConfig(targets="all-linear", lora_rank=4, alpha=8.0)
SCALE = 2.0
SGD = TrainConfig(optimizer="sgd", momentum=0.9)
STEPS = [random_step(3, 2, 3), random_step(4, 2, 3)]


def folded(state):
    """Draw folded arrays for a state: factors and whole matrices alternate, and one module has none."""
    rng = np.random.default_rng(1)
    found = {}
    for i, (a, b) in enumerate(pairs(state)[1:]):
        shapes = (state[b].shape[0], 6), (6, state[a].shape[1])
        left, right = (0.1 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        found |= named(module_of(a), {WHOLE: left @ right} if i % 2 else {LEFT: left, RIGHT: right})
    return found


def as_torch(arrays):
    import torch

    return {n: torch.from_numpy(t) for n, t in arrays.items()}


def write_merged(base, state, folder):
    """Write a copy of the base with the folded products added to its weights; return its folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(f"{base}/model.safetensors")
    for module, parts in folded_parts(state).items():
        left, right = as_factors(parts)
        weight = tensors[f"{module.removeprefix('base_model.model.')}.weight"]
        product = weight.new_tensor(SCALE * (left.astype(np.float64) @ right))
        weight += product.T if "gpt2" in base else product  # GPT-2 stores [in, out]
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return str(folder)


def course(client_engine, start, mine=0):
    """Return (held-out loss, losses of two steps, final state) of this rank's client from a start."""
    client_engine.load(start)
    with client_engine.matched_passes(client_engine.eval_passes([STEPS[mine].micro]), backward=False):
        before = client_engine.evaluate([STEPS[mine].micro])[0].loss
    with client_engine.matched_passes(client_engine.train_passes(1, 2, 3), backward=True):
        client_engine.load(start)
        losses = [client_engine.train_step([STEPS[mine]], 0.1)[0].loss for _ in range(2)]
        end = client_engine.state()
    return before, losses, {n: t.numpy() for n, t in end.items()}


def alone(rank, base, kinds, dtype, folder):
    """Return the course on the merged base; by tier the course with the folded adapter, the bytes that it
    takes, and the courses without it before and afterwards; and the start.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    given = {"adapter": LORA, "train": SGD, "join": False, "nvme": folder}
    with engine(base, "resident", "fp32", **given) as client_engine:
        start = stirred(client_engine.state())
        whole = start | as_torch(folded(start))
        client_engine.close()
    found = {}
    with engine(
        write_merged(base, folded(start), f"{folder}/merged"), "resident", dtype, **given
    ) as client_engine:
        expected = course(client_engine, start)
        client_engine.close()
    for kind in kinds:
        with engine(base, kind, dtype, **given) as client_engine:
            plain = course(client_engine, start)
            peak = client_engine.device_bytes
            found[kind] = (
                course(client_engine, whole),
                client_engine.device_bytes - peak,
                plain,
                course(client_engine, start),
            )
            client_engine.close()
    leave_world()
    return expected, found, {n: t.numpy() for n, t in start.items()}


def pipelined(rank, base, start, scope):
    """Return the course in a pipeline over two ranks, of one client or of two that share it."""
    clients = ((0, 1),) if scope == "client" else ((0,), (1,))
    with engine(
        base, "resident", clients=clients, adapter=LORA, train=SGD, options=EngineConfig(pipeline=scope)
    ) as client_engine:
        return course(client_engine, as_torch(start | folded(start)), rank if scope == "cluster" else 0)


def same(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1] == pytest.approx(expected[1], rel=tolerance)
    assert found[2].keys() == expected[2].keys(), "what is folded is nobody's state"
    assert max(np.abs(found[2][n] - expected[2][n]).max() for n in expected[2]) <= 20 * tolerance


@pytest.mark.parametrize(
    ("family", "dtype", "kinds"),
    [
        ("llama", "fp32", ("zero0", "zero3", "ram")),
        ("gpt2", "fp32", ("zero2", "resident")),
        ("llama", "bf16", ("resident", "int8")),
    ],
)
def test_it_computes_as_if_merged(tmp_path, family, dtype, kinds):
    """A state without the folded adapter removes it. bf16 may differ by the rounding of the merged weight; a
    quantised base is not quantised anew for the folded adapter, and may differ by what that would round.
    """
    base = write_family(family, tmp_path / family)
    tolerance = 1e-5 if dtype == "fp32" else 2e-4
    kinds = [kind for kind in kinds if kind != "int8" or find_optional()]
    [(expected, found, start)] = run_clusters([1], alone, base, kinds, dtype, str(tmp_path))
    for kind in kinds:
        beside, grown, plain, after = found[kind]
        same(beside, expected, tolerance)
        assert abs(plain[0] / expected[0] - 1) > 10 * tolerance, "it matters"
        same(after, plain, 0 if kind != "zero3" else 1e-6)
        assert grown >= 0.9 * sum(t.nbytes for t in folded(start).values()) / (1 if dtype == "fp32" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["client", "cluster"])
def test_stages_of_a_pipeline_have_their_part(tmp_path, scope):
    base = write_family("llama", tmp_path / "llama")
    [(expected, _, start)] = run_clusters([1], alone, base, (), "fp32", str(tmp_path))
    found = run_clusters([2], pipelined, base, start, scope)
    same(found[0], expected)


LAST = 3  # the only block that trains, of 4
NARROW = {  # its modules, as transformers names them
    "llama": tuple(f"layers.{LAST}.self_attn.{name}_proj" for name in ("q", "v")),
    "gpt2": (f"h.{LAST}.attn.c_attn",),
}


def below(rank, base, family, kinds, folder):
    """Return as `alone` does, where only the last block trains and the blocks below it, whose modules are
    plain, have folded arrays; and by tier and block whether its output was part of a graph in training.
    """
    from torch import nn

    narrow = AdapterConfig(targets=NARROW[family], lora_rank=4, alpha=8.0)
    given = {"train": SGD, "join": False, "nvme": folder}
    with engine(base, "zero0", "fp32", adapter=LORA, **given) as client_engine:
        everywhere = folded(stirred(client_engine.state()))
        client_engine.close()
    number = NARROW[family][0].rpartition(str(LAST))[0]
    arrays = {name: array for name, array in everywhere.items() if f"{number}{LAST}." not in name}
    found = {}
    graphs = {}
    merged = write_merged(base, arrays, f"{folder}/merged")
    for kind, path in (("expected", merged), *((kind, base) for kind in kinds)):
        options = EngineConfig(activation_checkpointing=kind == "zero2")
        tier = "zero0" if kind == "expected" else kind
        with engine(path, tier, "fp32", adapter=narrow, options=options, **given) as client_engine:
            seen = {}
            for name, module in client_engine.model.named_modules():
                if isinstance(module, nn.Module) and name.endswith(tuple(f"{number}{b}" for b in range(4))):
                    module.register_forward_hook(
                        lambda module, args, out, name=name, seen=seen: seen.setdefault(
                            int(name.rpartition(".")[2]), set()
                        ).add(out.requires_grad and module.training)
                    )
            start = stirred(client_engine.state())
            found[kind] = course(client_engine, start | ({} if path == merged else as_torch(arrays)))
            graphs[kind] = {block: True in flags for block, flags in seen.items()}
            client_engine.close()
    return found, graphs


@pytest.mark.parametrize(
    "family,kinds",
    [
        ("llama", ("zero0", "zero2", "ram")),
        pytest.param("gpt2", ("zero0", "resident"), marks=pytest.mark.slow),
    ],
)
def test_modules_without_lora_have_their_part_and_no_backward_pass(tmp_path, family, kinds):
    """A stock engine's backward pass ends at the lowest block that trains, also if blocks are computed
    again.
    """
    base = write_family(family, tmp_path / family)
    [(found, graphs)] = run_clusters([1], in_world, below, base, family, kinds, str(tmp_path))
    for kind in kinds:
        same(found[kind], found["expected"])
        if kind.startswith("zero"):
            assert graphs[kind] == {0: False, 1: False, 2: False, 3: True}
