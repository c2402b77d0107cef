"""Data sets of the Hugging Face hub, read with the library `datasets`."""

from collections.abc import Iterator

from fedspeed.errors import DataError

_LOCAL = "a local file (.jsonl, .json, .csv, .tsv or .parquet)"


def hub_records(name: str) -> Iterator[tuple[str, object]]:
    """Yield (where, record) for every record of the `train` split of a hub data set.

    Args:
        name: "owner/name", or "owner/name:configuration" where the set has several.

    Raises:
        DataError: the library is missing, or cannot load the set (offline, no such set).
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data.path={name}: there is no such file or folder, and reading it as a hub data set needs the "
            f"library: pip install datasets (or give {_LOCAL})"
        ) from None
    set_name, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(set_name, configuration or None, split="train")
    except Exception as error:  # of many types: OSError, ValueError, the library's, its network stack's
        raise DataError(
            f"data.path={name}: there is no such file or folder, and the hub data set cannot be loaded "
            f"({type(error).__name__}: {error}). Without network, give {_LOCAL}"
        ) from error
    for index, record in enumerate(found):
        yield f"{name}, item {index}", record
