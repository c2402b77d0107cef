"""A site among organisations: its identity, and the comparison of settings between sites."""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fedspeed import activity
from fedspeed.config.run import RunConfig
from fedspeed.config.show import as_dict, decisive
from fedspeed.errors import FedSpeedError
from fedspeed.files import json_value, write_atomically
from fedspeed.models.local_config import TOKENIZER_FILES, local_folder, tokenizer_place
from fedspeed.routing import identity
from fedspeed.routing.anonymous.crypto import derive_key, digest, public_bytes
from fedspeed.routing.listen_address import own_membership
from fedspeed.routing.transport import Transport, all_gather, as_bytes

# Sections and keys that each site decides for itself: its data, its files, its hardware.
LOCAL_KEYS = (
    "cluster",
    "data",
    "deepspeed",
    "engine",
    "monitor",
    "checkpoint",
    "run",
    "model.base",
    "model.tokenizer",
    "adapter.start_from",
    "train.micro_batch",
    "train.accumulation",
    "routing.identity",
    "routing.roster",
    "routing.listen",
    "routing.transport",
    "routing.deadline_s",
    "routing.step_deadline_s",
)
EPOCH_FILE = "roster-epoch"  # in a run's folder
MAX_LISTED = 8  # differences in an error message
_READ_BYTES = 1 << 22


class Site:
    """One organisation among the members of its roster.

    Raises:
        FedSpeedError: a file is wrong, or the files do not fit each other.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.membership = own_membership(config.routing)

    @cached_property
    def settings(self) -> dict[str, str]:
        """Settings that must be equal on all sites, as text; the base and its tokenizer by their content."""
        flat = {
            f"{section}.{key}": json.dumps(value, sort_keys=True)
            for section, block in decisive(as_dict(self.config)).items()
            for key, value in block.items()
        }
        shared = {
            key: value
            for key, value in flat.items()
            if key not in LOCAL_KEYS and key.partition(".")[0] not in LOCAL_KEYS
        }
        return shared | {
            "routing.roster_signer": identity.pinned(self.config.routing.roster_signer),
            "data.max_tokens": json.dumps(self.config.data.max_tokens),
            **content(self.config),
        }

    @cached_property
    def digest(self) -> bytes:
        """The digest of the roster and of all settings that must be equal on all sites."""
        return digest(self.membership.roster.digest, json.dumps(self.settings, sort_keys=True).encode())

    def renewed(self) -> bool:
        """Return whether the roster's file now holds a newer roster of the pinned signer."""
        routing = self.config.routing
        try:
            found = identity.read_roster(Path(routing.roster), routing.roster_signer)
        except FedSpeedError:
            return False
        return found.epoch > self.membership.roster.epoch

    def check_epoch(self, folder: Path) -> None:
        """Compare this start's roster with the newest one that the run in the folder has used.

        Raises:
            FedSpeedError: the run has used a newer one: members that have left would be back.
        """
        file = folder / EPOCH_FILE
        epoch = self.membership.roster.epoch
        try:
            known = int(file.read_text()) if file.exists() else 0
        except (OSError, ValueError) as error:
            raise FedSpeedError(
                f"{file}: cannot be read as the newest roster's epoch ({error}); write the number of the "
                "roster you trust into it"
            ) from error
        if epoch < known:
            raise FedSpeedError(
                f"{self.config.routing.roster}: its epoch {epoch} is older than {known}, with which "
                f"{folder} has run already; ask for the newest roster"
            )

    def keep_epoch(self, folder: Path) -> None:
        """Note in the folder of a run which roster it continues with."""
        write_atomically(folder / EPOCH_FILE, f"{self.membership.roster.epoch}\n".encode())

    def agree(self, transport: Transport, deadline_s: float) -> None:
        """Compare settings with all other sites, before anything is trained.

        Raises:
            FedSpeedError: a site has other settings; names the differences and the site.
            TransportError: a site was lost.
        """
        own = json.dumps(self.settings, sort_keys=True).encode()
        head = np.array([len(own)], np.uint64)
        sizes = [int(length) for length in all_gather(transport, head, deadline_s)[:, 0]]
        if max(sizes) > 1 << 20:
            raise FedSpeedError(
                "a site sent settings of more than a megabyte; all must run the same version of FedSpeed"
            )
        texts = transport.swap([own] * transport.size, sizes, deadline_s)
        differing = []
        for card, text in zip(self.membership.roster.members, texts, strict=True):
            differing += differences(self.settings, _parsed(card.name, as_bytes(text).tobytes()), card.name)
        if differing:
            more = f" (and {len(differing) - MAX_LISTED} more)" if len(differing) > MAX_LISTED else ""
            raise FedSpeedError(
                "the sites are about to run different things; make these equal:\n  "
                + "\n  ".join(differing[:MAX_LISTED])
                + more
            )


def differences(own: Mapping[str, str], theirs: Mapping[str, str], name: str) -> list[str]:
    """Return a line for each setting in which another site, called `name`, differs from this one. Pure."""
    return [
        f"{key}: {own.get(key, '-')} here, {theirs.get(key, '-')} at {name}"
        for key in sorted(own.keys() | theirs.keys())
        if own.get(key) != theirs.get(key)
    ]


def _parsed(name: str, text: bytes) -> dict[str, str]:
    """Parse the settings that another site, called `name`, has sent.

    Raises:
        FedSpeedError: they are not a dictionary of settings.
    """
    try:
        found = json_value(text)
        if not isinstance(found, dict):
            raise ValueError("not a dictionary")
        return found
    except ValueError as error:
        raise FedSpeedError(
            f"{name} sent settings that cannot be read ({error}); all must run the same version of FedSpeed"
        ) from error


def sealed(text: str, key_file: Path) -> str:
    """Return a digest of a text that only the holder of a private key can reproduce.

    Raises:
        FedSpeedError: the key cannot be read.
    """
    key = identity.read_key(key_file)
    secret = derive_key(key.private_bytes_raw(), b"digest of rows in a journal")
    return f"{identity.fingerprint(public_bytes(key))}:{hmac.digest(secret, text.encode(), 'sha256').hex()}"


def content(config: RunConfig) -> dict[str, str]:
    """Return SHA-256 over the files that training depends on: base, tokenizer, adapter to start from.

    An input that is neither a folder here nor in the hub's cache is represented by its name.
    """
    model = config.model
    adapter = config.adapter
    base = ["config.json"]
    if model.init == "pretrained":
        base += ["model.safetensors.index.json", "*.safetensors"]
    tokenizer = tokenizer_place(model)
    found = {
        "the base model's files": _folder_digest(model.base, base),
        "the tokenizer's files": _folder_digest(tokenizer, TOKENIZER_FILES) if tokenizer else model.tokenizer,
    }
    if adapter.start_from:
        patterns = ["adapter_config.json", "*.safetensors.index.json", "*.safetensors"]
        found["the adapter's files"] = _folder_digest(adapter.start_from, patterns)
    return found


def _folder_digest(place: str, patterns: Sequence[str]) -> str:
    folder = local_folder(place, weights=False)
    if folder is None:
        return place
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return digest(*(part for path in paths for part in (path.name.encode(), _sha256(path)))).hex()


def _sha256(path: Path) -> bytes:
    state = hashlib.sha256()
    work = f"the reading of {path.name}, to compare it with the other sites'"
    with activity.during(work), path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            state.update(piece)
    return state.digest()
