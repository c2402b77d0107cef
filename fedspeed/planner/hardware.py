"""What the machines can do: measured by `fedspeed probe`, else published facts of the card that the hostfile
names.

Rates are per second, of one device or one node. `flops` is what training gets out of a device, not its peak.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedspeed.cluster.hostfile import Host
from fedspeed.errors import PlanError
from fedspeed.models.numeric_types import DeviceTypes, lowest_common

GIB = 2**30
# Of the dense matrix peak; 32 TFLOP/s on a 3090 and 24 on a 2080 Ti, which LoRA fine-tuning with fp32
# accumulation reaches.
PEAK_SHARE = 0.45
# Of what a large matrix product alone reaches, which is what the probe measures: a step also has norms,
# attention and small products, which weigh more where matrix products are fast (benchmarks/plan_accuracy.py).
MEASURED_SHARE = {"fp32": 0.8, "bf16": 0.6, "fp16": 0.6}
LINK_SHARE = 0.88  # what a stream of TCP gets of the nominal bandwidth
# of the nominal size; the driver leaves 0.97, the rest is kept for what the memory model does not know
GPU_MEMORY_SHARE = 0.93
RAM_RESERVED = 3 * GIB  # for the operating system, of a stated size
RAM_ASSUMED = 64.0  # GiB, where the hostfile does not say
NVME_ASSUMED = 500.0  # GiB free in a stated folder
LINK_ASSUMED = 10.0  # Gbit/s
RAM_RATE = 20e9  # copying within RAM, dual-channel DDR4; a device reads twice as fast
DISK_RATE = 3e9  # reading, PCIe 3.0 NVMe
LOOPBACK_RATE = 2e9
# Of a device; files of earlier versions do not have them.
MEASURED_LATER = ("down_bytes_s", "both_bytes_s", "launch_forward_s", "launch_backward_s")
PCIE = {3: 12e9, 4: 24e9, 5: 48e9}  # 16 lanes, pinned memory


@dataclass(frozen=True)
class Card:
    """Published facts of a card.

    Attributes:
        tflops_16, tflops_32: dense matrix rates [TFLOP/s], of 16-bit numbers with fp32 accumulation, and of
            fp32 without tensor cores.
        memory_gbs: memory bandwidth [GB/s]. pcie: its generation.
        tflops_16_sum_16: of fp16 with fp16 accumulation, 0 where it is the same. tflops_tf32: 0 where there
            is none.
    """

    name: str
    memory_gib: float
    tflops_16: float
    tflops_32: float
    memory_gbs: float
    pcie: int
    bf16: bool = True
    tflops_16_sum_16: float = 0.0
    tflops_tf32: float = 0.0


# Dense rates at boost clock. GeForce cards reach half their fp16 rate with fp32 accumulation, the others all
# of it. From NVIDIA's papers: "Turing GPU Architecture" (2080 Ti, T4), "Ampere GA102 GPU Architecture" (3080,
# 3090, A6000), "Ada GPU Architecture" (4090); "Tesla V100 GPU Architecture", "A100 Tensor Core GPU
# Architecture", "H100 Tensor Core GPU Architecture", and the H200's data sheet, the SXM modules.
CARDS = {
    card.name: card
    for card in (
        Card(
            "rtx2080ti", 11, 53.8, tflops_32=13.4, memory_gbs=616, pcie=3, bf16=False, tflops_16_sum_16=107.6
        ),
        Card(
            "rtx3080",
            10,
            59.5,
            tflops_32=29.8,
            memory_gbs=760,
            pcie=4,
            tflops_16_sum_16=119.0,
            tflops_tf32=29.8,
        ),
        Card(
            "rtx3090",
            24,
            71.0,
            tflops_32=35.6,
            memory_gbs=936,
            pcie=4,
            tflops_16_sum_16=142.0,
            tflops_tf32=35.6,
        ),
        Card(
            "rtx4090",
            24,
            165.2,
            tflops_32=82.6,
            memory_gbs=1008,
            pcie=4,
            tflops_16_sum_16=330.3,
            tflops_tf32=82.6,
        ),
        Card("a6000", 48, 154.8, tflops_32=38.7, memory_gbs=768, pcie=4, tflops_tf32=77.4),
        Card("t4", 16, 65.0, tflops_32=8.1, memory_gbs=320, pcie=3, bf16=False),
        Card("v100", 32, 125.0, tflops_32=15.7, memory_gbs=900, pcie=3, bf16=False),
        Card("a100", 40, 312.0, tflops_32=19.5, memory_gbs=1555, pcie=4, tflops_tf32=156.0),
        Card("h100", 80, 989.0, tflops_32=67.0, memory_gbs=3350, pcie=5, tflops_tf32=494.7),
        Card("h200", 141, 989.0, tflops_32=67.0, memory_gbs=4800, pcie=5, tflops_tf32=494.7),
    )
}


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        kind: gpu, or cpu: then its memory is the node's RAM, and the ranks of a node share its cores.
        memory: bytes a rank may use; 0 for cpu.
        flops: numeric type -> FLOP/s; a type it cannot compute in is missing.
        memory_rate: bandwidth of its memory, bytes/s. host_rate: copies from page-locked host memory,
            bytes/s.
        source: measured or published.
        down_rate: copies to page-locked host memory. both_rate: copies from it while as many bytes go there.
            0: as host_rate.
        launch_s: seconds that a host takes to start one micro-batch's forward and backward of one block;
            None: not measured.
        fp16_accumulation, tf32: FLOP/s of fp16 and of fp32 under engine.matmul; 0: none that is known.
    """

    name: str
    kind: str
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
    """A machine. Bytes that ranks may use and bytes/s; `local_rate` is between two ranks of the node, `nvme`
    0 where there is no folder for it.

    Attributes:
        assumed: facts nobody stated or measured, in words.
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


def kind_of(name: str) -> str:
    """`NVIDIA GeForce RTX 3090`, `RTX-3090` and `rtx3090` are one kind of card."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def card_of(name: str) -> Card | None:
    """The published facts of a card, whatever its maker calls it in full."""
    found = [key for key in CARDS if key in kind_of(name)]
    return CARDS[max(found, key=len)] if found else None


