"""Participants as organisations: TLS 1.3 between every two of them, each with the key that the roster has of
it.

Every site listens on one port. Of two members the one with the higher number dials the other, twice: one
connection for each direction, so that no connection is ever read and written at the same time. Whoever
reaches the port without a key of the roster gets no further than the handshake.
"""

import contextlib
import errno
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fedspeed.log import LOG
from fedspeed.net.sockets import receive_exactly, receive_into
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.identity import Roster
from fedspeed.routing.listen_address import ListenAddress, open_port
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import TransportError
from fedspeed.routing.transports.call_queue import CallQueue
from fedspeed.routing.transports.frames import (
    Crashed,
    Frame,
    FrameTransport,
    Gone,
    Header,
    Read,
    Received,
    result_of,
)
from fedspeed.routing.transports.tls_sockets import reason_of, set_options, ssl_context

_HEADER = struct.Struct(">4sIIQ")  # magic, attempt, phase, bytes of the content
_MAGIC = b"FdS2"
_WRITES = b"w"  # first byte of a connection: whoever has dialled writes on it
_READS = b"r"
_WELCOME = b"y"
HANDSHAKE_S = 10.0
# Connections that may be in their handshake at the same time. One more takes the place of the oldest.
MAX_HANDSHAKES = 64
_RETRY_S = 0.3
REPORT_S = 15.0  # how often a site that waits for others says so
CLOSE_S = 5.0  # for what is on its way to leave, and for threads to end
_DISCARD_BYTES = 1 << 16  # memory for a content that nobody needs

_Outgoing = tuple[Frame, float]  # with the time of `time.monotonic` at which it must have left


