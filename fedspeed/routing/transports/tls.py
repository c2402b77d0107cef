"""Participants as organisations: TLS 1.3 between every two of them, each proving the key that the roster
names.

Everyone listens on one port. Of two members the one with the higher number dials the other, twice: one
connection for each direction, so that no connection is ever read and written at the same time. Whoever
reaches the port without a roster's key gets no further than the handshake.
"""

import contextlib
import queue
import socket
import ssl
import struct
import threading
import time

from fedspeed.log import LOG
from fedspeed.net.sockets import receive_exactly, receive_into
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.identity import Roster
from fedspeed.routing.listening import ListenAddress, open_port
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import TransportError
from fedspeed.routing.transports.frames import (
    BYTES_AHEAD,
    Frame,
    FrameTransport,
    Gone,
    is_frame,
    memory_bytes,
)
from fedspeed.routing.transports.inbox import Inbox

_HEADER = struct.Struct(">4sIIIQ")  # mark, attempt, state, number of pieces, bytes of each
_MARK = b"FdSp"
_WRITES = b"w"
_READS = b"r"
_WELCOME = b"y"
HANDSHAKE_S = 10.0
# that may be shaking hands at the same time; who comes then takes the place of the one that has been at it
# for longest
STRANGERS = 64
WAITING = 4  # frames of one peer that may lie here before they are asked for
_RETRY_S = 0.3
SAY_S = 15.0  # how often a site that waits says for whom
CLOSE_S = 5.0  # for what is on its way to leave, and for threads to end


