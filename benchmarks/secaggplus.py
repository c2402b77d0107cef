"""Measure Flower's SecAgg+ (its workflow and client modifier) on the vectors of `benchmarks/anonymous.py`.

    python -m venv FLOWER
    FLOWER/bin/pip install flwr==1.41.0
    FLOWER/bin/python benchmarks/secaggplus.py [--clients 3] [--mb 200] [--limit-gib 20]

Server and clients are called in turn in one process, without a network, and nothing is serialised except by
the workflow itself: a real deployment costs more. CPU-seconds are those inside the clients' calls (a client)
and outside of them (the server). Settings are Flower's defaults, with shares for all. --limit-gib bounds the
memory of the process: a run that does not fit ends with a MemoryError, which is reported as the result.
"""

import argparse
import copy
import json
import resource
import time

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Message, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext, ServerConfig
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity


class Proxy(ClientProxy):
    """A client's proxy that only has a number: the workflow sends messages instead of calling it."""

    def __init__(self, node_id: int):
        super().__init__(str(node_id))
        self.node_id = node_id

    def _unused(self, *args, **kwargs):
        raise AssertionError("the workflow sends messages instead")

    get_properties = _unused
    get_parameters = _unused
    fit = _unused
    evaluate = _unused
    reconnect = _unused


class Sampled(FedAvg):
    """A strategy that samples all clients in every round, and keeps the result as `total`."""

    def __init__(self, proxies):
        super().__init__()
        self._proxies = proxies

    def configure_fit(self, server_round, parameters, client_manager):
        from flwr.common import FitIns

        return [(proxy, FitIns(parameters, {})) for proxy in self._proxies]

    def aggregate_fit(self, server_round, results, failures):
        assert not failures, failures
        self.total = parameters_to_ndarrays(results[0][1].parameters)[0]
        return results[0][1].parameters, {}


class InTurn:
    """A grid that calls its nodes one after the other, and measures CPU-seconds and bytes of each."""

    def __init__(self, vectors):
        self._vectors = vectors
        self.cpu = [0.0] * len(vectors)
        self.sent = [0] * len(vectors)
        self._contexts = [context(i + 1) for i in range(len(vectors))]

    def send_and_receive(self, messages, *, timeout=None):
        return [self._answer(message) for message in messages]

    def _answer(self, message):
        # As if it had come over a network: the modifier removes its settings from the content.
        message.content = copy.deepcopy(message.content)
        i = message.metadata.dst_node_id - 1
        begin = time.process_time()

        def train(message, _):
            # 1000 is the largest weight that SecAgg+ takes; smaller ones lose precision.
            fitted = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self._vectors[i]]), 1000, {})
            return Message(compat.fitres_to_recorddict(fitted, keep_input=False), reply_to=message)

        answer = secaggplus_mod(message, self._contexts[i], train)
        self.cpu[i] += time.process_time() - begin
        self.sent[i] += sum(
            size_of(value) for record in answer.content.config_records.values() for value in record.values()
        )
        return answer


def size_of(value) -> int:
    """Return the bytes of a value of a message."""
    if isinstance(value, list):
        return sum(map(size_of, value))
    return len(value) if isinstance(value, bytes | str) else 8


def context(node_id: int) -> Context:
    """Return the context of a node: 0 is the server."""
    return Context(run_id=1, node_id=node_id, node_config={}, state=RecordDict(), run_config={}, series_id=1)


def main() -> None:
    """Run one round of SecAgg+, and print its measurements as a line and as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("clients", 3), ("mb", 200), ("limit-gib", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (args.limit_gib << 30, args.limit_gib << 30))
    # Values that Flower gives a server process.
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 0
    TaskIdentity.task_id = 0
    length = args.mb * 10**6 // 4
    vectors = [
        np.random.default_rng(i).standard_normal(length, dtype=np.float32) * np.float32(1e-3)
        for i in range(args.clients)
    ]
    grid = InTurn(vectors)
    strategy = Sampled([Proxy(i + 1) for i in range(args.clients)])
    server = LegacyContext(context(0), config=ServerConfig(num_rounds=1), strategy=strategy)
    server.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    server.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        ndarrays_to_parameters([np.zeros(length, np.float32)]), keep_input=False
    )
    begin = time.perf_counter()
    cpu = time.process_time()
    try:
        SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.67)(grid, server)
    except MemoryError:
        print(
            f"SecAgg+   {args.clients} x {args.mb} MB does not fit in {args.limit_gib} GiB (after "
            f"{time.perf_counter() - begin:.0f} s)"
        )
        return
    cpu = time.process_time() - cpu
    seconds = time.perf_counter() - begin
    client = sum(grid.cpu) / args.clients
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    exact = np.mean(vectors, axis=0, dtype=np.float64)
    error = float(np.abs(strategy.total - exact).max())
    measured = {
        "clients": args.clients,
        "mb": args.mb,
        "seconds": seconds,
        "client_cpu": client,
        "server_cpu": cpu - sum(grid.cpu),
        "sent": grid.sent[0],
        "largest_error": error,
        "largest_mean": float(np.abs(exact).max()),
        "max_rss_gib": largest,
    }
    print(
        f"SecAgg+   {seconds:8.2f} s   {client:7.3f} CPU-s a client, {cpu - sum(grid.cpu):.2f} of the "
        f"server   {args.mb / 1000 / client:6.3f} GB/CPU-s   "
        f"sent {grid.sent[0] / 1e6:8.1f} MB a client   largest error {error:.1e} of means up to "
        f"{measured['largest_mean']:.1e}   {largest:.1f} GiB"
    )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
