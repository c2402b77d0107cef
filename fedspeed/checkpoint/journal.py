"""The round journal: what a run needs to resume after a finished round with the same bits.

It is written so that `kill -9` at any moment leaves a complete entry.

    <run>/journal/round-000012/state.safetensors    global tensors, server optimizer
                               client-3.safetensors  a client's kept optimizer, on the host of its gateway
                               entry.json            written last, by rename: makes the round count
    <run>/journal/best.safetensors                   global tensors of the best round so far

Data positions and random numbers are functions of (seed, client, round), so that they need not be stored.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedspeed.errors import JournalError
from fedspeed.files import json_value, sha256_of, write_atomically
from fedspeed.models.folded import trainable

ROUND = re.compile(r"round-(\d{6,})$")
BEST_REMEDY = "copy this file back from elsewhere, or start anew with --fresh"


@dataclass(frozen=True)
class Entry:
    """The values of a finished round besides its tensors.

    Attributes:
        round: its number. seed: run.seed.
        config: the resolved configuration that the run was started with.
        fingerprint: hash of all settings that change the arithmetic; a resumed run must have the same.
        best_round, best_loss: the best evaluation so far. Round 0 is the start; an infinite loss means none.
        stale: evaluations since the best one, for early stopping.
        done: why the run ended with this round; empty if it continues.
        sha256: of the file with the tensors.
        likeness: under staleness, the alignment of the clients' updates in this round.
        certificate: between organisations, the signatures of all sites that took part in the round
            (routing.state_certificate), packed and in hex; empty in a job of one operator.
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
    certificate: str = field(default="", repr=False)

    @property
    def has_best(self) -> bool:
        """Whether any round, or the start, has been evaluated."""
        return math.isfinite(self.best_loss)


