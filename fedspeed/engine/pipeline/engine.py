"""DeepSpeed's pipeline, for clients: stages cut where the planner says, instructions of our own streams, transfers that nobody waits for.

`PipelineEngine` executes a stream by looking up each instruction in `_INSTRUCTION_MAP`, by its exact type; a subclass has to give a map of its own.
The optimizers of clients are DeepSpeed engines of their own (`client_state`): this one executes and has none.
"""

import contextlib
import io
import time
from collections.abc import Callable, Sequence

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import nn

from fedspeed.engine.pipeline.stage import Stage
from fedspeed.engine.pipeline.transfers import Transfers, losses_named
from fedspeed.errors import LostPeerError
from fedspeed.schedule.instructions import Backward, Embed, Forward, Head, Kind, Load, Receive, Release, Send, Step, Stream


class FederatedPipelineModule(PipelineModule):
    """The blocks of a model, cut into chunks; a rank registers those of its own.

    Args:
        holders: the rank of each chunk. All ranks of the torch world form the pipeline.
    """

    def __init__(self, blocks: Sequence[nn.Module], chunks: Sequence[range], holders: Sequence[int], ranks: int):
        held = [[b for k, chunk in enumerate(chunks) if holders[k] == rank for b in chunk] for rank in range(ranks)]
        self._cuts = [sum(map(len, held[:rank])) for rank in range(ranks + 1)]
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its seeds
            super().__init__(layers=[blocks[b] for own in held for b in own], topology=ProcessTopology(axes=["pipe", "data"], dims=[ranks, 1]))

    def _partition_layers(self, method: str = "") -> None:
        """Where the planner cuts. DeepSpeed's own methods weigh all stages alike, and count trainable parameters only."""
        self.parts = self._cuts
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


# Told of each instruction: its kind (monitor.trace.KINDS), itself, when it began and ended.
Note = Callable[[str, str, float, float], None]


def timed(kind: str):
    """Tells the engine's `note` how long an instruction took."""
    def around(method):
        def noted(self, **kwargs):
            begin = time.perf_counter()
            method(self, **kwargs)
            self._note(kind, f"{method.__name__.removeprefix('_exec_')} {' '.join(map(str, kwargs.values()))}", begin, time.perf_counter())

        return noted

    return around


class FederatedPipelineEngine(PipelineEngine):
    """Executes instruction streams. Collective over the torch world when built.

    Args:
        config: DeepSpeed's, without optimizer and ZeRO.
    """

    def __init__(self, module: FederatedPipelineModule, config: dict):
        mpu = module.mpu()
        super().__init__(args=None, model=module, mpu=mpu, dist_init_required=False, config=config, config_class=DeepSpeedConfig(config, mpu))

    def _configure_bf16_optimizer(self, optimizer):
        return super()._configure_bf16_optimizer(optimizer) if optimizer is not None else None

    def play(self, stream: Stream, chunks: int, stage: Stage, transfers: Transfers, note: Note) -> None:
        """Execute this rank's stream.

        Args:
            chunks: of the whole model. note: told of each instruction.

        Raises:
            LostPeerError: another rank is gone; says in which instruction of this one.
        """
        self._chunks, self._stage, self._transfers, self._note = chunks, stage, transfers, note
        self._held: dict[tuple[int, Kind, int], object] = {}
        transfers.begin()
        self._execute(stream)
        transfers.finish()

    def play_steps(self, stream: Stream, step: Callable[[int], None], note: Note) -> None:
        """Execute the optimizer steps of some clients.

        Args:
            step: takes that of a client.

        Raises:
            LostPeerError: see `play`.
        """
        self._step, self._note = step, note
        self._execute(stream)

    def _execute(self, stream: Stream) -> None:
        schedule = _Played(stream)
        try:
            self._exec_schedule(schedule)
        except LostPeerError as error:
            raise LostPeerError(f"{error} (in {schedule.current}); the same command resumes from the journal") from error
        except RuntimeError as error:  # in DeepSpeed's own collectives, which a Step has
            with losses_named(f"in {schedule.current}"):
                raise error

    @timed("compute")
    def _exec_embed(self, micro: int) -> None:
        self._held[micro, "activation", 0] = self._stage.embed(micro)

    @timed("compute")
    def _exec_forward(self, micro: int, chunk: int) -> None:
        self._held[micro, "activation", chunk + 1] = self._stage.forward(micro, chunk, self._held.pop((micro, "activation", chunk)))

    @timed("compute")
    def _exec_head(self, micro: int) -> None:
        self._held[micro, "gradient", self._chunks - 1] = self._stage.head(micro, self._held.pop((micro, "activation", self._chunks)))

    @timed("compute")
    def _exec_backward(self, micro: int, chunk: int) -> None:
        self._held[micro, "gradient", chunk - 1] = self._stage.backward(micro, chunk, self._held.pop((micro, "gradient", chunk)))

    @timed("send")
    def _exec_send(self, micro: int, kind: Kind, hop: int, to: int) -> None:
        self._transfers.send(self._held.pop((micro, kind, hop)), micro, kind, hop, to)

    @timed("wait")
    def _exec_receive(self, micro: int, kind: Kind, hop: int, source: int) -> None:
        self._held[micro, kind, hop] = self._transfers.receive(micro, kind, hop, source)

    @timed("load")
    def _exec_load(self, chunk: int) -> None:
        self._stage.load(chunk)

    @timed("load")
    def _exec_release(self, chunk: int) -> None:
        self._stage.release(chunk)

    @timed("step")
    def _exec_step(self, client: int) -> None:
        self._step(client)

    _INSTRUCTION_MAP = {Embed: _exec_embed, Forward: _exec_forward, Head: _exec_head, Backward: _exec_backward, Send: _exec_send, Receive: _exec_receive,
                        Load: _exec_load, Release: _exec_release, Step: _exec_step}


class _Played:
    """A stream, as DeepSpeed iterates over schedules; remembers where it is."""

    def __init__(self, stream: Stream):
        self._stream, self.current = stream, "the beginning of a pass"

    def __iter__(self):
        for instruction in self._stream:
            self.current = instruction
            yield [instruction]

    @staticmethod
    def num_pipe_buffers() -> int:
        return 0
