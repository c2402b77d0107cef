"""What the connections between organisations are made with: contexts of TLS 1.3, keepalives, and the text of
errors.
"""

import socket
import ssl

from fedspeed.routing.identity import Roster

# Seconds until the first keepalive and between others, and how many. After 50 s without an answer the
# operating system takes a machine for dead.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 6))


def ssl_context(side: int, key_file: str, roster: Roster) -> ssl.SSLContext:
    """Return a TLS 1.3 context that accepts the certificates of the roster, and no others."""
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a member is its key, wherever it is
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(key_file)
    context.load_verify_locations(cadata="".join(card.certificate for card in roster.members))
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no resumption: every connection proves its key
    return context


def reason_of(error: Exception) -> str:
    """Return an error's reason as text."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the other side has closed the connection"
    if isinstance(error, ssl.SSLError):
        return f"no TLS 1.3 with a key of the roster ({(error.reason or 'closed').lower().replace('_', ' ')})"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def set_options(connection: socket.socket) -> None:
    """Let the operating system notice a dead machine at the other side, and send small messages at once."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
