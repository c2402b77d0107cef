"""DeepSpeed's pipeline, for clients: stages cut where the planner says, instructions of our own streams,
transfers that nobody waits for.

`PipelineEngine` executes a stream by looking up each instruction in `_INSTRUCTION_MAP`, by its exact type; a
subclass has to give a map of its own. The optimizers of clients are DeepSpeed engines of their own
(`client_state`): this one executes and has none.
"""

import contextlib
import io
from collections.abc import Callable, Sequence

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from fedspeed.engine.pipeline.transfers import Transfers, naming_lost_ranks
from fedspeed.engine.player import Note, Player, StageCompute, StreamSchedule
from fedspeed.errors import LostPeerError
from fedspeed.schedule.instructions import Stream


class FederatedPipelineModule(PipelineModule):
    """The blocks of a model, cut into chunks; a rank registers those of its own.

    Args:
        holders: the rank of each chunk. All ranks of the torch world form the pipeline.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], chunks: Sequence[range], holders: Sequence[int], ranks: int
    ):
        held = [
            [b for k, chunk in enumerate(chunks) if holders[k] == rank for b in chunk]
            for rank in range(ranks)
        ]
        self._cuts = [sum(map(len, held[:rank])) for rank in range(ranks + 1)]
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its seeds
            super().__init__(
                layers=[blocks[b] for own in held for b in own],
                topology=ProcessTopology(axes=["pipe", "data"], dims=[ranks, 1]),
            )

    def _partition_layers(self, method: str = "") -> None:
        """Where the planner cuts. DeepSpeed's own methods weigh all stages alike, and count trainable
        parameters only.
        """
        self.parts = self._cuts
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class FederatedPipelineEngine(PipelineEngine, Player):
    """Executes instruction streams by DeepSpeed's loop. Collective over the torch world when built.

    Args:
        config: DeepSpeed's, without optimizer and ZeRO.
    """

    _INSTRUCTION_MAP = Player._INSTRUCTION_MAP

    def __init__(self, module: FederatedPipelineModule, config: dict):
        mpu = module.mpu()
        super().__init__(
            args=None,
            model=module,
            mpu=mpu,
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
        )

    def _configure_bf16_optimizer(self, optimizer):
        return super()._configure_bf16_optimizer(optimizer) if optimizer is not None else None

    def play(
        self, stream: Stream, chunks: int, stage: StageCompute, transfers: Transfers, note: Note
    ) -> None:
        """Execute this rank's stream.

        Args:
            chunks: of the whole model. note: told of each instruction.

        Raises:
            LostPeerError: another rank is gone; says in which instruction of this one.
        """
        schedule = StreamSchedule(stream)
        with _naming_instruction(schedule):
            transfers.begin()
            self.execute(schedule, chunks=chunks, computes=stage, carries=transfers, note=note)
            transfers.finish()

    def play_steps(self, stream: Stream, step: Callable[[int], None], note: Note) -> None:
        """Execute the optimizer steps of some clients; `step` takes that of one.

        Raises:
            LostPeerError: see `play`.
        """
        schedule = StreamSchedule(stream)
        with _naming_instruction(schedule):
            self.execute_steps(schedule, step, note)


@contextlib.contextmanager
def _naming_instruction(schedule: StreamSchedule):
    """Say of a rank that is lost in which instruction it was missed."""
    try:
        yield
    except LostPeerError as error:
        raise LostPeerError(
            f"{error} (in {schedule.current}); the same command resumes from the journal"
        ) from error
    except RuntimeError as error:  # in DeepSpeed's own collectives, which a Step has
        with naming_lost_ranks(f"in {schedule.current}"):
            raise error
