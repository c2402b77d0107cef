"""The simulated comparison: each baseline's formula against a computation by hand."""

from dataclasses import replace

import pytest

from benchmarks.compare.simulated import steps
from benchmarks.compare.simulated.cases import Case, capped, placed, shape_of
from benchmarks.compare.simulated.exchange import anonymous_s, exchange_s, instance
from benchmarks.compare.simulated.fedspeed import CHOSEN, LEAST, OVERLAPPED, trained
from benchmarks.compare.simulated.outcome import BEST, ONE_ROW, PUBLISHED, PUBLISHED_BATCH, outcomes
from benchmarks.compare.simulated.search import causes_of, ratio_of, search
from benchmarks.compare.simulated.values import found_values
from fedspeed.cluster.hostfile import read
from fedspeed.planner.many_clients import MESSAGE_S
from fedspeed.planner.memory import sizes
from fedspeed.planner.simulate import MODELS, Strategy, scale
from fedspeed.planner.timing import seconds_of
from tests.conftest import ROOT

HOSTS = read(ROOT / "hostfiles" / "hetero10").hosts
LINK = 10e9 / 8 * 0.88


def case_of(model: str = MODELS[1], *, rows: int = 4, tokens: int = 512) -> Case:
    return Case(shape_of(model), 9, epoch=7_954, tokens=tokens, rows=rows, hosts=tuple(HOSTS))


def test_stock_zero_loads_every_block_twice_for_every_micro_batch():
    placement = placed("zero3_offload", case_of(tokens=128))
    rank = placement.kinds["rtx2080ti"]
    task = placement.task
    setting = steps.stock_setting(1, 4, checkpointing=True)
    causes = steps.offloaded(task, setting, rank)
    unit = sizes(task.shape, 2)
    loads = 4 * (2 * 28 * unit.block + unit.embedding + unit.head) / 12e9
    arithmetic = sum(causes[cause] for cause in steps.ARITHMETIC)
    assert loads > arithmetic
    assert causes["waiting for loads"] == pytest.approx(loads - arithmetic)
    four_rows = steps.stock_setting(4, 1, checkpointing=True)
    assert steps.offloaded(task, four_rows, rank)["waiting for loads"] < loads / 4


def test_a_direction_is_two_forward_passes_and_no_backward():
    placement = placed("spry", case_of())
    rank = placement.ranks[0]
    setting = steps.stock_setting(4, 1, checkpointing=False)
    backward = seconds_of(placement.task, setting, rank).causes
    causes = steps.forward_mode(placement.task, setting, rank, directions=3)
    assert causes["forward"] == pytest.approx(6 * backward["forward"])
    assert causes["gradients"] == causes["again"] == 0
    assert causes["head"] == pytest.approx(3 * 0.5 * backward["head"])


def test_fedbiot_differentiates_the_adapter_and_aligns_after_each_round():
    case = case_of(MODELS[0])
    found = outcomes("fedbiot", case, BEST)
    causes = found.steps["rtx3090"]
    assert causes["gradients"] < 0.15 * causes["forward"]  # 2 of 23 blocks
    placement = placed("fedbiot", case)
    server = replace(placement.task, adapted_blocks=23)
    one = steps.alignment_step(server, steps.stock_setting(1, 1, checkpointing=False), placement.server)
    assert found.server == pytest.approx(10 * sum(one.values()))
    assert found.first == pytest.approx(5 * found.server)


def test_clients_of_split_learning_take_turns():
    found = outcomes("m2fedsa", case_of(), BEST)
    fast, slow = (sum(found.steps[kind].values()) for kind in ("rtx3090", "rtx2080ti"))
    assert found.in_turn == pytest.approx(6 * fast + 3 * slow)  # the first 3090 server is the method's
    causes = found.steps["rtx3090"]
    message = 2 * 512 * 3584 * 2 / LINK + MESSAGE_S
    assert found.setting == "4 x 1 rows a rank"
    assert causes["messages"] == pytest.approx(4 * 4 * message)


def test_exchanges_have_the_bytes_of_the_methods():
    for method, n in (("fs_llm", 9), ("fate_llm", 9)):
        placement = placed(method, case_of())
        values = instance(placement).values(1)
        nbytes = {"fs_llm": 2 * (n - 1) / n * 4 * values, "fate_llm": (n - 1) * 24 * values}[method]
        assert exchange_s(placement, 10) == pytest.approx(nbytes / LINK + 2 * n * MESSAGE_S)
    every_step = placed("spry_iteration", case_of())
    assert exchange_s(every_step, 20) == pytest.approx(2 * exchange_s(every_step, 10))


