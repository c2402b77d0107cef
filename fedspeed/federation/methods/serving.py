"""The members of a method (`methods.base.Method`) that has a server: what the server computes, while clients
train or evaluate and after each exchange.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedspeed.data.clients import ClientData
from fedspeed.engine.capabilities import Capability
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.turns import TurnTrainer
from fedspeed.federation.shared_channel import SharedChannel

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine


class Serving:
    """What a method does on its server; by default nothing.

    Attributes:
        server_needs: capabilities of the server's engine (engine.capabilities.Capability).
    """

    server_needs: ClassVar[frozenset[Capability]] = frozenset()

    def serve(
        self,
        engine: "ClientEngine",
        channel: SharedChannel,
        round: int,
        exchange: int,
        *,
        clients: Sequence[int],
        state: Arrays,
        trainer: TurnTrainer,
    ) -> None:
        """Answer the clients while they are in `train`, until they have finished the exchange; on the server
        only. Clients call `Trainer.ask`. If the server has several ranks, all of them call this together.

        Args:
            channel: to all clients. The gateway of the server's ranks sends; all of them receive.
            clients: of the round, in the order of their turns. Clients that share a rank take their turns one
                after the other, and ranks that share a base wait for each other, so a server that answers in
                another order deadlocks. `channel.speakers` has the participant to send to, by client.
            state: that the turns start from. It is not loaded into the engine.
            trainer: the server's own; it knows the learning rates of a round (`round_lr`).
        """

    def served_problem(self) -> str:
        """Return why the round that was served last must not count; empty if it may. The server's ranks, on
        which it is the same, take no `server_step` then, and the run ends with it on all ranks. An error that
        is raised in `serve` ends the server alone, and the others miss it.
        """
        return ""

    @classmethod
    def server_slots(cls, config: Any, participants: int) -> int:
        """Return the number of client slots of the server's engine.

        Args:
            config: the method's options. participants: gateways of clients.
        """
        return 1

    def evaluating(
        self, engine: "ClientEngine", trainer: TurnTrainer
    ) -> contextlib.AbstractContextManager[object]:
        """Return the context in which an engine of clients evaluates models on their held-out rows. A method
        whose clients have a part of the model only reaches the server in it (`serve_evaluation`).
        """
        return contextlib.nullcontext()

    def serve_evaluation(
        self, engine: "ClientEngine", channel: SharedChannel, state: Arrays, *, trainer: TurnTrainer
    ) -> None:
        """Answer the clients while they evaluate `state`, until all have finished; on the server only. All
        participants evaluate at the same time, each all of its clients.

        Args:
            trainer: the server's own.
        """

    def server_step(
        self,
        state: Arrays,
        engine: "ClientEngine",
        public_rows: ClientData | None,
        *,
        round: int,
        exchange: int,
        trainer: TurnTrainer,
    ) -> Arrays:
        """Return the state after the server's own step, with the same names and shapes; it is sent to all
        ranks. If the server has several ranks, all of them call this together.

        Args:
            state: after the aggregate and the server optimizer; in round 0, the state before any training.
            engine: the server's own, see `spec`.
            public_rows: the encoded rows of federation.public_rows (only `train` has any); None where the
                method reads none (`Entry.public_rows`).
            round: 0 once before round 1 and its evaluation; that result is journalled with round 0.
            exchange: of the round, from 0.
            trainer: the server's own. It draws this rank's batches of the public rows (`public_batches`) and
                knows the learning rate of a round (`round_lr`).
        """
        return state
