"""Activations that are kept instead of recomputed, and block inputs that are offloaded to host memory, change
no bit of the results.
"""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fedspeed.engine.config import EngineConfig
from fedspeed.models.config import AdapterConfig
from fedspeed.schedule.kept_activations import kept_counts
from tests.engine.engines import engine
from tests.engine.small_models import LORA, stirred
from tests.processes import run_clusters
from tests.tiny import random_step

GIB = 2**30


def test_the_last_blocks_keep_their_activations_first():
    assert kept_counts(0, [10, 10], 4) == [0, 0, 0, 0]
    assert kept_counts(30, [10, 10], 4) == [0, 1, 2, 0], "the last block's backward follows its forward"
    assert kept_counts(1000, [10, 10], 4) == [2, 2, 2, 0]
    assert kept_counts(1000, [10, 10], 4, lowest=2) == [0, 0, 2, 0]
    assert kept_counts(25, [10, 20, 5], 3) == [0, 1, 0], "micro-batches in their order"
    assert kept_counts(100, [], 3) == [0, 0, 0]


def steps_of(seeds):
    """Yield steps whose micro-batches differ in size."""
    for seed in seeds:
        step = random_step(seed, 2, 3)
        short = step.micro[1]
        step.micro[1] = replace(
            short,
            input_ids=short.input_ids[:, :16],
            labels=short.labels[:, :16],
            attention_mask=short.attention_mask[:, :16],
            answer_tokens=int((short.labels[:, 1:16] != -100).sum()),
        )
        yield step


def kept_and_not(rank, base, kind, dtype, nvme):
    """Return for each activation budget: (losses, evaluated loss, state as bytes, block calls in a step)."""
    import torch

    from fedspeed.engine.activations import ActivationBudget

    seen = []
    with engine(
        base,
        kind,
        dtype,
        adapter=AdapterConfig(targets="all-linear", dropout=0.2),
        nvme=nvme,
        options=EngineConfig(block_slots=2, activation_gib=0.0),
        client_slots=2,
    ) as client_engine:
        start = {name: stirred(client_engine.state(client_slot)) for client_slot, name in enumerate("ab")}
        policy = client_engine._executor.policy
        blocks = client_engine._executor.stage._parts.blocks
        one = measured_bytes(client_engine, next(steps_of([7])))
        for budget in (0, one * 2, one * 9, 10**9):
            policy.budget = ActivationBudget(budget / GIB, 1)
            policy._saved_per_value = 0.0
            policy._measured_input = 0
            for client_slot, name in enumerate("ab"):
                client_engine.load(start[name], seed=3, slot=client_slot)
            calls = []
            hooks = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in blocks]
            sums = [
                client_engine.train_step([one_step, other], 0.1)
                for one_step, other in itertools.pairwise(steps_of(range(3)))
            ]
            for hook in hooks:
                hook.remove()
            state = torch.cat([
                v.reshape(-1)
                for client_slot in range(2)
                for _, v in sorted(client_engine.state(client_slot).items())
            ])
            evaluated = client_engine.evaluate([next(steps_of([9])).micro])[0].loss
            seen.append((
                [s.loss for both in sums for s in both],
                evaluated,
                state.numpy().tobytes(),
                len(calls) / 2,
            ))
    return seen


def measured_bytes(client_engine, step) -> int:
    """Return the bytes that a block keeps of the largest micro-batch, as the engine measures them. The budget
    is changed; weights are not.
    """
    from fedspeed.engine.activations import ActivationBudget

    policy = client_engine._executor.policy
    policy.budget = ActivationBudget(1.0, 1)
    client_engine.train_step([step, step], 0.0)
    return int(
        policy._saved_per_value * step.micro[0].input_ids.size * client_engine.model.config.hidden_size
    )


@pytest.mark.parametrize(
    "family,kind,dtype",
    [
        pytest.param("llama", "resident", "fp32", marks=pytest.mark.slow),
        pytest.param("qwen2", "ram", "fp32", marks=pytest.mark.slow),
        pytest.param("gpt2", "ram", "bf16", marks=pytest.mark.slow),
        ("llama", "nvme", "fp32"),
    ],
)
def test_what_is_kept_changes_no_bit(bases, tmp_path, family, kind, dtype):
    [seen] = run_clusters([1], kept_and_not, bases[family], kind, dtype, tmp_path)
    for losses, evaluated, state, _ in seen[1:]:
        assert (losses, evaluated, state) == seen[0][:3]
    again = [calls for *_, calls in seen]
    # 4 blocks, 6 micro-batches: each once, and 3 of the blocks again.
    assert again[0] == 6 * 4 + 6 * 3
    assert again[0] > again[1] > again[2] > again[3]
    assert again[3] <= 6 * 4 + 1, (
        "with room for all of them nothing is computed twice, but for one that is measured"
    )