class TlsTransport(FrameTransport):
    """Args:
        key_file: this member's private key and certificate. public: its identity.
        listen: where this site listens.
        start_timeout_s: until everyone is connected.

    Raises:
        ConfigError: the port cannot be had.
        TransportError: somebody did not come.
    """

    def __init__(
        self, key_file: str, public: bytes, roster: Roster, start_timeout_s: float, listen: ListenAddress
    ):
        super().__init__(roster.keys.index(public), len(roster.members))
        self._roster, self._closed = roster, threading.Event()
        self._server, self._client = (
            _context(side, key_file, roster) for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
        )
        self._writers: dict[int, ssl.SSLSocket] = {}
        self._readers: dict[int, ssl.SSLSocket] = {}
        peers = [i for i in range(self.size) if i != self.rank]
        self._came: dict[int, Inbox] = {i: Inbox(WAITING, BYTES_AHEAD) for i in peers}
        self._outgoing: dict[int, queue.SimpleQueue] = {i: queue.SimpleQueue() for i in self._came}
        self._broken: dict[int, str] = {}  # why nothing more can be sent to a peer
        self._workers: dict[object, threading.Thread] = {}  # by the socket that it, and nobody else, uses
        self._changed, self._refused = threading.Condition(), set()
        self._strangers: dict[ssl.SSLSocket, None] = {}  # that are shaking hands, the first to come first
        self._failures: dict[int, str] = {}  # why a peer that this site dials could not be reached last
        self._listener = open_port(listen)
        LOG.info(f"{roster.members[self.rank].name} listens on {listen}, which {listen.source} says")
        self._start(self._listener, self._accept)
        for peer in range(self.rank):
            for direction in (_WRITES, _READS):
                threading.Thread(
                    target=self._dial,
                    args=(peer, direction, time.monotonic() + start_timeout_s),
                    name="tls-dial",
                    daemon=True,
                ).start()
        self._await_all(start_timeout_s)

    def _await_all(self, timeout_s: float) -> None:
        """Until all are connected; says at once, and every SAY_S seconds, who is not."""
        end = time.monotonic() + timeout_s
        members = self._roster.members
        while missing := self._missing():
            left_s = end - time.monotonic()
            if left_s <= 0:
                self.close()
                raise TransportError(
                    f"{', '.join(members[i].name for i in missing)} did not connect within {timeout_s:.0f} "
                    "s: "
                    f"{self._awaited(missing)}"
                )
            LOG.info(f"waiting for {self._awaited(missing)}; {left_s:.0f} s left")
            with self._changed:
                self._changed.wait_for(lambda: not self._missing(), min(SAY_S, left_s))
        LOG.info(f"all {self.size} sites are connected")

    def _missing(self) -> list[int]:
        return [i for i in self._came if not (i in self._writers and i in self._readers)]

    def _awaited(self, peers: list[int]) -> str:
        """What is known of members that are not connected: those before this one in the roster it dials, the
        others dial it.
        """
        cards = self._roster.members
        return "; ".join(
            f"{cards[i].name} ({cards[i].address}: {self._failures.get(i, 'no answer yet')})"
            if i < self.rank
            else f"{cards[i].name} (which dials {cards[self.rank].address})"
            for i in peers
        )

    def _start(self, end, work, *args) -> None:
        self._workers[end] = threading.Thread(target=work, args=args, name=f"tls{work.__name__}", daemon=True)
        self._workers[end].start()

    # Connections.

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed, or for a moment no file to be had
                self._closed.wait(_RETRY_S)
                continue
            try:
                connection.settimeout(HANDSHAKE_S)
                secured = self._server.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            except (OSError, ValueError) as error:
                self._refuse(address, _reason(error), connection)
                continue
            with self._changed:
                if (
                    len(self._strangers) == STRANGERS
                ):  # a member needs milliseconds: those who hold places for long are none
                    first = next(iter(self._strangers))
                    del self._strangers[first]
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(first, socket.SHUT_RDWR)
                self._strangers[secured] = None
            try:
                threading.Thread(
                    target=self._greet, args=(secured, address), name="tls-greet", daemon=True
                ).start()
            except RuntimeError as error:  # no thread to be had
                with self._changed:
                    self._strangers.pop(secured, None)
                self._refuse(address, str(error), secured)

    def _greet(self, secured: ssl.SSLSocket, address) -> None:
        """Find out who has dialled; a member of the roster that is not connected yet stays, everybody else
        goes.
        """
        try:
            secured.do_handshake()
            peer = self._member(secured)
            hello = receive_exactly(secured, 1 + len(self._roster.digest))
            if hello[1:] != self._roster.digest:
                raise ValueError(
                    f"{self._roster.members[peer].name} has another roster (epochs must be the same on all "
                    "sites)"
                )
            if peer <= self.rank or hello[:1] not in (_WRITES, _READS):
                raise ValueError(f"{self._roster.members[peer].name} is not to dial here")
            self._keep(peer, secured, reads=hello[:1] == _WRITES, word=_WELCOME)
        except (OSError, ValueError) as error:
            with self._changed:
                pushed_out = secured not in self._strangers
            self._refuse(address, "too many are shaking hands" if pushed_out else _reason(error), secured)
        finally:
            with self._changed:
                self._strangers.pop(secured, None)

    def _dial(self, peer: int, direction: bytes, end: float) -> None:
        card = self._roster.members[peer]
        last = ""
        while not self._closed.is_set() and time.monotonic() < end:
            try:
                connection = socket.create_connection(
                    card.place, timeout=min(HANDSHAKE_S, max(0.1, end - time.monotonic()))
                )
                secured = self._client.wrap_socket(connection)
                if self._member(secured) != peer:
                    raise ValueError(
                        f"{card.address} is not {card.name}, but "
                        f"{self._roster.members[self._member(secured)].name}"
                    )
                secured.sendall(direction + self._roster.digest)
                if receive_exactly(secured, 1) != _WELCOME:
                    raise ValueError(f"{card.name} does not welcome this site")
                self._keep(peer, secured, reads=direction == _READS)
                return
            except (OSError, ValueError) as error:
                self._failures[peer] = _reason(error)
                if not isinstance(error, ConnectionRefusedError | socket.timeout) and _reason(error) != last:
                    last = _reason(error)
                    LOG.info(f"connecting to {card.name} at {card.address}: {last}")
                self._closed.wait(_RETRY_S)

    def _member(self, secured: ssl.SSLSocket) -> int:
        der = secured.getpeercert(binary_form=True)
        for i, card in enumerate(self._roster.members):
            if card.der == der and i != self.rank:
                return i
        raise ValueError("its certificate is in no roster")

    def _keep(self, peer: int, secured: ssl.SSLSocket, reads: bool, word: bytes = b"") -> None:
        """Take a connection, and tell the other side so with a word."""
        mine = self._readers if reads else self._writers
        secured.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        secured.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._changed:
            self._strangers.pop(secured, None)  # from here on it can be pushed out no more
            if peer in mine or self._closed.is_set():
                raise ValueError(f"{self._roster.members[peer].name} is connected already")
            secured.sendall(word)
            secured.settimeout(None)
            mine[peer] = secured
            self._start(secured, self._read if reads else self._write, peer, secured)
            self._changed.notify_all()

    def _refuse(self, address, reason: str, connection: socket.socket) -> None:
        """One line for each address and reason, however often it comes."""
        connection.close()
        if (
            (address[0], reason) not in self._refused
            and len(self._refused) < 1000
            and not self._closed.is_set()
        ):
            self._refused.add((address[0], reason))
            LOG.info(f"refused a connection from {address[0]}:{address[1]}: {reason}")

    # Frames.

    def _read(self, peer: int, secured: ssl.SSLSocket) -> None:
        """Frames of one peer, until it is gone. A full inbox holds the peer up, not this process."""
        try:
            while True:
                mark, attempt, state, count, length = _HEADER.unpack(receive_exactly(secured, _HEADER.size))
                if mark != _MARK or not is_frame(count, length):
                    raise ValueError("it sent something that is no frame")
                nbytes = memory_bytes(count, length)
                self._came[peer].make_room(nbytes)
                pieces = BUFFERS.take(count, length)
                receive_into(secured, memoryview(pieces.reshape(-1)))
                self._came[peer].put(Frame((attempt, state), list(pieces)), nbytes)
        except (OSError, ValueError, MemoryError) as error:
            self._came[peer].put(_reason(error))

    def _write(self, peer: int, secured: ssl.SSLSocket) -> None:
        """Frames to one peer: one that takes none holds up this thread, and no other peer."""
        while (order := self._outgoing[peer].get()) is not None:
            frame, end = order
            try:
                for piece in (
                    _HEADER.pack(_MARK, *frame.step, len(frame.pieces), frame.pieces[0].size),
                    *frame.pieces,
                ):
                    secured.settimeout(max(0.1, end - time.monotonic()))
                    secured.sendall(memoryview(piece))
            except OSError as error:
                self._broken[peer] = _reason(error)
                return

    def _send(self, peer: int, frame: Frame, deadline_s: float) -> None:
        if peer in self._broken:
            raise Gone(f"{self._roster.members[peer].name}: {self._broken[peer]}")
        self._outgoing[peer].put((frame, time.monotonic() + deadline_s))

    def _receive(self, peer: int, timeout_s: float) -> Frame:
        name = self._roster.members[peer].name
        try:
            found = self._came[peer].get(timeout_s)
        except queue.Empty:
            raise Gone(f"{name} sent nothing for {timeout_s:.0f} s") from None
        if isinstance(found, str):
            raise Gone(f"{name}: {found}")
        return found

    def close(self) -> None:
        """What is on its way goes out first. A socket is closed when its thread has ended and not before: the
        number of its file may belong to another file at once, which the thread would read and write.
        """
        self._closed.set()
        for outgoing in self._outgoing.values():
            outgoing.put(None)
        with self._changed:
            workers = dict(self._workers)
        end = time.monotonic() + CLOSE_S
        for secured in self._writers.values():
            workers[secured].join(max(0.0, end - time.monotonic()))
        for socket_ in workers:  # a thread in accept() would hold the port open behind a mere close
            with contextlib.suppress(OSError):
                socket.socket.shutdown(
                    socket_, socket.SHUT_RDWR
                )  # an SSLSocket's own takes the encryption away first
        for came in self._came.values():  # a reader may wait for room
            came.close()
        end = time.monotonic() + CLOSE_S
        for socket_, worker in workers.items():
            worker.join(max(0.0, end - time.monotonic()))
            if not worker.is_alive():
                socket_.close()


def open_transport(context: TransportContext) -> TlsTransport:
    """Connect to all other sites. Raises ConfigError: the port cannot be had. TransportError: somebody did
    not come.
    """
    site = context.member
    return TlsTransport(site.key_file, site.public, site.roster, context.timeout_s, site.listen)


def _context(side: int, key_file: str, roster: Roster) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a member is its key, wherever it is
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(key_file)
    context.load_verify_locations(cadata="".join(card.certificate for card in roster.members))
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection proves its key
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the other side has closed the connection"
    if isinstance(error, ssl.SSLError):
        return f"no TLS 1.3 with a key of the roster ({(error.reason or 'closed').lower().replace('_', ' ')})"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
