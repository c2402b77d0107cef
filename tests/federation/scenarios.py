"""Runs that test_federation_rounds.py looks at, by world: configurations, and what each rank plays."""

import time
from itertools import product

from tests.federation import runs
from tests.federation.runs import Notes, course, federation, settings
from tests.limits import LIMIT_S
from tests.processes import Scenarios

APART = {0: (0,), 1: (1,), 2: (2,)}


METHODS = ("lora", "full")


FREEZING = {  # what could change a frozen array: momentum and decay of either optimizer, kept or reset
    "freeze_a": {"train": {"weight_decay": 0.1}},
    "alternate": {"train": {"weight_decay": 0.1, "optimizer": "adamw", "momentum": 0.0, "lr": 0.01}},
    "alternate, kept": {"train": {"weight_decay": 0.1}, "local_optimizer": "keep"},
}


def one_step(base, method):
    return settings(
        base,
        train={"local_steps": 1, "micro_batch": 4, "momentum": 0.0, "lr": 0.5},
        adapter={"method": method},
        federation={"rounds": 1},
    )


def two_rounds(base, **train):
    return settings(base, train=train, federation={"rounds": 2})


def sampled(base):
    """One client a round, so that most ranks have nobody to train; evaluated at the end only."""
    return settings(base, federation={"rounds": 3, "clients_per_round": 1, "evaluate_every": 3})


MASKED = [("avg_factors", "fp32"), ("alternate", "fp32"), ("alternate", "fp16"), ("freeze_a", "bf16")]


LARGE_STEPS = {"local_steps": 1, "lr": 40.0, "momentum": 0.0}


def large_steps(base, rule, dtype, mode):
    """A first round that moves weights by far more than a second one could expect; then, under `alternate`,
    other weights.
    """
    return settings(
        base,
        dtype=dtype,
        train=LARGE_STEPS,
        routing={"mode": mode, "cell_kib": 64},
        federation={"rounds": 2, "method": {"name": "lora_average", "rule": rule}},
    )


def slowly_reported(base, stale):
    return settings(base, federation={"rounds": 3, "staleness": stale})


class SlowReporter(Notes):
    """Takes its time over a record, so that the other ranks are in the next round by then and wait."""

    def round(self, record):
        super().round(record)
        if record.round == 1:
            time.sleep(2.0)


def default_server_optimizer(base, kind, seed):
    """Everything about the server optimizer but its kind by default."""
    return settings(
        base,
        train={"local_steps": 1},
        adapter={"method": "full"},
        run={"seed": seed},
        federation={"rounds": 4, "server_optimizer": kind},
    )


def freezing(base, case):
    options = dict(FREEZING[case])
    method = {"name": "lora_average", "rule": case.split(",")[0]}
    return settings(base, train=options.pop("train"), federation={"rounds": 2, "method": method, **options})


