"""Measure what anonymity costs: an exchange in every mode, compared with the plain one on the same vectors.

    python benchmarks/anonymous.py [--clients 3] [--mb 200] [--modes plain,mask,mix,mix+mask] [--transport
    local|tls] [--profile]

Every client is a thread (local: one works at a time, as if it had a core of its own) or a process (tls, over
loopback) of this machine. Bytes are what a client sends to others, compared with the formula (L + 1) S + S
for L relays and vectors of S bytes (S + S without relays). CPU-seconds are those of all threads, divided by
the clients; seconds are of this machine, which does the work of all clients. --profile prints a profile of
the first client's CPU time.
"""

import argparse
import contextlib
import cProfile
import json
import os
import pstats
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402


def exchange_of(transport, mode: str, args):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedspeed.routing.anonymous.exchange import AnonymousExchange, exchange_public_keys
    from fedspeed.routing.config import RoutingConfig
    from fedspeed.routing.exchange import PlainExchange

    """Return an exchange in a mode, which runs while it has the transport's turn, if that has one."""
    turn = getattr(transport, "turn", contextlib.nullcontext())
    has_profile = args.profile and transport.rank == 0

    def measured(kind):
        class Measured(kind):
            profile = None  # of the last exchange

            def _run(self, *exchange):
                if has_profile:
                    self.profile = cProfile.Profile(time.thread_time)
                with turn, self.profile or contextlib.nullcontext():
                    return super()._run(*exchange)

        return Measured

    if mode == "plain":
        return measured(PlainExchange)(transport, 600)
    key = Ed25519PrivateKey.generate()
    with turn:
        roster = exchange_public_keys(transport, 60, key)
    config = RoutingConfig(mode, cell_kib=args.cell_kib, step_deadline_s=600)
    return measured(AnonymousExchange)(transport, config, key, roster, b"benchmark")


def take_part(
    transport, mode: str, length: int, args, out: dict, *, gate: threading.Barrier | None = None
) -> None:
    """Make the exchanges of one client, and write its measurements into `out`.

    Args:
        length: values of a vector.
        out: by client, (seconds, CPU-seconds of the process, bytes sent) of each exchange.
        gate: makes clients of one process begin and end together.
    """
    random = np.random.default_rng(transport.rank)
    vector = random.standard_normal(length, dtype=np.float32) * np.float32(1e-3)
    exchange = exchange_of(transport, mode, args)
    exchange.start(vector[:1000].copy(), 1.0).wait(600)  # a warm-up: threads and keys exist from here on
    for _ in range(args.repeat):
        if gate:
            gate.wait()
        sent = exchange.bytes_sent
        cpu = time.process_time()
        begin = time.perf_counter()
        total, _ = exchange.start(vector, 1.0).wait(600)
        if gate:
            gate.wait()
        out.setdefault(transport.rank, []).append((
            time.perf_counter() - begin,
            time.process_time() - cpu,
            exchange.bytes_sent - sent,
        ))
    out["sum", transport.rank] = float(total[0])
    if exchange.profile:
        pstats.Stats(exchange.profile).sort_stats("tottime").print_stats(16)
    exchange.close()


def measure_local(args, mode: str, length: int) -> dict:
    """Run all clients as threads, and return their measurements."""
    from fedspeed.routing.transports.local import LocalTransport

    class InTurn(LocalTransport):
        """A transport that lets the other clients work while it waits: clients that work at the same time
        would slow each other down by sharing cores and caches.
        """

        turn = threading.Lock()

        def receive_header(self, *wait):
            self.turn.release()
            try:
                return super().receive_header(*wait)
            finally:
                self.turn.acquire()

    out = {}
    gate = threading.Barrier(args.clients)
    threads = [
        threading.Thread(target=take_part, args=(t, mode, length, args, out), kwargs={"gate": gate})
        for t in InTurn.set_of(args.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(args.clients):  # CPU-seconds of the process are those of all clients
        out[rank] = [(s, c / args.clients, b) for s, c, b in out[rank]]
    return out


def run_site(args, mode: str, length: int, folder: str, rank: int, *, pipe) -> None:
    """Run one client as a process, and send its measurements through a pipe."""
    from fedspeed.routing import identity
    from fedspeed.routing.config import RoutingConfig
    from fedspeed.routing.listen_address import listen_address
    from fedspeed.routing.transports.tls import TlsTransport

    roster = identity.read_roster(Path(folder) / "roster.json", str(Path(folder) / "operator.json"))
    out: dict = {}
    listen = listen_address(RoutingConfig(), roster.members[rank])
    transport = TlsTransport(f"{folder}/site{rank}.key", roster.keys[rank], roster, 60, listen)
    take_part(transport, mode, length, args, out)
    pipe.send(out)


def measure_tls(args, mode: str, length: int) -> dict:
    """Run all clients as processes, and return their measurements."""
    import multiprocessing

    from fedspeed.net.ports import free_port
    from fedspeed.routing import identity

    context = multiprocessing.get_context("spawn")
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        cards = [
            identity.read_card(identity.make(f"site{i}", f"127.0.0.1:{free_port()}", path)[1])
            for i in range(args.clients)
        ]
        identity.make("operator", "127.0.0.1:1", path)
        (path / "roster.json").write_text(
            identity.sign_roster(cards, identity.read_key(path / "operator.key"), 1)
        )
        pipes = [context.Pipe() for _ in range(args.clients)]
        processes = [
            context.Process(
                target=run_site, args=(args, mode, length, folder, i), kwargs={"pipe": pipes[i][1]}
            )
            for i in range(args.clients)
        ]
        for process in processes:
            process.start()
        for ours, _ in pipes:
            out |= ours.recv()
        for process in processes:
            process.join()
    return out


def main() -> None:
    """Measure all modes, and print a line for each and everything as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("clients", 3), ("mb", 200), ("cell-kib", 4096), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--modes", default="plain,mask,mix,mix+mask")
    parser.add_argument("--transport", choices=("local", "tls"), default="local")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    length = args.mb * 10**6 // 4
    measure = measure_local if args.transport == "local" else measure_tls
    modes = {}
    for mode in args.modes.split(","):
        out = measure(args, mode, length)
        sums = {out["sum", r] for r in range(args.clients)}
        assert len(sums) == 1, f"clients have different sums: {sums}"
        seconds, cpu, sent = (
            float(np.mean([min(run[i] for run in out[r]) for r in range(args.clients)])) for i in range(3)
        )
        relays = 0 if "mix" not in mode else min(2, args.clients - 1)
        formula = (relays + 2) * args.mb * 1e6
        modes[mode] = {"seconds": seconds, "cpu": cpu, "sent": sent, "formula": formula}
        ratio = f"   {cpu / modes['plain']['cpu']:5.2f} x plain" if "plain" in modes else ""
        print(
            f"{mode:9} {seconds:8.2f} s   {cpu:7.3f} CPU-s a client{ratio}   {args.mb / 1000 / cpu:6.3f} "
            f"GB/CPU-s   sent {sent / 1e6:8.1f} MB a client, "
            f"{sent / formula:.3f} of the formula",
            flush=True,
        )
    print(json.dumps({"clients": args.clients, "mb": args.mb, "transport": args.transport, "modes": modes}))


if __name__ == "__main__":
    main()
