"""Rules about LoRA ranks that differ between clients."""

from collections.abc import Iterator

from fedspeed.config.rules.conflict import Conflict, chosen_method
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.federation.methods.config import METHODS

KEY = "adapter.rank_by_client"


def check_client_ranks(config: RunConfig) -> Iterator[Conflict]:
    adapter = config.adapter
    if not adapter.rank_by_client:
        return
    setting = f"{KEY}={flow(adapter.rank_by_client)}"
    if not METHODS[config.federation.method.name].unequal_ranks:
        able = " or ".join(name for name, entry in METHODS.items() if entry.unequal_ranks)
        yield Conflict(
            (KEY, "federation.method"),
            f"{setting}: {chosen_method(config)} needs LoRA factors of one shape on all clients; "
            f"set federation.method={able}, or leave {KEY} out",
        )
    if adapter.method != "lora":
        yield Conflict(
            (KEY, "adapter.method"),
            f"{setting} gives LoRA ranks, but adapter.method={adapter.method} trains no LoRA; set "
            f"adapter.method=lora, or leave {KEY} out",
        )
    if adapter.start_from:
        yield Conflict(
            (KEY, "adapter.start_from"),
            f"{setting}: the adapter in adapter.start_from={adapter.start_from} has one rank, and its "
            "directions are in no order of importance that a smaller client could train the first of; leave "
            "one of the two out",
        )
    if config.engine.pipeline == "cluster":
        yield Conflict(
            (KEY, "engine.pipeline"),
            f"{setting}: with engine.pipeline=cluster every rank computes with the adapters of all clients "
            f"at the same time, which must be alike; set engine.pipeline=client or none, or leave {KEY} out",
        )
    if adapter.rank_by_client == "auto":
        return
    clients = config.data.clients
    for client, lora_rank in adapter.rank_by_client.items():
        is_number = client.isascii() and client.isdigit() and str(int(client)) == client
        if not is_number or int(client) >= clients:
            yield Conflict(
                (KEY, "data.clients"),
                f"{setting} names client {client}, but data.clients={clients} has clients 0 to "
                f"{clients - 1}; write their numbers",
            )
        if lora_rank > adapter.lora_rank:
            yield Conflict(
                (KEY, "adapter.lora_rank"),
                f"{KEY}.{client}={lora_rank} is above adapter.lora_rank={adapter.lora_rank}, the largest of "
                f"all; set adapter.lora_rank={lora_rank}, or a smaller rank for client {client}",
            )
