"""Memory and speed of the machines: measured by `fedspeed probe`, or else published facts of the card that
the hostfile names. Pure.

Rates are per second, of one device or one node. `flops` is the rate that training reaches, not the peak.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedspeed.cluster.hostfile import Host
from fedspeed.errors import PlanError
from fedspeed.models.numeric_types import DeviceTypes, lowest_common
from fedspeed.planner.cards import CARDS, PCIE, Card, card_of, normalised_name

GIB = 2**30
# Share of a card's dense matrix peak that LoRA fine-tuning with fp32 accumulation reaches: 32 TFLOP/s on a
# 3090 and 24 on a 2080 Ti.
PEAK_SHARE = 0.45
# Share of the rate of a large matrix product, which the probe measures, that a step reaches. A step also has
# norms, attention and small products, which take a larger share of the time where matrix products are fast
# (benchmarks/plan_accuracy.py).
MEASURED_SHARE = {"fp32": 0.8, "bf16": 0.6, "fp16": 0.6}
LINK_SHARE = 0.88  # of the nominal bandwidth, reached by a TCP stream
# Share of a card's nominal memory that a rank may use. The driver leaves 0.97; the rest is a margin for the
# memory model.
GPU_MEMORY_SHARE = 0.93
RAM_RESERVED = 3 * GIB  # of the RAM that the hostfile states, for the operating system
# Assumed where neither the hostfile nor a probe says otherwise.
DEFAULT_RAM_GIB = 64.0
DEFAULT_NVME_GIB = 500.0  # free in a stated folder
DEFAULT_LINK_GBPS = 10.0  # Gbit/s
DEFAULT_RAM_RATE = 20e9  # copying within RAM, dual-channel DDR4; a device reads twice as fast
DEFAULT_DISK_RATE = 3e9  # reading, PCIe 3.0 NVMe
DEFAULT_LOOPBACK_RATE = 2e9


@dataclass(frozen=True)
class Device:
    """The device that a rank computes on.

    Attributes:
        kind: gpu or cpu. The memory of a cpu is the node's RAM, and the ranks of a node share its cores.
        memory: bytes that a rank may use; 0 for a cpu.
        flops: numeric type -> FLOP/s; a type that the device cannot compute in is missing.
        memory_rate: bandwidth of its memory [bytes/s].
        host_rate: copies from page-locked host memory [bytes/s].
        source: measured or published.
        down_rate: copies to page-locked host memory [bytes/s]; 0: as host_rate.
        both_rate: copies from page-locked host memory while as many bytes go there [bytes/s]; 0: as
            host_rate.
        launch_s: seconds that a host takes to launch one micro-batch's forward and backward of one block;
            None: not measured.
        fp16_accumulation: FLOP/s of fp16 with engine.matmul=fp16_accumulation; 0: unknown.
        tf32: FLOP/s of fp32 with engine.matmul=tf32; 0: unknown, or the device has no TF32.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    memory: int
    flops: Mapping[str, float]
    memory_rate: float
    host_rate: float
    source: str
    down_rate: float = 0.0
    both_rate: float = 0.0
    launch_s: tuple[float, float] | None = None
    fp16_accumulation: float = 0.0
    tf32: float = 0.0


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
        ram: bytes that its ranks may use.
        ram_rate: copies within RAM [bytes/s].
        nvme: bytes on its disk that its ranks may use; 0 if no folder is named.
        disk_rate: reading from it [bytes/s].
        link_rate: to other hosts [bytes/s].
        local_rate: between two of its ranks [bytes/s].
        assumed: descriptions of facts that were neither stated nor measured.
    """

    name: str
    device: Device
    ram: int
    ram_rate: float
    nvme: int
    disk_rate: float
    link_rate: float
    local_rate: float
    assumed: tuple[str, ...] = ()


def published_device(card: Card, memory_gib: float | None = None) -> Device:
    """Return a device with the published facts of a card.

    Args:
        memory_gib: nominal memory, where it differs from the published one.
    """
    flops = {"fp16": PEAK_SHARE * card.tflops_16 * 1e12, "fp32": PEAK_SHARE * card.tflops_32 * 1e12}
    if card.bf16:
        flops["bf16"] = flops["fp16"]
    memory = int((memory_gib or card.memory_gib) * GIB * GPU_MEMORY_SHARE)
    return Device(
        card.name,
        "gpu",
        memory,
        flops,
        card.memory_gbs * 1e9,
        host_rate=PCIE[card.pcie],
        source="published",
        fp16_accumulation=PEAK_SHARE * (card.tflops_16_sum_16 or card.tflops_16) * 1e12,
        tf32=PEAK_SHARE * card.tflops_tf32 * 1e12,
    )


def measured_device(facts: Mapping) -> Device:
    """Return the device of a probe's file."""
    device = facts["device"]
    flops = {
        name: _share(device, name) * rate for name, rate in device["flops"].items() if name in MEASURED_SHARE
    }
    memory = device["free_bytes"] if device["kind"] == "gpu" else 0
    fp16_accumulation, tf32 = _measured_fast(device)
    return Device(
        device["name"],
        device["kind"],
        memory,
        flops,
        device["memory_bytes_s"],
        host_rate=device["host_bytes_s"],
        source="measured",
        down_rate=device.get("down_bytes_s", 0.0),
        both_rate=device.get("both_bytes_s", 0.0),
        launch_s=_measured_launch(device),
        fp16_accumulation=fp16_accumulation,
        tf32=tf32,
    )


