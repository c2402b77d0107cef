import pytest

from fedspeed.monitor.records import ClientRecord, RoundRecord


@pytest.fixture
def make_client():
    def make(client, **changes):
        values = {
            "client": client,
            "train_loss": 2.0 + client,
            "val_loss": 2.5 + client,
            "tokens": 100 + client,
            "local_steps": 10,
            "compute_s": 4.0,
            "gather_s": 1.0,
            "exchange_s": 0.5,
            "idle_s": 0.25,
            "bytes_sent": 1024,
            "peak_bytes": 2**30,
        }
        return ClientRecord.of(**values | changes)

    return make


@pytest.fixture
def make_round():
    def make(number, **changes):
        values = {
            "round": number,
            "train_loss": 3.0 / (number + 1),
            "val_loss": 3.2 / (number + 1),
            "tokens": 3000,
            "tokens_per_s": 300.0,
            "seconds": 10.0,
            "compute_s": 6.0,
            "gather_s": 2.0,
            "exchange_s": 1.0,
            "idle_s": 0.5,
            "bytes_sent": 4096,
            "peak_bytes": 2**31,
            "lr": 0.001,
            "factor_error": 0.01,
            "update_norm": 0.5,
            "clients": 3,
            "received": 3,
            "loaded_bytes": 0,
            "factor_error_exact": False,
            "clipped": 0,
            "missing": (),
            "per_client": (),
        }
        return RoundRecord.of(**values | changes)

    return make