def ranks_apart(world, base, folder):
    svd = settings(
        base,
        train={"optimizer": "adamw", "lr": 0.05},
        federation={"rounds": 1, "method": {"name": "flexlora"}},
    )
    out = Scenarios()
    for method in METHODS:
        out.play_together(world, method, course, method, one_step(base, method), APART, folder)
    out.play_together(world, "two rounds", course, "two", two_rounds(base), APART, folder)
    for case in FREEZING:
        out.play_together(world, case, course, case, freezing(base, case), APART, folder)
    out.play_together(world, "svd", course, "svd", svd, APART, folder)
    for stale in (0, 1):
        out.play_together(
            world,
            f"slow reporter, {stale}",
            uninterrupted,
            f"slow-{stale}",
            slowly_reported(base, stale),
            folder,
        )
    for rule, dtype in MASKED:
        for mode in ("plain", "mask"):
            out.play_together(
                world,
                (rule, dtype, mode),
                course,
                f"{rule}-{dtype}-{mode}",
                large_steps(base, rule, dtype, mode),
                APART,
                folder,
            )
    if world.rank < 2:
        out.play("unequal", unequal_clusters, world, base, folder)
    # From here on every rank has work of its own.
    if world.rank == 0:
        from tests.federation import plain

        for method in METHODS:
            out.play(
                f"plain {method}",
                lambda method=method: plain.one_step_on_the_mean(
                    one_step(base, method), out[method].states[0]
                ),
            )
        out.play("plain two rounds", lambda: plain.fedavg(two_rounds(base), out["two rounds"].states[0]))
        out.play("plain alone", lambda: plain.alone(two_rounds(base), out["two rounds"].states[0]))
        out.play("on one rank", course, world, "one", two_rounds(base), carries={0: (0, 1, 2)}, folder=folder)
        out.play(
            "in one pass",
            course,
            world,
            "in-one-pass",
            two_rounds(base),
            carries={0: (0, 1, 2)},
            folder=folder,
            kind="ram",
        )
        out.play("sampled", course, world, "sampled", sampled(base), carries={0: (0, 1, 2)}, folder=folder)
    elif world.rank == 1:
        for case in product(("zero0", "zero2", "zero3"), KEPT, ("keep", "reset", "one round")):
            stage, optimizer, how = case
            out.play(
                case, run_with_kept_optimizer, world, base, folder, kind=stage, optimizer=optimizer, how=how
            )
    else:
        for kind, seed in product(("adam", "yogi"), range(3)):
            out.play(
                (kind, seed),
                course,
                world,
                f"{kind}-{seed}",
                default_server_optimizer(base, kind, seed),
                carries={2: (0, 1, 2)},
                folder=folder,
            )
        constant = settings(base, clients=1, train={"lr": 0.0}, federation={"rounds": 9, "patience": 2})
        out.play("constant", course, world, "constant", constant, carries={2: (0,)}, folder=folder)
    return out


def uninterrupted(world, name, config, folder):
    """Records of a run that nobody asks to stop."""
    notes = SlowReporter()
    with federation(world, name, config, APART, folder, notes=notes) as fed:
        fed.run(runs.begin(fed))
    return notes.records


KEPT = {
    "sgd": {"lr": 0.1, "schedule": "linear"},
    "adamw": {"optimizer": "adamw", "momentum": 0.0, "lr": 0.01, "schedule": "cosine"},
}


def run_with_kept_optimizer(world, base, folder, kind, optimizer, *, how):
    """Four local steps of a single client: in four rounds that keep or reset the optimizer, or in one round;
    one learning-rate schedule.
    """
    steps, rounds = (4, 1) if how == "one round" else (1, 4)
    config = settings(
        base,
        clients=1,
        train={**KEPT[optimizer], "local_steps": steps},
        federation={"rounds": rounds, "local_optimizer": "reset" if how == "reset" else "keep"},
    )
    return course(world, f"{kind}-{optimizer}-{how}", config, carries={1: (0,)}, folder=folder, kind=kind)


