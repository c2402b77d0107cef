"""The evaluation after each round: the held-out loss, and the number of answers that greedy decoding
reproduces exactly.
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
    """Evaluates a model on the held-out rows of this rank's clients; the ranks of a client divide its rows.
    It is an evaluator (federation.evaluators).
    """

    def __init__(self, train: TrainConfig, role: RankRole):
        self._train = train
        self._role = role

    def __call__(
        self, engine: ClientEngine, state: Arrays, name: str, clients: Collection[int] | None = None
    ) -> dict[int, dict[str, float]]:
        """Return, by client, the sums of the loss (val_loss), of answer tokens (val_tokens), exact answers
        (exact) and rows (rows). See `federation.evaluators.Evaluator`.
        """
        shares, share = engine.data_share
        size = self._train.micro_batch
        evaluated_clients = [client for client in self._role.clients if clients is None or client in clients]
        data = [self._role.clients[client] for client in evaluated_clients]
        work = [eval_batches(rows.val[share::shares], size, rows.pad_id, rows.limit) for rows in data]
        with activity.during(name, sum(map(len, work)), "batch"):
            engine.load(as_torch(state))
            with engine.matched_passes(engine.eval_passes(work), backward=False):
                results = engine.evaluate(work)
        return {
            client: {"val_loss": sums.loss, "val_tokens": sums.tokens, "exact": sums.exact, "rows": sums.rows}
            for client, sums in zip(evaluated_clients, results)
        }
