"""Decide what is unmasked by whom once a set of updates is committed. Pure."""

import itertools
from collections.abc import Mapping

from fedspeed.routing.anonymous import shamir
from fedspeed.routing.anonymous.announcement import commit_to_secret
from fedspeed.routing.anonymous.paths import PathPlan, backup_of

_MAX_RECONSTRUCTIONS = 256  # sets of shares to try


def reconstruct_secret(shares: Mapping[int, int], threshold: int, commitment: bytes) -> bytes:
    """Return the secret of a lost member's self mask from the shares of others.

    One false share spoils only the sets that it is in, so sets of `threshold` shares are tried until one
    gives the secret with this commitment. If none does, the last secret tried is returned; the caller
    compares it.

    Args:
        shares: by holder.
    """
    secret = b""
    sets = itertools.combinations(shares.items(), threshold)
    for some in itertools.islice(sets, _MAX_RECONSTRUCTIONS):
        secret = shamir.to_bytes(shamir.reconstruct(dict(some)))
        if commit_to_secret(secret) == commitment:
            break
    return secret


def chunks_to_unmask(plan: PathPlan, member: int, lost: frozenset[int]) -> list[int]:
    """Return the chunks that a member unmasks: its own, and those of lost owners whose backup it is."""
    if member in lost:
        return []
    owners = (member, *(owner for owner in lost if backup_of(owner, plan.members) == member))
    return sorted(chunk for owner in owners for chunk in plan.owned(owner))


def owner_without_backup(lost: frozenset[int], members: int) -> int | None:
    """Return a lost owner whose backup is lost too; None if there is none."""
    return next((owner for owner in lost if backup_of(owner, members) in lost), None)