def published_device(card: Card, memory_gib: float | None = None) -> Device:
    """A card that was not measured."""
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
    """The device of a probe's file."""
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
    """Part of a large product's rate that a decoder block reaches, measured or, by an older probe,
    assumed.
    """
    block = device.get("block_flops", {})
    return block[name] / device["flops"][name] if name in block else MEASURED_SHARE[name]


def _measured_launch(device: Mapping) -> tuple[float, float] | None:
    forward = device.get("launch_forward_s")
    backward = device.get("launch_backward_s")
    return (forward, backward) if forward and backward else None


def _measured_fast(device: Mapping) -> tuple[float, float]:
    """(fp16_accumulation, tf32) of a device. What the probe does not tell is taken to be to what it tells as
    published rates are to each other.
    """
    card = card_of(device["name"])
    rates = device["flops"]
    found = []
    for name, plain, ratio in (
        ("fp16_accumulation", "fp16", card and (card.tflops_16_sum_16 or card.tflops_16) / card.tflops_16),
        ("tf32", "fp32", card and card.tflops_tf32 / card.tflops_32),
    ):
        rate = rates[name] if name in rates else rates.get(plain, 0.0) * (ratio or 0.0)
        found.append(
            min(_share(device, plain), MEASURED_SHARE["bf16"]) * rate
        )  # fast products wait more for the rest
    return found[0], found[1]


