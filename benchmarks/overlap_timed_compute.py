"""The share of an exchange that is hidden behind the next round's training with federation.staleness=1.
Compute is timed: a sleep in place of arithmetic, since on a machine with fewer cores than clients arithmetic
and cryptography would share them.

    python benchmarks/overlap_timed_compute.py [--clients 3] [--mb 40] [--mode mix+mask] [--compute-s 3]
        [--rounds 4]

Rounds have the order of federation/rounds.py: start the exchange of a round, compute the next one, wait. The
hidden share is 1 - (seconds waited) / (seconds of the exchange by itself, measured before in the same run).
The CPU-seconds of all clients' exchanges are printed too.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from benchmarks.anonymous import exchange_of  # noqa: E402


def client(transport, args, gate: threading.Barrier, out: dict) -> None:
    """Make the rounds of one client, and write (seconds of an exchange alone, seconds that a round waited,
    seconds of all rounds, CPU-seconds of the process) into `out`. With `args.staleness` 0 each exchange is
    waited for before the next round.
    """
    vector = np.random.default_rng(transport.rank).standard_normal(
        args.mb * 10**6 // 4, dtype=np.float32
    ) * np.float32(1e-3)
    exchange = exchange_of(transport, args.mode, args)
    exchange.start(vector[:1000].copy(), 1.0).wait(600)
    for _ in range(2):  # the first one also finds its memory
        gate.wait()
        begin = time.perf_counter()
        exchange.start(vector, 1.0).wait(600)
        alone = time.perf_counter() - begin
    gate.wait()
    cpu = time.process_time()
    waited = 0.0
    begin = time.perf_counter()
    pending = None
    for _ in range(args.rounds):
        time.sleep(args.compute_s)
        if pending is not None:
            before = time.perf_counter()
            pending.wait(600)
            waited += time.perf_counter() - before
        pending = exchange.start(vector, 1.0)
        if not args.staleness:
            before = time.perf_counter()
            pending.wait(600)
            waited += time.perf_counter() - before
            pending = None
    if pending is not None:
        pending.wait(600)
    gate.wait()
    out[transport.rank] = (
        alone,
        waited / (args.rounds - 1),
        (time.perf_counter() - begin),
        time.process_time() - cpu,
    )
    exchange.close()


def rounds(args) -> tuple[float, float, float, float]:
    """Make the rounds of all clients, each a thread; return the means of what `client` measures."""
    from fedspeed.routing.transports.local import LocalTransport

    out = {}
    gate = threading.Barrier(args.clients)
    threads = [
        threading.Thread(target=client, args=(t, args, gate, out))
        for t in LocalTransport.set_of(args.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, waited, whole, cpu = (float(np.mean([o[i] for o in out.values()])) for i in range(4))
    return alone, waited, whole, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("clients", 3), ("mb", 40), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compute-s", type=float, default=3.0)
    parser.add_argument("--mode", default="mix+mask", choices=("plain", "mask", "mix", "mix+mask"))
    parser.set_defaults(cell_kib=4096, profile=False, staleness=1)  # for exchange_of and client
    args = parser.parse_args()
    alone, waited, whole, cpu = rounds(args)
    hidden = 1 - waited / alone
    print(
        f"{args.mode}, {args.clients} x {args.mb} MB: an exchange takes {alone:.2f} s by itself; beside "
        f"{args.compute_s:.1f} s of timed compute a round "
        f"waits {waited:.3f} s for it: {hidden:.1%} hidden; {cpu / args.rounds / args.clients:.2f} CPU-s a "
        "client and exchange"
    )
    print(
        json.dumps({
            "mode": args.mode,
            "clients": args.clients,
            "mb": args.mb,
            "alone": alone,
            "waited": waited,
            "hidden": hidden,
            "whole": whole,
        })
    )


if __name__ == "__main__":
    main()
