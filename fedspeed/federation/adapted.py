"""Until the engine itself has them: gradients and step apart, over one train_step."""


class Adapted:
    capabilities = frozenset({"gradients"})

    def __init__(self, engine):
        self._inner, self._work = engine, None

    def __getattr__(self, name):
        return getattr(self._inner, name)

    @property
    def client_slots(self):
        return self._inner.seats

    def load(self, state, optimizer=None, *, frozen=frozenset(), seed=0, slot=0):
        self._inner.load(state, optimizer, frozen, seed, slot)

    def gradients(self, work):
        self._work, self._sums = work, [None] * len(work)
        return self._sums

    def step(self, lr):
        self._sums[:] = self._inner.train_step(self._work, lr)
        return [bool(s.steps) for s in self._sums]


def adapted(engine):
    return engine if hasattr(engine, "gradients") else Adapted(engine)
