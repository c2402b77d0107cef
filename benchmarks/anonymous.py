"""What anonymity costs: an exchange in every mode beside the plain one, on the same vectors, in one run.

    python benchmarks/anonymous.py [--clients 3] [--mb 200] [--modes plain,mask,mix,mix+mask] [--transport
    local|tls] [--profile]

Every client is a thread (local: one works at a time, as if it had a core for itself) or a process (tls, on
loopback) of this machine. Bytes are what a client sends to others, beside the formula (L + 1) S + S for L
relays and vectors of S bytes (S + S without relays). CPU-seconds are those of all threads, divided by the
clients; seconds are of this machine, which here does the work of all clients. --profile prints where the
first client's CPU-seconds go.
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

    turn = getattr(transport, "turn", contextlib.nullcontext())

    def working(kind):
        class Working(kind):
            def _run(self, *exchange):
                with (
                    turn,
                    cProfile.Profile(time.thread_time)
                    if args.profile and transport.rank == 0
                    else contextlib.nullcontext() as self.profile,
                ):
                    return super()._run(*exchange)

        return Working

    if mode == "plain":
        return working(PlainExchange)(transport, 600)
    key = Ed25519PrivateKey.generate()
    with turn:
        roster = exchange_public_keys(transport, 60, key)
    return working(AnonymousExchange)(
        transport, RoutingConfig(mode, cell_kib=args.cell_kib, step_deadline_s=600), key, roster, b"benchmark"
    )


def act(transport, mode: str, words: int, args, out: dict, *, gate: threading.Barrier | None = None) -> None:
    vector = np.random.default_rng(transport.rank).standard_normal(words, dtype=np.float32) * np.float32(1e-3)
    exchange = exchange_of(transport, mode, args)
    exchange.start(vector[:1000].copy(), 1.0).wait(600)  # memory and keys are there from here on
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


def local(args, mode: str, words: int) -> dict:
    from fedspeed.routing.transports.local import LocalTransport

    class InTurn(LocalTransport):
        """Lets the others work while it waits. Clients that shared cores and caches would pay for each
        other's misses.
        """

        turn = threading.Lock()

        def _receive(self, *wait):
            self.turn.release()
            try:
                return super()._receive(*wait)
            finally:
                self.turn.acquire()

    out = {}
    gate = threading.Barrier(args.clients)
    threads = [
        threading.Thread(target=act, args=(t, mode, words, args, out), kwargs={"gate": gate})
        for t in InTurn.set_of(args.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(args.clients):  # one process: its CPU-seconds are everybody's
        out[rank] = [(s, c / args.clients, b) for s, c, b in out[rank]]
    return out


def site(args, mode: str, words: int, folder: str, rank: int, *, pipe) -> None:
    from fedspeed.routing import identity
    from fedspeed.routing.config import RoutingConfig
    from fedspeed.routing.listen_address import listen_address
    from fedspeed.routing.transports.tls import TlsTransport

    roster = identity.read_roster(Path(folder) / "roster.json", str(Path(folder) / "operator.json"))
    out: dict = {}
    listen = listen_address(RoutingConfig(), roster.members[rank])
    act(
        TlsTransport(f"{folder}/site{rank}.key", roster.keys[rank], roster, 60, listen),
        mode,
        words,
        args,
        out,
    )
    pipe.send(out)


def tls(args, mode: str, words: int) -> dict:
    import multiprocessing

    from fedspeed.net.ports import free_port
    from fedspeed.routing import identity

    context = multiprocessing.get_context("spawn")
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cards = [
            identity.read_card(identity.make(f"site{i}", f"127.0.0.1:{free_port()}", place)[1])
            for i in range(args.clients)
        ]
        identity.make("operator", "127.0.0.1:1", place)
        (place / "roster.json").write_text(
            identity.sign_roster(cards, identity.read_key(place / "operator.key"), 1)
        )
        pipes = [context.Pipe() for _ in range(args.clients)]
        processes = [
            context.Process(target=site, args=(args, mode, words, folder, i), kwargs={"pipe": pipes[i][1]})
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("clients", 3), ("mb", 200), ("cell-kib", 4096), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--modes", default="plain,mask,mix,mix+mask")
    parser.add_argument("--transport", choices=("local", "tls"), default="local")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    words = args.mb * 10**6 // 4
    found = {}
    for mode in args.modes.split(","):
        out = (local if args.transport == "local" else tls)(args, mode, words)
        sums = {out["sum", r] for r in range(args.clients)}
        assert len(sums) == 1, f"clients hold different sums: {sums}"
        seconds, cpu, sent = (
            float(np.mean([min(run[i] for run in out[r]) for r in range(args.clients)])) for i in range(3)
        )
        hops = 0 if "mix" not in mode else min(2, args.clients - 1)
        formula = (hops + 2) * args.mb * 1e6
        found[mode] = {"seconds": seconds, "cpu": cpu, "sent": sent, "formula": formula}
        beside = f"   {cpu / found['plain']['cpu']:5.2f} x plain" if "plain" in found else ""
        print(
            f"{mode:9} {seconds:8.2f} s   {cpu:7.3f} CPU-s a client{beside}   {args.mb / 1000 / cpu:6.3f} "
            f"GB/CPU-s   sent {sent / 1e6:8.1f} MB a client, "
            f"{sent / formula:.3f} of the formula",
            flush=True,
        )
    print(json.dumps({"clients": args.clients, "mb": args.mb, "transport": args.transport, "modes": found}))


if __name__ == "__main__":
    main()
