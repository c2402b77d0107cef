"""What a comparison keeps of each run; bench.json holds these, and is checked when it is read."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedspeed.errors import DataError

CAUSES = ("compute", "gather", "exchange", "idle")


class Record(BaseModel):
    """A value of a result: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Point(Record):
    """A round of a run.

    Attributes:
        round: counted from 1; 0 is before training. seconds: of all rounds so far, without the start.
        tokens: answer tokens that all clients have trained on so far. loss, exact: held-out loss per answer
            token and share of answers exactly right, where the round was evaluated.
    """

    round: int
    seconds: float
    tokens: int
    loss: float | None
    exact: float | None


class Run(Record):
    """One run of one arm.

    Attributes:
        arguments: of `launch.py`. reason: why it failed. start_s: from the command to the first round.
        first_aggregate_s: from the command to the end of round 1. round_s: median seconds of a round after
            the first. causes: median seconds of such a round by cause, means over ranks; `other` is what is
            left of the round. step_s: of a local step on the slowest rank.
        device_bytes: peak of tensors on a client's devices; masked modes show none. host_rss, host_pss: peak
            of all processes together. sent: bytes that all participants, a server among them, sent
            in a round, over the number of clients; mean.
        exported_loss: held-out loss of the exported model, for arms whose rounds evaluate another one.
    """

    arm: str
    seed: int
    arguments: tuple[str, ...]
    status: Literal["finished", "failed"]
    reason: str = ""
    curve: tuple[Point, ...] = ()
    start_s: float = 0.0
    first_aggregate_s: float = 0.0
    round_s: float = 0.0
    causes: dict[str, float] = {}
    step_s: float | None = None
    device_bytes: int | None = None
    host_rss: int = 0
    host_pss: int = 0
    sent: float = 0.0
    exported_loss: float | None = None


class Setting(Record):
    """What all runs have in common.

    Attributes:
        config: the YAML file. digest: of its content. model: its base. parameters: of the base.
        overrides: of all arms.
        arms: name and title of each, the reference first. cap_gib: of device memory; None: no cap.
        target: of the held-out loss; None: 5 % above that of the reference after half of its rounds.
    """

    config: str
    digest: str = ""
    model: str
    parameters: int
    clients: int
    overrides: tuple[str, ...]
    arms: dict[str, str]
    cap_gib: float | None
    target: float | None


class Bench(Record):
    """A comparison, with the day and the machine (`benchmarks.compare.results`)."""

    date: str
    machine: dict[str, str | int | float | list[str] | None]
    setting: Setting
    runs: tuple[Run, ...]

    def of(self, arm: str) -> dict[int, Run]:
        """Return an arm's finished runs by seed."""
        return {run.seed: run for run in self.runs if run.arm == arm and run.status == "finished"}


def read(path: Path) -> Bench:
    """Read a bench.json.

    Raises:
        DataError: it is not one.
    """
    try:
        return Bench.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise refused(path, error) from error


def refused(path: Path, error: ValidationError) -> DataError:
    """Return the error of a file that is no result."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return DataError(
        f"{path}: is no result of this version of `fedspeed bench` ({where}: {first['msg']}); move it aside, "
        "or name another folder with --out"
    )
