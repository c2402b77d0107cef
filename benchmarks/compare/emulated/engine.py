"""An engine with timed compute: it has the adapter of the real model, sleeps where that would be trained, and
returns updates of the real sizes. Base weights, and arithmetic, are missing; all else of a run is real.

`launch.py` puts it in the place of every kind of engine. How long a rank sleeps is read from the file that
SECONDS_FILE names (`seconds.Seconds`), by the rank's host.
"""

import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.compare.emulated.engine_files import MARKS_FOLDER, SECONDS_FILE
from benchmarks.compare.emulated.seconds import Seconds
from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.client_engine import ClientEngine, ForwardDerivatives, Sums, Tensors
from fedspeed.engine.distil_sums import DistilSums
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.groups import Groups
from fedspeed.engine.spec import EngineContext, EngineSpec
from fedspeed.models.factors import is_factor_b

UPDATE = 1e-3  # standard deviation of an update's values
STATISTICS = Path("/sys/class/net/eth0/statistics")


class TimedEngine(ClientEngine):
    """Sleeps in place of a model's arithmetic.

    Args:
        net: on the meta device, for its names and shapes.
    """

    def __init__(self, net: PreTrainedModel, spec: EngineSpec, context: EngineContext, groups: Groups):
        self.kind = spec.kind
        self._stage = int(spec.deepspeed.get("zero_optimization", {}).get("stage", 0))
        super().__init__(net, [], groups, None, context.clock)
        host = socket.gethostname()
        self._seconds = Seconds(**json.loads(Path(os.environ[SECONDS_FILE]).read_text())[host])
        shapes = {n: tuple(p.shape) for n, p in sorted(net.named_parameters()) if p.requires_grad}
        self._first = {name: first_values(name, shape) for name, shape in shapes.items()}
        self._delta = {name: update_of(name, shape, host) for name, shape in shapes.items()}
        self._slots = max(1, context.clients)
        self._masters: dict[int, Tensors] = dict.fromkeys(range(self._slots), self._first)
        self._frozen: dict[int, frozenset[str]] = {}
        self._is_trained: set[int] = set()
        self._marks: list[dict[str, float]] = []

    # What a slot has.

    @property
    def zero_stage(self) -> int:
        return self._stage

    @property
    def client_slots(self) -> int:
        return self._slots

    @property
    def names(self) -> list[str]:
        return list(self._first)

    def load(
        self,
        state: Tensors,
        optimizer: Tensors | None = None,
        *,
        frozen: frozenset[str] = frozenset(),
        seed: int = 0,
        slot: int = 0,
    ) -> None:
        self._marks.append(measured_now())
        self._pending.discard(slot)
        self._is_trained.discard(slot)
        self._masters[slot] = {name: state[name] for name in self._first}
        self._frozen[slot] = frozen

    def load_folded(self, state: Tensors) -> None:
        pass

    def state(self, slot: int = 0) -> Tensors:
        masters = self._masters[slot]
        if slot not in self._is_trained:
            return dict(masters)
        frozen = self._frozen.get(slot, frozenset())
        return {n: v if n in frozen else v + self._delta[n] for n, v in masters.items()}

    def optimizer_state(self, slot: int = 0) -> Tensors:
        return {}

    # Where a model would compute.

    def _sleep(self, seconds: float) -> None:
        with self._clock.stage("compute"):
            time.sleep(seconds)

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        self._sleep(self._seconds.gradients * len(work))
        return [sums_of(step.micro) for step in work]

    def _forward_gradients(
        self, slot: int, step: StepBatches, seeds: Sequence[int], names: frozenset[str]
    ) -> ForwardDerivatives:
        self._sleep(self._seconds.gradients)
        return ForwardDerivatives(sums_of(step.micro), np.full(len(seeds), UPDATE))

    def distil(self, work: StepBatches, *, student: Sequence[int], common: int, kl: float) -> DistilSums:
        self._sleep(self._seconds.gradients)
        self._pending.add(0)
        return DistilSums(hidden=1.0, kl=1.0, tokens=max(1, sums_of(work.micro).tokens))

    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        self._is_trained.update(slots)
        self._sleep(self._seconds.optimizer * len(slots))
        return [True] * len(slots)

    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        pass

    def _drop_gradients(self, slot: int) -> None:
        pass

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        """Return losses of 1, at once: evaluations are no part of what is timed."""
        return [sums_of(batches) for batches in work]

    # Passes are not matched.

    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        return 0

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return 0

    def _idle_pass(self, backward: bool) -> None:
        raise AssertionError("no passes are matched with timed compute")

    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        raise AssertionError("nothing is generated with timed compute")

    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        raise AssertionError("nothing is generated with timed compute")

    @property
    def base_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Write down what was measured at the beginning of every turn."""
        path = Path(os.environ[MARKS_FOLDER]) / f"{socket.gethostname()}-{os.environ.get('RANK', '0')}.json"
        path.write_text(json.dumps(self._marks))


class TimedEnds(TimedEngine):
    """The client of split learning: real messages of the real sizes, and sleeps between them."""

    _ask: Callable[[dict], dict] | None = None

    @contextmanager
    def asking(self, ask: Callable[[dict], dict]) -> Iterator[None]:
        """Reach the server by `ask` inside."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        assert self._ask is not None, "the body is reached inside `asking` only"
        (step,) = work
        for batch in step.micro:
            tokens = int(batch.attention_mask.sum())
            hidden = np.ones((tokens, self.model.config.hidden_size), np.int16)
            lengths = batch.attention_mask.sum(1).astype(np.int64)
            self._sleep(self._seconds.forward)
            self._answered({"hidden": hidden, "lengths": lengths})
            self._sleep(self._seconds.head)
            last = {"last": np.zeros(0, np.uint8)} if batch is step.micro[-1] else {}
            self._answered({"output_gradient": hidden} | last)
            self._sleep(self._seconds.gradients)
        return [sums_of(step.micro)]

    def _answered(self, message: dict) -> None:
        assert self._ask is not None, "the body is reached inside `asking` only"
        with self._clock.stage("idle"):
            self._ask(message)


