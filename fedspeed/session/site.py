"""One participant per organisation: who this site is, and whether all sites are about to do the same."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fedspeed import activity
from fedspeed.config.run import RunConfig
from fedspeed.config.show import as_dict, decisive
from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.files import write_atomically
from fedspeed.models.local_config import TOKENIZER_FILES, local_folder, tokenizer_place
from fedspeed.routing import identity
from fedspeed.routing.anonymous.crypto import digest, public_of
from fedspeed.routing.listening import listen_address

# What each site decides for itself: where its data and files are, what its hardware does best.
OWN = ("cluster", "data", "deepspeed", "engine", "monitor", "checkpoint", "run", "model.base", "model.tokenizer", "adapter.start_from", "train.micro_batch",
       "train.accumulation", "routing.identity", "routing.roster", "routing.listen", "routing.transport", "routing.deadline_s", "routing.step_deadline_s")
EPOCH_FILE = "roster-epoch"  # in a run's folder
SHOWN = 8  # differences that an error lists
_READ_BYTES = 1 << 22


class Site:
    """Raises: FedSpeedError: a file is wrong, or the files do not fit each other."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.key, self.roster = identity.membership(config.routing)
        self.listen = listen_address(config.routing, self.roster.card_of(public_of(self.key)))

    @cached_property
    def settings(self) -> dict[str, str]:
        """What must be equal on all sites, in words; the base and its tokenizer by their content."""
        values = decisive(as_dict(self.config))
        flat = {f"{section}.{key}": json.dumps(value, sort_keys=True) for section, block in values.items() for key, value in block.items()}
        own = {key: value for key, value in flat.items() if key not in OWN and key.partition(".")[0] not in OWN}
        return own | {"routing.roster_signer": identity.pinned(self.config.routing.roster_signer),
                      "data.max_tokens": json.dumps(self.config.data.max_tokens), **content(self.config)}

    @cached_property
    def digest(self) -> bytes:
        return digest(self.roster.digest, json.dumps(self.settings, sort_keys=True).encode())


    def renewed(self) -> bool:
        """Whether the roster's file holds a newer one by now. One that is no roster of the pinned signer's is none yet."""
        routing = self.config.routing
        try:
            return identity.read_roster(Path(routing.roster), routing.roster_signer).epoch > self.roster.epoch
        except FedSpeedError:
            return False

    def check_epoch(self, folder: Path) -> None:
        """Raises: FedSpeedError: the run in the folder has gone on with a newer roster already: members that have left it would be back with this one."""
        file = folder / EPOCH_FILE
        try:
            known = int(file.read_text()) if file.exists() else 0
        except (OSError, ValueError) as error:
            raise FedSpeedError(f"{file}: cannot be read as the newest roster's epoch ({error}); write the number of the roster you trust into it") from error
        if self.roster.epoch < known:
            raise FedSpeedError(f"{self.config.routing.roster}: its epoch {self.roster.epoch} is older than {known}, with which {folder} has run already; ask "
                                "for the newest roster")

    def keep_epoch(self, folder: Path) -> None:
        write_atomically(folder / EPOCH_FILE, f"{self.roster.epoch}\n".encode())


def transport(site: Site):
    """Connections to all other sites, which mean the same run.

    Raises:
        LostPeerError: somebody did not come. FedSpeedError: the port cannot be had, or somebody means another run.
    """
    from fedspeed.routing.transport import TransportError
    from fedspeed.routing.transports.tls import TlsTransport

    deadline_s = site.config.cluster.start_timeout_s
    try:
        found = TlsTransport(site.config.routing.identity, public_of(site.key), site.roster, deadline_s, site.listen)
    except TransportError as error:
        raise LostPeerError(f"the sites could not connect with each other: {error}") from error
    try:
        _agree(site, found, deadline_s)
    except FedSpeedError:
        found.close()  # what this site has to say of it goes out first, so that the others end for the same reason
        raise
    except TransportError as error:
        found.close()
        raise LostPeerError(f"a site was lost while all compared their settings: {error}; the same command tries again") from error
    return found


def _agree(site: Site, transport, deadline_s: float) -> None:
    """Compare settings with all other sites, before anything is trained.

    Raises:
        FedSpeedError: somebody means another run; says what differs, and who.
    """
    mine = json.dumps(site.settings, sort_keys=True).encode()
    lengths = transport.swap([np.array([len(mine)], np.uint64)] * transport.size, [8] * transport.size, deadline_s)
    sizes = [int(length.view(np.uint64)[0]) for length in lengths]
    if max(sizes) > 1 << 20:
        raise FedSpeedError("a site sent settings of more than a megabyte; all must run the same version of FedSpeed")
    texts = transport.swap([mine] * transport.size, sizes, deadline_s)
    differing = []
    for card, text in zip(site.roster.members, texts):
        try:
            theirs = dict(json.loads(bytes(text)))
        except ValueError as error:
            raise FedSpeedError(f"{card.name} sent settings that are none ({error}); all must run the same version of FedSpeed") from error
        differing += [f"{key}: {site.settings.get(key, '-')} here, {theirs.get(key, '-')} at {card.name}"
                      for key in sorted(site.settings.keys() | theirs.keys()) if site.settings.get(key) != theirs.get(key)]
    if differing:
        more = f" (and {len(differing) - SHOWN} more)" if len(differing) > SHOWN else ""
        raise FedSpeedError("the sites are about to run different things; make these equal:\n  " + "\n  ".join(differing[:SHOWN]) + more)


def content(config: RunConfig) -> dict[str, str]:
    """SHA-256 over the files that decide about training: of the base, of the tokenizer, and of the adapter to
    start from where there is one. What is no folder here, nor in the hub's cache, counts with its name."""
    model, adapter = config.model, config.adapter
    base = ["config.json"]
    if model.init == "pretrained":
        base += ["model.safetensors.index.json", "*.safetensors"]
    found = {
        "the base model's files": _of_place(model.base, base),
        "the tokenizer's files": _of_place(tokenizer_place(model), TOKENIZER_FILES) if tokenizer_place(model) else model.tokenizer,
    }
    if adapter.start_from:
        found["the adapter's files"] = _of_place(adapter.start_from, ["adapter_config.json", "*.safetensors.index.json", "*.safetensors"])
    return found


def _of_place(place: str, patterns: Sequence[str]) -> str:
    folder = local_folder(place, weights=False)
    if folder is None:
        return place
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return digest(*(part for path in paths for part in (path.name.encode(), _sha256(path)))).hex()


def _sha256(path: Path) -> bytes:
    state = hashlib.sha256()
    with activity.during(f"the reading of {path.name}, to compare it with the other sites'"), path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            state.update(piece)
    return state.digest()