def test_fedspeeds_own_exchange_is_that_of_the_simulator():
    case = case_of()
    placement = placed("lora_average", case)
    values = instance(placement).values(1)
    task = replace(placement.task, lora_rank=8)
    masked = scale(task, Strategy("", "", step=1.0, rows=1), LINK, 9).masked
    # The simulator leaves out the sketch, 16 values for each of two matrices in 28 blocks.
    assert values == task.trainable + 16 * 2 * 28
    assert anonymous_s(placement) == pytest.approx(masked, rel=0.01)


def test_published_batches_and_the_same_rows():
    case = case_of(MODELS[0], rows=16, tokens=128)
    assert outcomes("fs_llm", case, PUBLISHED).setting == "1 x 1 rows a rank"
    assert outcomes("fs_llm", case, PUBLISHED_BATCH).setting == "16 x 1 rows a rank"
    assert outcomes("fs_llm_offload", case, PUBLISHED_BATCH).setting == "4 x 4 rows a rank"
    assert outcomes("zero3_offload", case, ONE_ROW).setting == "16 x 1 rows a rank"
    assert outcomes("spry", case, PUBLISHED).local_steps == pytest.approx(7_954 / 9 / 16)


def test_a_cap_says_what_would_be_needed():
    case = replace(case_of(), hosts=capped(HOSTS, 11))
    found = outcomes("fs_llm", case, BEST)
    assert not found.fits
    assert all(f"{kind} needs" in found.shortage for kind in ("rtx3090", "rtx2080ti"))
    assert "of 10.2 on the device" in found.shortage
    assert trained(case)[CHOSEN].fits


def test_causes_of_an_epoch_add_up():
    for method in ("zero3_offload", "fedbiot", "m2fedsa", "fate_llm"):
        found = outcomes(method, case_of(MODELS[0]), BEST)
        assert sum(causes_of(found).values()) == pytest.approx(3600 * found.hours), method


def test_ratios_have_the_mechanism_that_makes_them():
    case = case_of(MODELS[0])
    own = trained(case)
    assert own[LEAST].device_bytes < own[CHOSEN].device_bytes
    assert own[OVERLAPPED].round < own[CHOSEN].round
    same = ratio_of(case, own[CHOSEN], own[CHOSEN])
    assert (same.time, same.rate, same.mechanism) == (1.0, 1.0, "")
    split = ratio_of(case, outcomes("m2fedsa", case, BEST), own[CHOSEN])
    assert split.mechanism.startswith("clients in turn")
    assert split.time > 5


def test_a_search_tells_what_cannot_run():
    found = {(one.baseline, one.variant): one for one in search([case_of(rows=16), case_of(MODELS[0])])}
    resident = found["fs_llm", BEST]
    assert (resident.runs, resident.cases) == (1, 2)
    assert resident.short == {f"{MODELS[1]}, RTX-3090, RTX-2080-Ti": 1} and resident.refused == 0
    assert resident.missions_time is None
    stock = found["zero3_offload", BEST]
    assert stock.missions_time is not None and stock.missions_time.case.shape.name == MODELS[1]
    assert stock.time is not None and stock.rate is not None
    for time, rate, reached in ((16.99, 17.99, False), (17.0, 18.0, True)):
        made_up = replace(stock, time=replace(stock.time, time=time), rate=replace(stock.rate, rate=rate))
        values = found_values(made_up)
        assert values["time"]["reached"] is values["throughput"]["reached"] is reached


def test_a_mechanism_of_throughput_is_one_of_local_steps():
    case = case_of(MODELS[0], rows=1)
    alignment = ratio_of(case, outcomes("fedbiot", case, BEST), trained(case)[CHOSEN])
    assert alignment.mechanism.startswith("a server's steps") and alignment.rate_mechanism == ""
    many = case_of(MODELS[0], rows=16)
    one_row = ratio_of(many, outcomes("zero3_offload", many, ONE_ROW), trained(many)[CHOSEN])
    assert one_row.mechanism.startswith("waiting for loads that only the rows of a micro-batch share")
    small = ratio_of(many, outcomes("fs_llm", many, ONE_ROW), trained(many)[CHOSEN])
    assert small.mechanism.startswith("arithmetic in smaller micro-batches")