class TimedBody(TimedEngine):
    """The server of split learning."""

    def answer(self, slot: int, message: Mapping[str, np.ndarray], *, most: object, train: bool) -> dict:
        """Return an answer of the size of the message, after the seconds of the server's blocks."""
        if "hidden" in message:
            self._sleep(self._seconds.forward)
            return {"output": message["hidden"]}
        self._sleep(self._seconds.gradients)
        self._pending.add(slot)
        return {"hidden_gradient": message["output_gradient"]}

    def ends_step(self, message: Collection[str]) -> bool:
        """Return whether a client's local step ends with the answer to its message."""
        return "last" in message


def build(net: PreTrainedModel, spec: EngineSpec, context: EngineContext, groups: Groups) -> TimedEngine:
    """Build the engine of a rank, in place of the builders of `engine.build.BUILDERS`."""
    kinds = {"whole": TimedEngine, "ends": TimedEnds, "body": TimedBody}
    return kinds[spec.part](net, spec, context, groups)


def first_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the values that a tensor begins with, equal on all ranks: zeros for LoRA's factor B."""
    if is_factor_b(name):
        return torch.zeros(shape)
    return _normal(zlib.crc32(name.encode()), shape, 0.02)


def update_of(name: str, shape: tuple[int, ...], host: str) -> torch.Tensor:
    """Return what a turn adds to a tensor: other values on each host, none of which is zero."""
    return _normal(zlib.crc32(f"{host}/{name}".encode()), shape, UPDATE)


def _normal(seed: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(drawn * np.float32(scale))


def sums_of(batches: Sequence[Batch]) -> Sums:
    """Return sums of a loss of 1 for each answer token."""
    tokens = sum(batch.answer_tokens for batch in batches)
    return Sums(float(tokens), tokens, 0, sum(len(batch.labels) for batch in batches))


def measured_now() -> dict[str, float]:
    """Return the seconds, this process's CPU-seconds, and the bytes that its host has sent and received."""
    bytes_of = {way: float((STATISTICS / f"{way}_bytes").read_text()) for way in ("tx", "rx")}
    return {"wall": time.time(), "cpu": time.process_time()} | bytes_of