def filled_up(rank, base, nvme):
    """Return the losses of three steps, the second of which runs out of memory while activations are kept,
    the losses with nothing kept, and the log.
    """
    import contextlib
    import io

    import torch

    with engine(base, "ram", adapter=LORA, nvme=nvme) as client_engine:
        start = stirred(client_engine.state())
        executor = client_engine._executor
        log = io.StringIO()
        whole = executor.stage.compute.block
        number = 0

        def block(b, *args):
            if number == 1 and b == 2 and torch.is_grad_enabled() and executor.budget._budget:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(b, *args)

        found = {}
        for kept in (True, False):
            client_engine.load(start)
            executor.budget._budget *= kept
            executor.stage.compute.block = block
            found[kept] = []
            with contextlib.redirect_stderr(log):
                for number in range(3):
                    found[kept].append(client_engine.train_step([random_step(number, 2, 2)], 0.1)[0].loss)
    return found, log.getvalue()


def test_a_card_that_has_become_full_computes_again(bases, tmp_path):
    [(found, log)] = run_clusters([1], filled_up, bases["llama"], tmp_path)
    assert found[True] == found[False]
    assert log.count("\n") == 1
    assert "computed again from now on (engine.activation_gib=auto)" in log


def card(monkeypatch, free, reserved, total=24 * GIB, fraction=1.0):
    """Install a card whose allocator reports these numbers; return its counters, for the test to change."""
    import torch

    seen = SimpleNamespace(peak=0, resets=0)

    def reset():
        seen.resets += 1

    monkeypatch.setattr(
        "fedspeed.engine.activations.get_accelerator",
        lambda: SimpleNamespace(
            is_synchronized_device=lambda: False,
            device_name=lambda: "cuda",
            memory_reserved=lambda: reserved,
            max_memory_allocated=lambda: seen.peak,
            reset_peak_memory_stats=reset,
        ),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, total))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: fraction)
    return seen


@pytest.mark.parametrize(
    "sharers,fraction,expected", [(1, 1.0, 0.9 * 14), (2, 1.0, 0.9 * 8), (1, 0.5, 0.9 * 6)]
)
def test_what_a_step_has_left_free_is_the_budget_of_the_next(monkeypatch, sharers, fraction, expected):
    from fedspeed.engine.activations import ActivationBudget

    seen = card(monkeypatch, free=12 * GIB, reserved=8 * GIB, fraction=fraction)
    budget = ActivationBudget("auto", sharers)
    seen.peak = 7 * GIB  # of loading, for example
    assert budget.begin([10, 10]) == 0, "the first step keeps nothing"
    assert (budget.peak, seen.resets) == (7 * GIB, 1)
    seen.peak = 6 * GIB
    budget.step_done()
    assert budget.begin([10, 10]) == pytest.approx(expected * GIB, abs=1)
    budget.step_done()
    assert budget.begin([9, 5]) > 0
    for larger in ([11, 2], [10, 6, 6]):
        assert budget.begin(larger) == 0, "nor does one that is larger than any before it"
        seen.peak = 9 * GIB
        budget.step_done()
        assert budget.begin(larger) == pytest.approx((expected - 0.9 * 3) * GIB, abs=1)
    assert ActivationBudget(1.5, 1).begin([10]) == 1.5 * GIB


BROKEN = {
    "the copy down does not wait for the input": lambda inputs: setattr(
        inputs._down, "wait_event", lambda event: None
    ),
    "the copy up does not wait for what had its place": lambda inputs: setattr(
        inputs._up, "wait_event", lambda event: None
    ),
    "the copy up does not wait for the copy down": lambda inputs: setattr(
        inputs, "end_forward", inputs._offloads.clear
    ),
    "the arithmetic does not wait for the copy up": lambda inputs: setattr(
        inputs, "prefetch", without_events(inputs.prefetch)
    ),
    "the memory of an input is given away": lambda inputs: setattr(inputs, "put", without_keeping(inputs)),
}


def without_events(prefetch):
    def brought(inputs):
        prefetch(inputs)
        for waiting in inputs:
            waiting.arrived = None

    return brought


def without_keeping(inputs):
    put = inputs.put

    def given_away(hidden, on_host):
        waiting = put(hidden, on_host)
        inputs._offloads[-1].inputs.clear()
        return waiting

    return given_away