class Journal:
    """The journal of a run. One rank commits rounds; before that, gateways add the files of their clients.

    Args:
        run: folder of the run. keep: number of rounds to keep.
    """

    def __init__(self, run: Path, keep: int):
        self.folder = run / "journal"
        self._keep = keep

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}"

    def commit(self, entry: Entry, tensors: Mapping[str, np.ndarray]) -> None:
        """Make `entry.round` the round to resume from, and remove all but the newest rounds."""
        folder = self._round(entry.round)
        digest = write_tensors(folder / "state.safetensors", tensors)
        self._write_entry(replace(entry, sha256=digest))
        kept = self._committed()[-self._keep :]
        for number in self._numbers():
            if number < kept[0]:  # a killed process may have left one without an entry
                self._forget(number)
        try:
            needed = {
                self._best(_entry_values(self._round(number) / "entry.json")["best_round"]) for number in kept
            }
        except (ValueError, KeyError, TypeError):
            return  # an older entry is damaged, so that the files it needs are not known
        for path in [
            *self.folder.glob("best-*.safetensors"),
            *self.folder.glob(".best-*.tmp"),
        ]:  # also those of a killed process
            if path not in needed:
                path.unlink(missing_ok=True)

    def add_certificate(self, entry: Entry, certificate: str) -> None:
        """Add a certificate to a committed entry that has none, as journals of earlier versions have."""
        self._write_entry(replace(entry, certificate=certificate))

    def _write_entry(self, entry: Entry) -> None:
        text = json.dumps(
            {**asdict(entry), "best_loss": entry.best_loss if entry.has_best else None}, indent=1
        )
        write_atomically(self._round(entry.round) / "entry.json", text.encode())

    def save_client(self, number: int, client: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Add a client's own state to the round that is about to be committed.

        Args:
            number: of the round.
            tensors: the client's optimizer state, and its start under staleness; may be empty.
        """
        write_tensors(self._round(number) / f"client-{client}.safetensors", tensors)
        # No other rank removes old rounds on a host that does not commit. The current round is not committed
        # yet and is not counted.
        earlier = [n for n in self._numbers() if n < number]
        for old in earlier[: -self._keep]:
            if not (self._round(old) / "entry.json").exists():
                self._forget(old)

    def load_client(self, number: int, client: int) -> dict[str, np.ndarray]:
        """Return what `save_client` has stored.

        Raises:
            JournalError: it is missing or damaged.
        """
        path = self._round(number) / f"client-{client}.safetensors"
        if not path.is_file():
            raise JournalError(
                f"{path}: missing; the state of client {client} was stored on another host. Resume on the "
                "same hosts, or start anew with --fresh"
            )
        return read_tensors(
            path,
            f"delete the folder {path.parent} on the first host to resume from the round before, "
            "or start anew with --fresh",
        )

    def _best(self, number: int) -> Path:
        """Return the file for the best round; one for each round, so that older entries keep theirs."""
        return self.folder / f"best-{number:06d}.safetensors"

    def save_best(self, number: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Store the tensors of the best round so far; a later commit keeps them if its entry names the
        round.
        """
        write_tensors(self._best(number), tensors)

    def load_best(self, number: int) -> dict[str, np.ndarray]:
        """Return the tensors of a best round.

        Raises:
            JournalError: its file is missing or damaged.
        """
        return read_tensors(self._best(number), BEST_REMEDY)

    def check_best(self, entry: Entry) -> None:
        """Check, without reading all of it, that the best round of an entry can be exported.

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
        ):  # folded adapters have other shapes in every round
            raise JournalError(f"{path}: holds other tensors than {state}; {BEST_REMEDY}")

    def _numbers(self) -> list[int]:
        """Return the rounds that have a folder, in order."""
        found = (ROUND.search(p.name) for p in self.folder.glob("round-*"))
        return sorted(int(m.group(1)) for m in found if m)

    def _committed(self) -> list[int]:
        return [n for n in self._numbers() if (self._round(n) / "entry.json").is_file()]

    def _forget(self, number: int) -> None:
        """Remove a round; its entry first, so that the rest never looks like a finished round."""
        folder = self._round(number)
        (folder / "entry.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def newest(self) -> int:
        """Return the number of the newest finished round, unchecked; -1 for a run without one."""
        return max(self._committed(), default=-1)

    def latest(self) -> Entry | None:
        """Return the entry of the newest finished round; None for a run without one.

        Raises:
            JournalError: it is damaged. Going back a round loses work, so that the user must decide.
        """
        rounds = self._committed()
        if not rounds:
            return None
        path = self._round(rounds[-1]) / "entry.json"
        remedy = self._remedy(rounds[-1])
        try:
            values = _entry_values(path)
            values["best_loss"] = float("inf") if values["best_loss"] is None else values["best_loss"]
            entry = Entry(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise JournalError(f"{path}: damaged ({error}); {remedy}") from error
        state = path.parent / "state.safetensors"
        found = sha256_of(state) if state.is_file() else "no file"
        if found != entry.sha256:
            raise JournalError(
                f"{state}: damaged (sha256 is {found[:12]}, the journal says {entry.sha256[:12]}); {remedy}"
            )
        return entry

    def tensors(self, entry: Entry) -> dict[str, np.ndarray]:
        """Return the tensors of an entry.

        Raises:
            JournalError: their file is missing or damaged.
        """
        return read_tensors(self._round(entry.round) / "state.safetensors", self._remedy(entry.round))

    def _remedy(self, number: int) -> str:
        earlier = max((n for n in self._committed() if n < number), default=None)
        target = "the beginning" if earlier is None else f"round {earlier}"
        return f"delete the folder {self._round(number)} to resume from {target}, or start anew with --fresh"


def _entry_values(path: Path) -> dict[str, Any]:
    """Read the values of an entry. Raises ValueError or TypeError: it is damaged."""
    values = json_value(path.read_bytes())
    if not isinstance(values, dict):
        raise TypeError("not an entry")
    return values


def changes(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    """Return `key: old -> new` for every value in which two resolved configurations differ."""
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
    """Write safetensors by rename; return the file's SHA-256 in hex."""
    from safetensors.numpy import save

    data = save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, metadata)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Read the tensors of a safetensors file.

    Args:
        remedy: for the message of the error.

    Raises:
        JournalError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{path}: cannot be read ({error}); {remedy}") from error


def read_shapes(path: Path, remedy: str) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors of a safetensors file. Raises as `read_tensors` does.

    Opening the file detects a truncated one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{path}: cannot be read ({error}); {remedy}") from error