class TlsTransport(FrameTransport):
    """A transport between the members of a roster."""

    def __init__(
        self, key_file: str, public: bytes, roster: Roster, start_timeout_s: float, listen: ListenAddress
    ):
        """Listen, dial the members before this one in the roster, and wait until all are connected.

        Args:
            key_file: this member's private key and certificate. public: its identity key, 32 bytes.

        Raises:
            ConfigError: the port cannot be opened.
            TransportError: somebody did not connect within `start_timeout_s`.
        """
        names = [card.name for card in roster.members]
        super().__init__(roster.keys.index(public), len(roster.members), names)
        self._roster = roster
        self._closed = threading.Event()
        self._server = ssl_context(ssl.PROTOCOL_TLS_SERVER, key_file, roster)
        self._client = ssl_context(ssl.PROTOCOL_TLS_CLIENT, key_file, roster)
        self._outward: dict[int, ssl.SSLSocket] = {}  # connections that this site writes, by peer
        self._inward: dict[int, ssl.SSLSocket] = {}  # those that it reads
        peers = [i for i in range(self.size) if i != self.rank]
        self._reads: dict[int, CallQueue] = {i: CallQueue() for i in peers}
        self._outgoing: dict[int, queue.SimpleQueue[_Outgoing | None]] = {
            i: queue.SimpleQueue() for i in peers
        }
        self._broken: dict[int, Gone] = {}  # why nothing more can be sent to a peer
        self._leaving_until = 0.0  # when the message that ends the run must have left
        self._workers: dict[socket.socket, threading.Thread] = {}  # the only thread that uses the socket
        self._changed = threading.Condition()
        self._refused: set[tuple[str, str]] = set()  # (address, reason) of refusals that were logged
        self._handshakes: dict[ssl.SSLSocket, None] = {}  # under way, the oldest first
        self._failures: dict[int, str] = {}  # why the last attempt to dial a peer failed
        self._listener = open_port(listen)
        LOG.info(f"{roster.members[self.rank].name} listens on {listen}, which {listen.source} says")
        self._start(self._listener, self._accept)
        end = time.monotonic() + start_timeout_s
        for peer in range(self.rank):
            for direction in (_WRITES, _READS):
                threading.Thread(
                    target=self._dial, args=(peer, direction, end), name="tls-dial", daemon=True
                ).start()
        self._await_all(start_timeout_s)

    def _await_all(self, timeout_s: float) -> None:
        """Wait until all are connected; say at once, and every REPORT_S seconds, who is not."""
        end = time.monotonic() + timeout_s
        members = self._roster.members
        while missing := self._missing():
            left_s = end - time.monotonic()
            if left_s <= 0:
                self.close()
                raise TransportError(
                    f"{', '.join(members[i].name for i in missing)} did not connect within {timeout_s:.0f} "
                    f"s: {self._describe(missing)}; start the same run there, or leave a site that is dead "
                    "out of a newer roster"
                )
            LOG.info(f"waiting for {self._describe(missing)}; {left_s:.0f} s left")
            with self._changed:
                self._changed.wait_for(lambda: not self._missing(), min(REPORT_S, left_s))
        LOG.info(f"all {self.size} sites are connected")

    def _missing(self) -> list[int]:
        return [i for i in self._reads if not (i in self._outward and i in self._inward)]

    def _describe(self, peers: list[int]) -> str:
        """Return what is known of members that are not connected: this site dials those before it in the
        roster, the others dial it.
        """
        cards = self._roster.members
        return "; ".join(
            f"{cards[i].name} ({cards[i].address}: {self._failures.get(i, 'no answer yet')})"
            if i < self.rank
            else f"{cards[i].name} (connects to this site at {cards[self.rank].address})"
            for i in peers
        )

    def _start(self, used: socket.socket, work: Callable[..., None], *args: Any) -> None:
        """Start the thread that uses a socket, and nobody else does."""
        self._workers[used] = threading.Thread(
            target=work, args=args, name=f"tls{work.__name__}", daemon=True
        )
        self._workers[used].start()

    # Connections.

    def _accept(self) -> None:
        """Begin a handshake with whoever dials, until the transport is closed."""
        while not self._closed.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed, or out of file descriptors for a moment
                self._closed.wait(_RETRY_S)
                continue
            try:
                connection.settimeout(HANDSHAKE_S)
                secured = self._server.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            except (OSError, ValueError) as error:
                self._refuse(address, reason_of(error), connection)
                continue
            self._add_handshake(secured)
            try:
                threading.Thread(
                    target=self._greet, args=(secured, address), name="tls-greet", daemon=True
                ).start()
            except RuntimeError as error:  # no more threads
                with self._changed:
                    self._handshakes.pop(secured, None)
                self._refuse(address, str(error), secured)

    def _add_handshake(self, secured: ssl.SSLSocket) -> None:
        """Note a handshake; end the oldest one if there are too many. A member's takes milliseconds, so one
        that takes long is nobody's.
        """
        with self._changed:
            if len(self._handshakes) == MAX_HANDSHAKES:
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)
            self._handshakes[secured] = None

    def _greet(self, secured: ssl.SSLSocket, address: tuple[str, int]) -> None:
        """Find out who has dialled; keep the connection of a member that is not connected yet, refuse all
        others.
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
            self._keep(peer, secured, reads=hello[:1] == _WRITES, greeting=_WELCOME)
        except (OSError, ValueError) as error:
            with self._changed:
                displaced = secured not in self._handshakes
            self._refuse(address, "too many handshakes at once" if displaced else reason_of(error), secured)
        finally:
            with self._changed:
                self._handshakes.pop(secured, None)

    def _dial(self, peer: int, direction: bytes, end: float) -> None:
        """Connect to a peer that listens; try again until `end`."""
        card = self._roster.members[peer]
        last = ""
        while not self._closed.is_set() and time.monotonic() < end:
            try:
                connection = socket.create_connection(
                    card.host_and_port, timeout=min(HANDSHAKE_S, max(0.1, end - time.monotonic()))
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
                reason = reason_of(error)
                self._failures[peer] = reason
                if not isinstance(error, ConnectionRefusedError | socket.timeout) and reason != last:
                    last = reason
                    LOG.info(f"connecting to {card.name} at {card.address}: {last}")
                self._closed.wait(_RETRY_S)

    def _member(self, secured: ssl.SSLSocket) -> int:
        """Return the number of the member at the other side, by the certificate that it has proved."""
        der = secured.getpeercert(binary_form=True)
        for i, card in enumerate(self._roster.members):
            if card.der == der and i != self.rank:
                return i
        raise ValueError("its certificate is in no roster")

    def _keep(self, peer: int, secured: ssl.SSLSocket, reads: bool, greeting: bytes = b"") -> None:
        """Use a connection from now on, for reading or for writing.

        Args:
            greeting: sent to the peer first.
        """
        connections = self._inward if reads else self._outward
        set_options(secured)
        with self._changed:
            self._handshakes.pop(secured, None)  # from here on nobody can displace it
            if peer in connections or self._closed.is_set():
                raise ValueError(f"{self._roster.members[peer].name} is connected already")
            secured.sendall(greeting)
            secured.settimeout(None)
            connections[peer] = secured
            if reads:
                self._start(secured, self._reads[peer].work)
            else:
                self._start(secured, self._write, peer, secured)
            self._changed.notify_all()

    def _refuse(self, address: tuple[str, int], reason: str, connection: socket.socket) -> None:
        """Close a connection; log one line for each address and reason, however often it comes."""
        connection.close()
        refusal = (address[0], reason)
        if refusal not in self._refused and len(self._refused) < 1000 and not self._closed.is_set():
            self._refused.add(refusal)
            LOG.info(f"refused a connection from {address[0]}:{address[1]}: {reason}")

    # Frames.

    def _read_all(self, reads: Mapping[int, Read]) -> dict[int, Received]:
        """Read from several peers at the same time, each in the thread of its connection. A peer from which
        nothing is to be read is blocked, once the operating system's buffers are full.
        """
        results = {peer: self._reads[peer].submit(partial(result_of, read)) for peer, read in reads.items()}
        return {peer: result.result() for peer, result in results.items()}

    def receive_header(self, peer: int, end: float) -> Header:
        """See `FrameSource.receive_header`."""
        data = bytearray(_HEADER.size)
        self._fill(peer, memoryview(data), end)
        magic, attempt, phase, nbytes = _HEADER.unpack(data)
        if magic != _MAGIC:
            raise Gone(f"{self.names[peer]}: it sent something that is no frame of this version of FedSpeed")
        return Header((attempt, phase), nbytes)

    def receive_content(self, peer: int, nbytes: int, end: float) -> np.ndarray:
        """See `FrameSource.receive_content`."""
        content = BUFFERS.take(nbytes)
        self._fill(peer, content.data, end)
        return content

    def discard_content(self, peer: int, nbytes: int, end: float) -> None:
        """See `FrameSource.discard_content`."""
        unneeded = memoryview(bytearray(min(nbytes, _DISCARD_BYTES)))
        while nbytes:
            count = min(nbytes, len(unneeded))
            self._fill(peer, unneeded[:count], end)
            nbytes -= count

    def _fill(self, peer: int, buffer: memoryview, end: float) -> None:
        """Read from a peer until a buffer is full. Raises Gone."""
        try:
            receive_into(self._inward[peer], buffer, end)
        except TimeoutError as error:
            few = str(error) if str(error).startswith("only") else "it sent nothing in time"
            # The same exception where the machine of the peer has not answered the operating system.
            kind = Crashed if error.errno == errno.ETIMEDOUT else Gone
            raise kind(f"{self.names[peer]}: {few}") from None
        except (OSError, ValueError) as error:
            raise Crashed(f"{self.names[peer]}: {reason_of(error)}") from error

    def _write(self, peer: int, secured: ssl.SSLSocket) -> None:
        """Write frames to one peer. If it takes none, that blocks this thread, and no other peer. Once it has
        failed to take one in time, all others are dropped, so that they do not stay in memory.
        """
        while (outgoing := self._outgoing[peer].get()) is not None:
            if peer in self._broken:
                continue
            frame, end = outgoing
            header = _HEADER.pack(_MAGIC, *frame.step, frame.nbytes)
            try:
                for data in [memoryview(header), *(piece.data for piece in frame.pieces)]:
                    secured.settimeout(max(0.1, end - time.monotonic()))
                    secured.sendall(data)
            except OSError as error:
                kind = Gone if isinstance(error, TimeoutError) else Crashed
                self._broken[peer] = kind(f"{self.names[peer]}: {reason_of(error)}")

    def send_frame(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """See `FrameTransport.send_frame`."""
        if peer in self._broken:
            raise self._broken[peer]
        self._outgoing[peer].put((frame, time.monotonic() + deadline_s))

    def end_run(self) -> None:
        """See `Transport.end_run`. From now on `close` waits until peers have received it, for as long as
        they may be waiting for others: they would take this site for crashed, and go on without it.
        """
        super().end_run()
        self._leaving_until = time.monotonic() + self._deadline_s

    def close(self) -> None:
        """Send what is on its way, and close all connections.

        A socket is closed only after its thread has ended: its file descriptor may belong to another file at
        once, which the thread would then read and write.
        """
        self._closed.set()
        for outgoing in self._outgoing.values():
            outgoing.put(None)
        for reads in self._reads.values():
            reads.close()
        with self._changed:
            workers = dict(self._workers)
        end = max(time.monotonic() + CLOSE_S, self._leaving_until)
        for secured in self._outward.values():
            workers[secured].join(max(0.0, end - time.monotonic()))
        for used in workers:
            # Closing alone would leave the port open behind a thread in accept(). An SSLSocket's own shutdown
            # would take the encryption away first.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(used, socket.SHUT_RDWR)
        end = time.monotonic() + CLOSE_S
        for used, worker in workers.items():
            worker.join(max(0.0, end - time.monotonic()))
            if not worker.is_alive():
                used.close()


def open_transport(context: TransportContext) -> TlsTransport:
    """Connect to all other sites.

    Raises:
        ConfigError: the port cannot be opened.
        TransportError: a site did not connect in time.
    """
    site = context.member
    assert site is not None, "a site knows its membership before it opens a transport"
    return TlsTransport(site.key_file, site.public, site.roster, context.timeout_s, site.listen)
