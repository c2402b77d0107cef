"""`fedspeed keys`: identities and the roster of a federation of organisations."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedspeed.cli.arguments import Commands, file_name
from fedspeed.cli.output import print_result
from fedspeed.errors import EXIT_OK

if TYPE_CHECKING:
    from fedspeed.routing.identity import Roster


def add(commands: Commands) -> None:
    """Add the command and its arguments to the parser."""
    keys = commands.add_parser(
        "keys",
        help="make identities and the roster of a federation of organisations",
        description="An identity is made once by each organisation, the roster once by who runs the "
        "federation (docs/organisations.md).",
    )
    actions = keys.add_subparsers(metavar="WHAT", required=True)
    new = actions.add_parser(
        "new",
        help="make an identity: NAME.key, to be kept secret, and NAME.json, to be given to who makes the "
        "roster",
    )
    new.add_argument("name")
    new.add_argument(
        "--address", required=True, metavar="HOST:PORT", help="where this site listens for the others"
    )
    new.add_argument(
        "--out",
        type=file_name,
        default=Path("keys"),
        metavar="FOLDER",
        help="where to write them (default: keys)",
    )
    new.set_defaults(command=_new)
    roster = actions.add_parser("roster", help="sign a roster of members")
    roster.add_argument(
        "cards",
        nargs="+",
        type=file_name,
        metavar="CARD",
        help="the members' NAME.json, in the order that numbers them",
    )
    roster.add_argument(
        "--signer",
        required=True,
        type=file_name,
        metavar="KEY",
        help="private key of who runs the federation",
    )
    roster.add_argument(
        "--epoch", type=int, default=1, help="number of the roster; higher for a newer one (default: 1)"
    )
    roster.add_argument(
        "--server",
        default="",
        metavar="NAME",
        help="the member that is to be the server of a method that has one; no run asks for it yet, since "
        "such methods are refused "
        "between organisations",
    )
    roster.add_argument("--out", type=file_name, default=Path("roster.json"), metavar="FILE")
    roster.set_defaults(command=_roster)
    show = actions.add_parser(
        "show", help="print the public key of a card or a private key's file, or the members of a roster"
    )
    show.add_argument("file", type=file_name)
    show.set_defaults(command=_show)


def _new(arguments: argparse.Namespace) -> int:
    """Make an identity."""
    from fedspeed.routing import identity

    secret, public = identity.make(arguments.name, arguments.address, arguments.out)
    print_result(
        f"{secret}: keep it on this site, nobody else needs it\n"
        f"{public}: give it to who makes the roster\n"
        f"public key {identity.fingerprint(identity.read_card(public).key)}"
    )
    return EXIT_OK


def _roster(arguments: argparse.Namespace) -> int:
    """Sign a roster."""
    from fedspeed.files import write_atomically
    from fedspeed.routing import identity
    from fedspeed.routing.anonymous.crypto import public_bytes

    signer = identity.read_key(arguments.signer)
    cards = [identity.read_card(path) for path in arguments.cards]
    write_atomically(
        arguments.out, identity.sign_roster(cards, signer, arguments.epoch, arguments.server).encode()
    )
    roster = identity.read_roster(arguments.out, identity.fingerprint(public_bytes(signer)))
    print_result(
        f"{_members(arguments.out, roster)}\n"
        f"every site pins routing.roster_signer={identity.fingerprint(public_bytes(signer))}"
    )
    return EXIT_OK


def _members(path: Path, roster: "Roster") -> str:
    """Return a roster as text, one line for each member."""
    lines = [f"{path}: epoch {roster.epoch}, {len(roster.members)} members"]
    for i, card in enumerate(roster.members):
        server = "  (server)" if i == roster.server else ""
        lines.append(f"  {i}  {card.name}  {card.address}  {card.key.hex()}{server}")
    return "\n".join(lines)


def _show(arguments: argparse.Namespace) -> int:
    """Print a public key, or the members of a roster."""
    from fedspeed.routing import identity
    from fedspeed.routing.anonymous.crypto import public_bytes

    if arguments.file.suffix == ".json" and (signed := identity.read_roster_to_show(arguments.file)):
        roster, signer = signed
        print_result(
            f"{_members(arguments.file, roster)}\n"
            f"signed by {signer}; a site takes it only if it has pinned this key (routing.roster_signer)"
        )
        return EXIT_OK
    card = arguments.file.suffix == ".json"
    print_result(
        identity.fingerprint(
            identity.read_card(arguments.file).key
            if card
            else public_bytes(identity.read_key(arguments.file))
        )
    )
    return EXIT_OK
