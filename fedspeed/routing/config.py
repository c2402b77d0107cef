"""How updates travel between clients."""

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class RoutingConfig:
    mode: Literal["auto", "plain", "mix", "mask", "mix+mask"] = field(default="auto", metadata={
        "help": "auto: mix+mask, but plain in a job of fewer than routing.min_participants, where one operator has started all. "
                "plain: an ordinary sum, inside one trust domain. mask: masked, so that nobody learns more than the sum. mix: through relays, unmasked: "
                "owners of chunks see them, without a name. mix+mask: both (see fedspeed/routing/THREATS.md)"})
    transport: Literal["auto", "mpi", "gloo", "local", "tls"] = field(default="auto", metadata={
        "help": "auto: mpi under mpirun, gloo elsewhere, local with a single participant. tls: one participant per organisation, each started on its own"})
    identity: str = field(default="", metadata={"help": "tls: this site's private key, made by `fedspeed keys new`", "path": ()})
    roster: str = field(default="", metadata={"help": "tls: the signed list of members, made by `fedspeed keys roster`", "path": ()})
    roster_signer: str = field(default="", metadata={
        "help": "tls: pinned key of who signs rosters: what `fedspeed keys show` prints, or the file of its card", "path": ()})
    listen: str = field(default="", metadata={"help": "tls: HOST:PORT to listen on, where it is not the address in the roster"})
    deadline_s: float = field(default=1800.0, metadata={
        "help": "longest wait for the other clients' updates of a round", "above": 0.0, "max": 10_000_000})
    step_deadline_s: float = field(default=120.0, metadata={
        "help": "mix, mask: longest wait for another participant once all have begun an exchange", "above": 0.0, "max": 10_000_000})
    relays: int = field(default=2, metadata={"help": "mix: relays of a path, as far as there are participants", "min": 1, "max": 7})
    cell_kib: int = field(default=4096, metadata={"help": "mix, mask: content of a cell, the fixed size that all messages have", "min": 1, "max": 65536})
    cipher: Literal["aes-128-gcm", "chacha20-poly1305"] = field(default="aes-128-gcm", metadata={
        "help": "mix, mask: of seals and key streams; AES is the faster where processors have instructions for it"})
    min_participants: int = field(default=3, metadata={
        "help": "mix, mask: participants that a sum must have; the fewer they are, the more it says about each", "min": 2, "max": 256})
    attempts: int = field(default=5, metadata={"help": "mix, mask: tries at one exchange, each with fresh masks", "min": 1, "max": 100})

    def settled(self, participants: int) -> "RoutingConfig":
        """With what `auto` means for so many participants of a job. Organisations among themselves never fall back to plain."""
        if self.mode != "auto":
            return self
        return replace(self, mode="mix+mask" if self.transport == "tls" or participants >= self.min_participants else "plain")

    @property
    def sums_only(self) -> bool:
        """Whether outputs may tell nothing of single clients: in the masked modes, and where clients belong to organisations of their own. (`auto` is
        undecided.)"""
        return self.mode not in ("plain", "auto") or self.transport == "tls"