def under_the_fake(rank, base, nvme, schedules):
    """Return (races, largest relative difference from the CPU's losses, copies) of random schedules of block
    inputs; the races that each error of BROKEN causes; the points where the host waits, by micro-batches.
    """
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.fake_cuda import fake_cuda
    from tests.limits import LIMIT_S

    quiet()

    def losses(micro):
        steps = [random_step(seed, 2, micro) for seed in range(2)]
        client_engine.load(start, seed=1)
        return [client_engine.train_step([step], 0.1)[0].loss for step in steps] + [
            client_engine.evaluate([steps[0].micro])[0].loss
        ]

    found = []
    errors = {}
    draw = random.Random(0)
    join_world(LIMIT_S)
    with engine(base, "ram", adapter=LORA, nvme=nvme, join=False) as client_engine:
        start = stirred(client_engine.state())
        expected = {micro: losses(micro) for micro in (1, 2, 4)}
    for number in range(schedules):
        options = EngineConfig(
            block_slots=draw.choice((1, 2, 3, 4)),
            block_inputs=draw.choice(("auto", "host", "device")),
            activation_gib=draw.choice((0.0, 3e-4, 1.0)),
        )
        micro = draw.choice((1, 2, 4))
        with (
            fake_cuda(number) as fake,
            engine(
                base, draw.choice(("ram", "resident")), adapter=LORA, nvme=nvme, options=options, join=False
            ) as client_engine,
        ):
            got = losses(micro)
            client_engine.close()
        found.append((fake.races[:2], max(abs(a / b - 1) for a, b in zip(got, expected[micro])), fake.copies))
    for name, breaks in BROKEN.items():
        options = EngineConfig(block_inputs="host", activation_gib=0.0)
        with (
            fake_cuda(1) as fake,
            engine(base, "resident", adapter=LORA, nvme=nvme, options=options, join=False) as client_engine,
        ):
            breaks(client_engine._executor.policy.inputs)
            losses(2)
            client_engine.close()
        errors[name] = len(fake.races)
    stops = {}
    with (
        fake_cuda(1) as fake,
        engine(
            base, "ram", adapter=LORA, nvme=nvme, options=EngineConfig(block_inputs="host"), join=False
        ) as client_engine,
    ):
        passes = client_engine._executor.train

        def counted(tasks, owners):
            fake.stops.clear()
            found = passes(tasks, owners)
            stops[len(tasks)] = list(fake.stops)
            return found

        client_engine._executor.train = counted
        for micro in (1, 4):
            client_engine.train_step([random_step(3, 2, micro)], 0.1)
        client_engine.close()
    leave_world()
    return found, errors, stops


@pytest.fixture(scope="module")
def fake_runs(bases, tmp_path_factory):
    [found] = run_clusters([1], under_the_fake, bases["llama"], tmp_path_factory.mktemp("nvme"), 12)
    return found


def test_block_inputs_come_in_order_under_every_schedule(fake_runs):
    for races, off, _ in fake_runs[0]:
        assert races == []
        assert off < 1e-5
    assert any(copies for *_, copies in fake_runs[0])


def test_no_micro_batch_stops_the_host(fake_runs):
    stops = fake_runs[2]
    assert stops[4] == stops[1]
    assert len(stops[1]) <= 1, "the losses, all at once"


@pytest.mark.parametrize("error", BROKEN)
def test_an_order_that_is_missing_is_found(fake_runs, error):
    assert fake_runs[1][error] > 0


def compiled_losses(rank, base, nvme):
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    found = {}
    for compiled in (False, True):
        with engine(
            base, "ram", adapter=LORA, nvme=nvme, join=False, options=EngineConfig(compile_blocks=compiled)
        ) as client_engine:
            client_engine.load(stirred(client_engine.state()))
            found[compiled] = [
                client_engine.train_step([next(steps_of([seed]))], 0.1)[0].loss for seed in range(3)
            ]
            functions = len(client_engine._executor.stage.compute._compiled._function_of) if compiled else 0
            client_engine.close()
    leave_world()
    return found, functions


@pytest.mark.slow
@pytest.mark.parametrize("family,kinds", [("llama", 1), ("qwen2", 2)])
def test_compiled_blocks_give_the_same_losses(bases, tmp_path, family, kinds):
    [(found, functions)] = run_clusters([1], compiled_losses, bases[family], tmp_path)
    assert functions == kinds, "one for each kind of block"
    assert found[True] == pytest.approx(found[False], rel=1e-5)
