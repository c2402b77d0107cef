"""A site among organisations: its identity, and the beginning of a session with the other sites."""

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
from fedspeed.files import foreign_json, sha256_of, write_atomically
from fedspeed.models import saved_adapter
from fedspeed.models.file_digests import config_digest
from fedspeed.models.local_config import MORE_TOKENIZER_FILES, TOKENIZER_FILES, local_folder, tokenizer_place
from fedspeed.models.stored import BASE_FILE, weight_files
from fedspeed.routing import identity
from fedspeed.routing.agreed_broadcast import Group
from fedspeed.routing.anonymous.crypto import derive_key, digest, public_bytes
from fedspeed.routing.listen_address import own_membership
from fedspeed.routing.session_hello import open_session
from fedspeed.routing.transport import Transport, all_gather, as_bytes
from fedspeed.text_safety import quoted

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
    "routing.message_mib",
)
# Settings that decide what sites exchange after a round, and how long they wait for each other. They must be
# equal in a start and may differ in the next one, so that no certificate of a state depends on them.
START_KEYS = (
    "checkpoint.every",
    "federation.patience",
    "federation.rounds",
    "routing.deadline_s",
    "routing.step_deadline_s",
)
EPOCH_FILE = "roster-epoch"  # in a run's folder
MAX_LISTED = 8  # differences in an error message
MAX_SETTINGS = 1 << 20  # bytes of the settings that a site sends


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

    @property
    def settings_of_start(self) -> dict[str, str]:
        """`settings`, and those that need only be equal on all sites in one start."""
        values = as_dict(self.config)
        keys = (key.partition(".") for key in START_KEYS)
        return self.settings | {f"{a}.{b}": json.dumps(values[a][b]) for a, _, b in keys}

    @cached_property
    def digest(self) -> bytes:
        """The digest of all settings that must be equal on all sites, the same with every roster."""
        return digest(json.dumps(self.settings, sort_keys=True).encode())

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

    def open_session(self, transport: Transport, deadline_s: float) -> bytes:
        """Compare settings with all other sites before anything is trained, and return the digest of a new
        session (routing.session_hello), the same on all sites.

        Raises:
            FedSpeedError: a site has other settings; names the differences and the site.
            LostPeerError: a site was lost.
            TransportError: a site was lost.
        """
        self._compare_settings(transport, deadline_s)
        roster = self.membership.roster
        group = Group(
            me=transport.rank,
            key=self.membership.key,
            members=roster.keys,
            names=tuple(card.name for card in roster.members),
            swap=lambda parts, sizes: transport.swap(parts, sizes, deadline_s),
        )
        return open_session(group, roster.digest, self.digest)

    def _compare_settings(self, transport: Transport, deadline_s: float) -> None:
        own = json.dumps(self.settings_of_start, sort_keys=True).encode()
        head = np.array([len(own)], np.uint64)
        sizes = [int(length) for length in all_gather(transport, head, deadline_s)[:, 0]]
        if max(sizes) > MAX_SETTINGS:
            raise FedSpeedError(
                "a site sent settings of more than a megabyte; all must run the same version of FedSpeed"
            )
        texts = transport.swap([own] * transport.size, sizes, deadline_s)
        differing = []
        for card, text in zip(self.membership.roster.members, texts, strict=True):
            theirs = _parsed(card.name, as_bytes(text).tobytes())
            differing += differences(self.settings_of_start, theirs, card.name)
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
        f"{quoted(key)}: {quoted(own.get(key, '-'))} here, {quoted(theirs.get(key, '-'))} at {name}"
        for key in sorted(own.keys() | theirs.keys())
        if own.get(key) != theirs.get(key)
    ]


def _parsed(name: str, text: bytes) -> dict[str, str]:
    """Parse the settings that another site, called `name`, has sent.

    Raises:
        FedSpeedError: they are not a dictionary of settings.
    """
    try:
        found = foreign_json(text, MAX_SETTINGS)
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise ValueError("not a dictionary of texts")
        return found
    except ValueError as error:
        raise FedSpeedError(
            f"{name} sent settings that cannot be read ({quoted(error)}); all must run the same "
            "version of FedSpeed"
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
    """Return what training depends on and no setting says: SHA-256 over the content of base, tokenizer and
    adapter to start from, and the seed of what is drawn.

    An input that is neither a folder here nor in the hub's cache is represented by its name.

    Raises:
        ModelError: weights are missing, or the configuration of the adapter is damaged.
    """
    model = config.model
    place = tokenizer_place(model)
    found = {
        "run.seed": str(config.run.seed),
        "the base model's files": model.base,
        "the tokenizer's files": place or model.tokenizer,
    }
    if (base := local_folder(model.base, weights=False)) is not None:
        weights = weight_files(base, BASE_FILE) if model.init == "pretrained" else []
        found["the base model's files"] = _digest(base, weights, config_digest(base / "config.json"))
    if place and (tokenizer := local_folder(place, weights=False)) is not None:
        found["the tokenizer's files"] = _digest(tokenizer, _tokenizer_files(tokenizer))
    if (template := Path(config.data.chat_template)).is_file():
        found["data.chat_template"] = _digest(template.parent, [template])
    if config.adapter.start_from:
        adapter = Path(config.adapter.start_from)
        weights = weight_files(adapter, saved_adapter.WEIGHTS_FILE)
        found["the adapter's files"] = _digest(adapter, weights, saved_adapter.config_digest(adapter))
    return found


def _tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a tokenizer is read from."""
    files = [folder / name for name in (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES)]
    templates = sorted(folder.glob("additional_chat_templates/*.jinja"))
    return [path for path in (*files, *templates) if path.is_file()]


def _digest(folder: Path, paths: Sequence[Path], settings: str = "") -> str:
    """Return a digest of the names and contents of files of a folder, and of what its settings say."""
    files = ((path.relative_to(folder).as_posix().encode(), _sha256(path)) for path in paths)
    return digest(settings.encode(), *(part for file in files for part in file)).hex()


def _sha256(path: Path) -> bytes:
    work = f"the reading of {path.name}, to compare it with the other sites'"
    with activity.during(work):
        return bytes.fromhex(sha256_of(path))