def _share(device: Mapping, name: str) -> float:
    """Return the share of a large product's rate that a decoder block reaches: measured, or assumed for the
    file of an earlier version.
    """
    block_rates = device.get("block_flops", {})
    return block_rates[name] / device["flops"][name] if name in block_rates else MEASURED_SHARE[name]


def _measured_launch(device: Mapping) -> tuple[float, float] | None:
    forward = device.get("launch_forward_s")
    backward = device.get("launch_backward_s")
    return (forward, backward) if forward and backward else None


def _measured_fast(device: Mapping) -> tuple[float, float]:
    """Return the FLOP/s of a probed device under (fp16_accumulation, tf32).

    A rate that the probe has not measured is estimated from the ratio of the card's published rates.
    """
    card = card_of(device["name"])
    fp16_ratio = (card.tflops_16_sum_16 or card.tflops_16) / card.tflops_16 if card else 0.0
    tf32_ratio = card.tflops_tf32 / card.tflops_32 if card else 0.0

    def reached(name: str, plain: str, ratio: float) -> float:
        rates = device["flops"]
        rate = rates[name] if name in rates else rates.get(plain, 0.0) * ratio
        # The faster the products, the larger the share of time that everything else takes.
        return min(_share(device, plain), MEASURED_SHARE["bf16"]) * rate

    return reached("fp16_accumulation", "fp16", fp16_ratio), reached("tf32", "fp32", tf32_ratio)


def node_of(host: Host, probes: Sequence[Mapping] = ()) -> Node:
    """Return the facts of a host: those in the hostfile first, then those of a probe, then published ones,
    then assumptions.

    A probe applies to the host that it was made on, to hosts with the same card, and to hosts whose card the
    hostfile does not state.

    Raises:
        PlanError: there is neither a probe nor a known card.
    """
    probe = _probe_for(host, probes)
    assumed = []
    device = _device(host, probe)
    if probe:
        ram = probe["ram"]["free_bytes"]
        nvme = probe["disk"]["free_bytes"] if host.nvme or probe["host"] == host.name else 0
    else:
        ram = 0
        nvme = 0
    if host.ram_gib:
        ram = int(host.ram_gib * GIB) - RAM_RESERVED
    elif not probe:
        ram = int(DEFAULT_RAM_GIB * GIB) - RAM_RESERVED
        assumed.append(f"{DEFAULT_RAM_GIB:g} GiB RAM")
    if host.nvme and not nvme:
        nvme = int(DEFAULT_NVME_GIB * GIB)
        assumed.append(f"{DEFAULT_NVME_GIB:g} GiB free in {host.nvme}")
    if not host.link_gbps:
        assumed.append(f"{DEFAULT_LINK_GBPS:g} Gbit/s to other hosts")
    link = (host.link_gbps or DEFAULT_LINK_GBPS) * 1e9 / 8 * LINK_SHARE
    ram_rate = probe["ram"]["bytes_s"] if probe else DEFAULT_RAM_RATE
    loopback = probe["link"]["loopback_bytes_s"] if probe else DEFAULT_LOOPBACK_RATE
    # GeForce cards cannot copy to each other directly: a byte goes to the host and back.
    local = device.host_rate / 2 if device.kind == "gpu" else loopback
    disk_rate = probe["disk"]["bytes_s"] if probe else DEFAULT_DISK_RATE
    return Node(
        host.name,
        device,
        ram,
        ram_rate=ram_rate,
        nvme=nvme,
        disk_rate=disk_rate,
        link_rate=link,
        local_rate=local,
        assumed=tuple(assumed),
    )


def _device(host: Host, probe: Mapping | None) -> Device:
    if probe:
        device = measured_device(probe)
        if host.gpu_mem_gib and device.kind == "gpu":
            device = replace(
                device, memory=min(device.memory, int(host.gpu_mem_gib * GIB * GPU_MEMORY_SHARE))
            )
        return device
    if not host.gpu:
        raise PlanError(
            f"host {host.name}: neither its card nor a measurement is known; state gpu= (one of "
            f"{len(CARDS)} cards: {', '.join(CARDS)}) in the hostfile, or run `fedspeed probe --out FILE` "
            "there and pass `--probe FILE`"
        )
    card = card_of(host.gpu)
    if card is None:
        raise PlanError(
            f"host {host.name}: nothing is published here about gpu={host.gpu} (known are {len(CARDS)}: "
            f"{', '.join(CARDS)}); run `fedspeed probe --out FILE` on it and pass `--probe FILE`"
        )
    return published_device(card, host.gpu_mem_gib)


def _probe_for(host: Host, probes: Sequence[Mapping]) -> Mapping | None:
    name = host.name.split(".")[0]
    for probe in probes:
        if probe["host"].split(".")[0] == name:
            return probe
    if not host.gpu:
        return probes[0] if probes else None
    card = normalised_name(host.gpu)
    return next((probe for probe in probes if normalised_name(probe["device"]["name"]) == card), None)


def common_type(devices: Sequence[Device], wanted: str) -> str:
    """Return the numeric type that a run on these devices computes in.

    Args:
        wanted: the type that the user asks for, or auto for the rule of model.dtype=auto. Under auto a run
            that includes a 2080 Ti, which has no bf16, gets fp16.

    Raises:
        PlanError: a device cannot compute in the wanted type.
    """
    best = lowest_common([
        DeviceTypes(device.name, device.kind, frozenset(device.flops)) for device in devices
    ])
    chosen = best if wanted == "auto" else wanted
    if without := sorted({device.name for device in devices if chosen not in device.flops}):
        raise PlanError(
            f"model.dtype={chosen}: {len(without)} of the cards ({', '.join(without)}) cannot compute in "
            f"it; set model.dtype={best}"
        )
    return chosen
