"""The held-out loss, and how many answers greedy decoding would give exactly: what every round is measured
by.
"""

from collections.abc import Collection

from fedspeed import activity
from fedspeed.data.batches import eval_batches
from fedspeed.data.config import TrainConfig
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.role import RankRole
from fedspeed.federation.tensors import as_torch


class HeldOut:
    """Evaluates a model on the rows that this rank's clients hold out; the ranks of a client share its rows.
    An evaluator (federation.evaluators).
    """

    def __init__(self, train: TrainConfig, role: RankRole):
        self._train = train
        self._role = role

    def __call__(
        self, engine: ClientEngine, state: Arrays, name: str, clients: Collection[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """Return sums of loss (val_loss), answer tokens (val_tokens), exact answers (exact) and rows (rows)
        by client. See `federation.evaluators.Evaluator`.
        """
        (shares, share) = engine.data_share
        size = self._train.micro_batch
        chosen = [client for client in self._role.clients if clients is None or client in clients]
        data = [self._role.clients[client] for client in chosen]
        work = [eval_batches(own.val[share::shares], size, own.pad_id, own.limit) for own in data]
        with activity.during(name, sum(map(len, work)), "batch"):
            engine.load(as_torch(state))
            with engine.matched_passes(engine.eval_passes(work), backward=False):
                evaluated = engine.evaluate(work)
        return {
            client: {"val_loss": sums.loss, "val_tokens": sums.tokens, "exact": sums.exact, "rows": sums.rows}
            for client, sums in zip(chosen, evaluated)
        }
