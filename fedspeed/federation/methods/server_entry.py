"""Whether a method's line in `METHODS` and its class agree about having a server."""

from collections.abc import Collection

from fedspeed.federation.methods.config import Entry

SERVER_PARTS = ("serve", "server_step")  # members of `Method` that only a method with a server overrides


def server_problem(name: str, entry: Entry, method: str, overridden: Collection[str]) -> str:
    """Return how a method's entry and its class disagree about having a server; empty if they agree.

    Args:
        entry: of the method `name` in `METHODS`. method: name of its class.
        overridden: those of SERVER_PARTS that the class overrides.
    """
    where = "fedspeed/federation/methods/config.py"
    setting = f"federation.method={name}"
    if overridden and not entry.server:
        has = f"{method} has {' and '.join(overridden)}"
        return f"{setting}: {has}; say server=True of it in METHODS of {where}"
    if "serve" in overridden and entry.sums_only:
        return (
            f"{setting}: METHODS of {where} says that {method} needs only sums over all clients "
            "(sums_only=True), but clients send it single values in serve; leave one of them out"
        )
    if (entry.server or entry.public_rows) and not overridden:
        return (
            f"{setting}: METHODS of {where} says that it has a server, but {method} has neither "
            "serve nor server_step; write one of them, or leave out server=True and public_rows=True"
        )
    return ""
