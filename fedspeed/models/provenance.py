"""The origin of a base that `fedspeed import-base` wrote: a small file in its folder. No torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name
from fedspeed.models.json_object import read_object

FILE = "fedspeed_base.json"


@dataclass(frozen=True)
class Provenance:
    """The origin of an imported base.

    Attributes:
        source: hub name, or the name of the file or folder that was imported, without its path.
        format: of the source: gguf, safetensors, torch, fp8, gptq or awq.
        dtype: that was asked for; auto: as in the source.
        files: name of each file with weights -> SHA-256.
        fingerprint: digest of the source by samples (models.file_digests).
        hub_name: under which anybody gets weights with the same values; empty if there is none.
        revision: commit of the hub's repository.
        origin: where the user got the source; empty if not given.
    """

    source: str
    format: str
    dtype: str
    files: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    hub_name: str = ""
    revision: str = ""
    origin: str = ""

    def text(self) -> str:
        """Return the content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def describe(self) -> str:
        """Return a line that says where the base came from, with the digest of its first file."""
        commit = f" at {self.revision[:12]}" if self.revision else ""
        origin = f" ({self.origin})" if self.origin else ""
        first = next(iter(self.files.items()), None)
        more = f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""
        digest = f", sha256 of {first[0]}{more}: {first[1]}" if first else ""
        return f"{self.source}{commit}{origin}, {self.format}{digest}"


def provenance_of(folder: Path) -> Provenance | None:
    """Return the origin of a base's folder; None if `import-base` did not write it.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    values = read_object(path, "the origin of a base")
    try:
        return Provenance(**values)
    except TypeError as error:
        raise ModelError(f"{path}: damaged ({error}); delete the folder and import the base again") from error


def public_name(base: str) -> str:
    """Return the hub name under which anybody can get a base, from its folder or its own name; empty if there
    is none.
    """
    folder = Path(base)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        return base if is_hub_name(base) else ""
    origin = provenance_of(folder)
    return origin.hub_name if origin else ""


def origin_text(base: str) -> str:
    """Return where a base came from, if `import-base` wrote its folder; empty for any other."""
    folder = Path(base)
    origin = provenance_of(folder.parent if folder.is_file() else folder)
    return origin.describe() if origin else ""
