"""DeepSpeed's pipeline engine with stages that the planner chooses, instruction streams of our own, and
asynchronous transfers.

`PipelineEngine` looks up each instruction in `_INSTRUCTION_MAP` by its exact type, and a subclass provides
its own map. The clients' optimizers belong to other DeepSpeed engines (`client_state`); this engine only
executes.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from fedspeed.engine.instruction_executor import InstructionExecutor, StageCompute, StreamSchedule, TraceSpan
from fedspeed.engine.pipeline.transfers import Transfers, naming_lost_ranks
from fedspeed.errors import LostPeerError
from fedspeed.schedule.instructions import Stream


class FederatedPipelineModule(PipelineModule):
    """The blocks of a model, divided into chunks. Each rank registers the blocks of its own chunks.

    Args:
        chunks: block numbers of each chunk.
        holders: the rank of each chunk.
        ranks: number of ranks; all ranks of the torch world form the pipeline.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], chunks: Sequence[range], holders: Sequence[int], ranks: int
    ):
        layers = list(blocks)
        blocks_of = [
            [b for k, chunk in enumerate(chunks) if holders[k] == rank for b in chunk]
            for rank in range(ranks)
        ]
        self._cuts = [sum(map(len, blocks_of[:rank])) for rank in range(ranks + 1)]
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its seeds
            super().__init__(
                layers=[layers[b] for numbers in blocks_of for b in numbers],
                topology=ProcessTopology(axes=["pipe", "data"], dims=[ranks, 1]),
            )

    def _partition_layers(self, method: str = "") -> None:
        """Divide the layers where the planner says. DeepSpeed's own methods assume equal ranks, and count
        trainable parameters only.
        """
        self.parts = self._cuts
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class FederatedPipelineEngine(PipelineEngine, InstructionExecutor):
    """Execute instruction streams in DeepSpeed's loop. Building it is collective over the torch world.

    Args:
        config: DeepSpeed section without optimizer and ZeRO.
    """

    _INSTRUCTION_MAP = InstructionExecutor._INSTRUCTION_MAP

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

    def _configure_bf16_optimizer(self, optimizer: Any) -> Any:
        return super()._configure_bf16_optimizer(optimizer) if optimizer is not None else None

    def play(
        self, stream: Stream, chunks: int, stage: StageCompute, transfers: Transfers, trace: TraceSpan
    ) -> None:
        """Execute this rank's stream.

        Args:
            chunks: number of chunks of the whole model.
            trace: called after each instruction.

        Raises:
            LostPeerError: another rank is gone; the message names this rank's instruction.
        """
        schedule = StreamSchedule(stream)
        with _naming_instruction(schedule):
            transfers.begin()
            self.execute(schedule, chunks=chunks, compute=stage, channel=transfers, trace=trace)
            transfers.finish()

    def play_steps(self, stream: Stream, step: Callable[[int], None], trace: TraceSpan) -> None:
        """Execute the optimizer steps of some clients; `step` takes that of one client slot.

        Raises:
            LostPeerError: see `play`.
        """
        schedule = StreamSchedule(stream)
        with _naming_instruction(schedule):
            self.execute_steps(schedule, step, trace)


@contextlib.contextmanager
def _naming_instruction(schedule: StreamSchedule) -> Iterator[None]:
    """Add the current instruction to the message when another rank is lost."""
    try:
        yield
    except LostPeerError as error:
        raise LostPeerError(
            f"{error} (in {schedule.current}); the same command resumes from the journal"
        ) from error
    except RuntimeError as error:  # from DeepSpeed's own collectives in the instruction Step
        with naming_lost_ranks(f"in {schedule.current}"):
            raise error