class Events:
    """Lines that several processes append to one file."""

    def __init__(self, path):
        self.path = path

    def note(self, text):
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"{text}\n".encode())

    def seen(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


class Watched:
    """An exchange that notes when this rank brings its update."""

    def __init__(self, exchange, note):
        self._exchange = exchange
        self._note = note

    def __getattr__(self, name):
        return getattr(self._exchange, name)

    def start(self, vector, weight, parts=None, **options):
        if weight:
            self._note()
        return self._exchange.start(vector, weight, parts, **options)


class SlowNotes(Notes):
    """Takes the last step of a round only once the fast cluster has brought its update: ranks that waited for
    each other would hang.
    """

    def __init__(self, events):
        super().__init__()
        self._events = events

    def step(self, round_number, local_step, local_steps, loss=None):
        super().step(round_number, local_step, local_steps, loss)
        self._events.note(f"slow step {local_step} of round {round_number}")
        end = time.monotonic() + LIMIT_S
        while local_step == local_steps - 1 and self._events.seen().count("fast update") < round_number:
            assert time.monotonic() < end, f"the fast cluster brought no update in round {round_number}"
            time.sleep(0.01)


def unequal_clusters(world, base, folder):
    from pathlib import Path

    events = Events(Path(folder) / "events")
    config = settings(
        base,
        clients=2,
        train={"local_steps": 1, "local_steps_by_cluster": {"cluster1": 3}},
        federation={"rounds": 2},
    )
    who, notes = ("fast", Notes()) if world.cluster == 0 else ("slow", SlowNotes(events))
    seen = course(
        world,
        "unequal",
        config,
        {0: (0,), 1: (1,)},
        folder,
        notes=notes,
        watch=lambda exchange: Watched(exchange, lambda: events.note(f"{who} update")),
    )
    return seen, events.seen()


def ranks_together(world, base, folder):
    out = Scenarios()
    for kind, method in product(("zero0", "zero3"), METHODS):
        out.play_together(
            world,
            (kind, method),
            course,
            f"{kind}-{method}",
            one_step(base, method),
            APART,
            folder,
            kind=kind,
        )
    out.play_together(world, "two rounds", course, "two", two_rounds(base), APART, folder, kind="zero3")
    for kind, case in product(("zero2", "zero3"), FREEZING):
        out.play_together(
            world, (kind, case), course, f"{kind}-{case}", freezing(base, case), APART, folder, kind=kind
        )
    return out


SHARED = {0: (0, 2), 1: (1,)}  # rank 1 idles through half of every round


BOTH = {0: (0, 1, 2), 1: (0, 1, 2)}  # every client has two ranks


def ranks_in_a_pair(world, base, folder):
    out = Scenarios()
    counted = ended_work()
    for kind in ("zero0", "zero3", "cluster"):
        out.play_together(
            world, ("shared", kind), course, f"shared-{kind}", two_rounds(base), SHARED, folder, kind=kind
        )
    for kind in ("zero0", "zero2", "zero3", "client", "cluster"):
        out.play_together(
            world,
            ("both", kind),
            course,
            f"both-{kind}",
            two_rounds(base, micro_batch=1),
            BOTH,
            folder,
            kind=kind,
        )
    for kind in ("zero3", "cluster"):
        out.play_together(
            world, ("sampled", kind), course, f"sampled-{kind}", sampled(base), SHARED, folder, kind=kind
        )
        out.play_together(world, ("compared", kind), compared, base, folder, kind)
    out.play_together(
        world,
        ("both", "frozen"),
        course,
        "both-frozen",
        freezing(base, "alternate, kept"),
        BOTH,
        folder,
        kind="zero3",
    )
    out.play("counted", list, counted)
    return out


def ended_work():
    """A list that every piece of work joins as it ends: (name, unit, total, done)."""
    from contextlib import contextmanager

    from fedspeed import activity

    during = activity.during
    ended = []

    @contextmanager
    def watched(*args, **options):
        with during(*args, **options):
            work = activity.current()
            yield
            ended.append((work.name, work.unit, work.total, work.done))

    activity.during = watched
    return ended


def compared(world, base, folder, kind):
    from fedspeed.evaluation.compare import compare

    with federation(
        world, f"compared-{kind}", two_rounds(base), carries=SHARED, folder=folder, kind=kind
    ) as fed:
        progress = runs.begin(fed)
        start = progress.state
        end = fed.run(progress)
        everyone = [runs.client_data(c) for c in range(3)]
        return compare(fed.parts, end, start=start, client_data=everyone)


def uneven_evaluation(world, base, folder):
    return {
        part: course(
            world,
            part,
            two_rounds(base, micro_batch=1),
            carries=BOTH,
            folder=folder,
            kind="zero3",
            base_partition=part,
        )
        for part in ("client", "rank")
    }