def node_of(host: Host, probes: Sequence[Mapping] = ()) -> Node:
    """What is known of a host: its probe if there is one, over it what the hostfile states, then published
    facts, then assumptions.

    A probe speaks for the host it was made on, for hosts with the same card, and for hosts of which no card
    is stated.

    Raises:
        PlanError: neither a probe nor a known card.
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
        ram = int(RAM_ASSUMED * GIB) - RAM_RESERVED
        assumed.append(f"{RAM_ASSUMED:g} GiB RAM")
    if host.nvme and not nvme:
        nvme = int(NVME_ASSUMED * GIB)
        assumed.append(f"{NVME_ASSUMED:g} GiB free in {host.nvme}")
    if not host.link_gbps:
        assumed.append(f"{LINK_ASSUMED:g} Gbit/s to other hosts")
    link = (host.link_gbps or LINK_ASSUMED) * 1e9 / 8 * LINK_SHARE
    ram_rate = probe["ram"]["bytes_s"] if probe else RAM_RATE
    loopback = probe["link"]["loopback_bytes_s"] if probe else LOOPBACK_RATE
    # GeForce cards have no direct path to each other: a byte goes up to the host and down again.
    local = device.host_rate / 2 if device.kind == "gpu" else loopback
    disk_rate = probe["disk"]["bytes_s"] if probe else DISK_RATE
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
            f"{len(CARDS)} cards: {', '.join(CARDS)}) in "
            f"the hostfile, or run `fedspeed probe --out FILE` there and pass `--probe FILE`"
        )
    card = card_of(host.gpu)
    if card is None:
        raise PlanError(
            f"host {host.name}: nothing is published here about gpu={host.gpu} (known are {len(CARDS)}: "
            f"{', '.join(CARDS)}); run `fedspeed "
            f"probe --out FILE` on it and pass `--probe FILE`"
        )
    return published_device(card, host.gpu_mem_gib)


def _probe_for(host: Host, probes: Sequence[Mapping]) -> Mapping | None:
    by_name = next(
        (probe for probe in probes if probe["host"].split(".")[0] == host.name.split(".")[0]), None
    )
    alike = next(
        (probe for probe in probes if host.gpu and kind_of(host.gpu) == kind_of(probe["device"]["name"])),
        None,
    )
    anyone = next(iter(probes), None) if not host.gpu else None
    return by_name or alike or anyone


def checked_probe(facts: object, where: str) -> Mapping:
    """Checks the content of a probe's file.

    Raises:
        PlanError: it is not one.
    """
    wanted = {
        "host": str,
        "device": ("name", "kind", "flops", "free_bytes", "memory_bytes_s", "host_bytes_s"),
        "ram": ("free_bytes", "bytes_s"),
        "disk": ("free_bytes", "bytes_s"),
        "link": ("loopback_bytes_s",),
    }
    if not isinstance(facts, dict):
        raise PlanError(
            f"{where}: holds 0 of the {len(wanted)} parts of a probe; write it with `fedspeed probe --out "
            "FILE`"
        )
    for key, inside in wanted.items():
        value = facts.get(key)
        missing = (
            [key]
            if not isinstance(value, str if inside is str else dict)
            else []
            if inside is str
            else [f"{key}.{k}" for k in inside if k not in value]
        )
        if missing:
            raise PlanError(f"{where}: lacks {', '.join(missing)}; write it with `fedspeed probe --out FILE`")
    rates = facts["device"]["flops"]
    if not isinstance(rates, dict) or not rates.keys() & {"fp32", "bf16", "fp16"}:
        raise PlanError(
            f"{where}: device.flops has no rate of fp32, bf16 or fp16; write it with `fedspeed probe --out "
            "FILE`"
        )
    optional = {f"device.{name}": facts["device"][name] for name in MEASURED_LATER if name in facts["device"]}
    blocks = facts["device"].get("block_flops", {})
    if not isinstance(blocks, dict) or not blocks.keys() <= rates.keys():
        raise PlanError(
            f"{where}: device.block_flops must have rates of types that device.flops has; write it with "
            "`fedspeed probe --out FILE`"
        )
    optional |= {f"device.block_flops.{name}": rate for name, rate in blocks.items()}
    numbers = (
        optional
        | {f"device.flops.{name}": rate for name, rate in rates.items()}
        | {
            f"{part}.{name}": facts[part][name]
            for part, names in wanted.items()
            if names is not str
            for name in names
            if name.endswith(("_bytes", "_s"))
        }
    )
    for name, value in numbers.items():
        may_be_zero = name.endswith("free_bytes")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value < 0
            or (value == 0 and not may_be_zero)
        ):
            raise PlanError(
                f"{where}: {name} is {value!r}, but must be a number above 0; write it with `fedspeed probe "
                "--out FILE`"
            )
    if not isinstance(facts["device"]["name"], str) or facts["device"]["kind"] not in ("gpu", "cpu"):
        raise PlanError(
            f"{where}: device.name must be text and device.kind gpu or cpu; write it with `fedspeed probe "
            "--out FILE`"
        )
    return facts


def common_type(devices: Sequence[Device], wanted: str) -> str:
    """What a run of these devices computes in: by the rule of model.dtype=auto, or as the user asks. A 2080
    Ti has no bf16, so a mixed run gets fp16.

    Args:
        wanted: what the user asks for, auto to choose.

    Raises:
        PlanError: a device cannot do what is asked for.
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
