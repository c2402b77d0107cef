"""The round journal: enough of a finished round to go on from it bit for bit, written so that `kill -9` at
any moment leaves a whole one.

    <run>/journal/round-000012/state.safetensors    global tensors, server optimizer
                               client-3.safetensors  a client's kept optimizer, on the host of its gateway
                               entry.json            written last, by rename: makes the round count
    <run>/journal/best.safetensors                   global tensors of the best round so far

Data positions and random numbers are functions of (seed, client, round), so the round's number stands for
them.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fedspeed.errors import JournalError
from fedspeed.files import json_value, write_atomically
from fedspeed.models.folded import trainable

ROUND = re.compile(r"round-(\d{6,})$")
BEST_REMEDY = "copy this file back from elsewhere, or start anew with --fresh"


@dataclass(frozen=True)
class Entry:
    """What a finished round leaves besides tensors.

    Attributes:
        config: the resolved configuration the run was started with.
        fingerprint: hash over what decides the run's arithmetic; a resumed run must have the same.
        best_round, best_loss, stale: held-out record, and evaluations since it (for early stopping).
            best_round 0 is the start; an infinite best_loss says that there is none yet.
        done: why the run ended with this round, empty while it goes on.
        likeness: under staleness, how far clients' changes were alike in this round.
    """

    round: int
    fingerprint: str
    seed: int
    config: dict = field(repr=False)
    best_round: int = 0
    best_loss: float = float("inf")
    stale: int = 0
    done: str = ""
    sha256: str = ""
    likeness: float | None = None

    @property
    def has_best(self) -> bool:
        """Whether any round, or the start, has been evaluated."""
        return math.isfinite(self.best_loss)


class Journal:
    """One run's journal. Only one rank commits; gateways add their clients' files to the round before it is
    committed.
    """

    def __init__(self, run: Path, keep: int):
        self.folder = run / "journal"
        self._keep = keep

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}"

    def commit(self, entry: Entry, tensors: Mapping[str, np.ndarray]) -> None:
        """Make `entry.round` the round to resume from, and forget all but the last few."""
        folder = self._round(entry.round)
        digest = write_tensors(folder / "state.safetensors", tensors)
        text = json.dumps(
            {**asdict(entry), "sha256": digest, "best_loss": entry.best_loss if entry.has_best else None},
            indent=1,
        )
        write_atomically(folder / "entry.json", text.encode())
        kept = self._committed()[-self._keep :]
        for number in self._numbers():
            if number < kept[0]:  # with or without an entry: a killed process may have left half a round
                self._forget(number)
        try:
            needed = {
                self._best(json_value((self._round(number) / "entry.json").read_bytes())["best_round"])
                for number in kept
            }
        except (ValueError, KeyError, TypeError):
            # an older entry is damaged: which file it needs is not known, and not this round's business
            return
        for path in [
            *self.folder.glob("best-*.safetensors"),
            *self.folder.glob(".best-*.tmp"),
        ]:  # what a killed process left, too
            if path not in needed:
                path.unlink(missing_ok=True)

    def save_client(self, number: int, client: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Add what a client alone goes on with (its optimizer, its own start under staleness; empty: nothing)
        to the round that is about to be committed.
        """
        write_tensors(self._round(number) / f"client-{client}.safetensors", tensors)
        # On a host that does not commit nobody else forgets the old rounds. This one is not committed yet, so
        # it counts for none.
        earlier = [n for n in self._numbers() if n < number]
        for old in earlier[: -self._keep]:
            if not (self._round(old) / "entry.json").exists():
                self._forget(old)

    def load_client(self, number: int, client: int) -> dict[str, np.ndarray]:
        path = self._round(number) / f"client-{client}.safetensors"
        if not path.is_file():
            raise JournalError(
                f"{path}: missing; what client {client} goes on with was kept on another host. Resume on "
                "the same hosts, "
                "or start anew with --fresh"
            )
        return read_tensors(
            path,
            f"delete the folder {path.parent} on the first host to resume from the round before, "
            "or start anew with --fresh",
        )

    def _best(self, number: int) -> Path:
        """One file a round: an entry's best is the one it was committed with, whatever was trained and lost
        after it.
        """
        return self.folder / f"best-{number:06d}.safetensors"

    def save_best(self, number: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep the tensors of a round that is the best so far; for good once an entry that names it is
        committed.
        """
        write_tensors(self._best(number), tensors)

    def load_best(self, number: int) -> dict[str, np.ndarray]:
        return read_tensors(self._best(number), BEST_REMEDY)

    def check_best(self, entry: Entry) -> None:
        """That the best round an entry names can be exported, without reading it as a whole.

        Raises:
            JournalError: its file is missing or damaged, or holds other tensors than the entry.
        """
        path = self._best(entry.best_round)
        state = self._round(entry.round) / "state.safetensors"
        named = read_shapes(state, self._remedy(entry.round))
        wanted = trainable({
            name.removeprefix("global/"): shape for name, shape in named.items() if name.startswith("global/")
        })
        if (
            trainable(read_shapes(path, BEST_REMEDY)) != wanted
        ):  # what is folded is of other shapes in every round
            raise JournalError(f"{path}: holds other tensors than {state}; {BEST_REMEDY}")

    def _numbers(self) -> list[int]:
        """Rounds that have a folder."""
        found = (ROUND.search(p.name) for p in self.folder.glob("round-*"))
        return sorted(int(m.group(1)) for m in found if m)

    def _committed(self) -> list[int]:
        return [n for n in self._numbers() if (self._round(n) / "entry.json").is_file()]

    def _forget(self, number: int) -> None:
        """Remove a round, first of all the entry: what is left of it by a kill must not look finished."""
        folder = self._round(number)
        (folder / "entry.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def newest(self) -> int:
        """Number of the newest finished round, unchecked; -1 for a run without one."""
        return max(self._committed(), default=-1)

    def latest(self) -> Entry | None:
        """The newest finished round, None for a run without one.

        Raises:
            JournalError: it is damaged. Going back a round would silently lose work, so that is left to the
                user.
        """
        rounds = self._committed()
        if not rounds:
            return None
        path = self._round(rounds[-1]) / "entry.json"
        remedy = self._remedy(rounds[-1])
        try:
            values = json_value(path.read_bytes())
            values["best_loss"] = float("inf") if values["best_loss"] is None else values["best_loss"]
            entry = Entry(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise JournalError(f"{path}: damaged ({error}); {remedy}") from error
        state = path.parent / "state.safetensors"
        found = sha256(state) if state.is_file() else "no file"
        if found != entry.sha256:
            raise JournalError(
                f"{state}: damaged (sha256 is {found[:12]}, the journal says {entry.sha256[:12]}); {remedy}"
            )
        return entry

    def tensors(self, entry: Entry) -> dict[str, np.ndarray]:
        return read_tensors(self._round(entry.round) / "state.safetensors", self._remedy(entry.round))

    def _remedy(self, number: int) -> str:
        earlier = max((n for n in self._committed() if n < number), default=None)
        target = "the beginning" if earlier is None else f"round {earlier}"
        return f"delete the folder {self._round(number)} to resume from {target}, or start anew with --fresh"


def changes(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """`key: old -> new` of every value in which two resolved configurations differ."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a = old.get(key)
        b = new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += changes(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return out


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> str:
    """Write safetensors by rename; returns the file's sha256."""
    from safetensors.numpy import save

    data = save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, metadata)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file.

    Raises:
        JournalError: it is missing or damaged; `remedy` says what to do about it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{path}: cannot be read ({error}); {remedy}") from error


def read_shapes(path: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file; opening it finds one that is cut. Raises as
    `read_tensors` does.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{path}: cannot be read ({error}); {remedy}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
