"""Facts about machines: names of GPUs, values that a probe overrides, the type that all GPUs support."""

import json

import pytest

from fedspeed.cluster.hostfile import Host
from fedspeed.errors import PlanError
from fedspeed.planner.cards import CARDS, card_of
from fedspeed.planner.hardware import (
    GIB,
    RAM_RESERVED,
    common_type,
    measured_device,
    node_of,
    published_device,
)
from fedspeed.planner.probe_file import checked_probe

PROBE = {
    "format": 1,
    "host": "alpha",
    "device": {
        "name": "NVIDIA GeForce RTX 3090",
        "kind": "gpu",
        "count": 2,
        "flops": {"bf16": 60e12, "fp16": 61e12},
        "free_bytes": 20 * GIB,
        "memory_bytes_s": 8e11,
        "host_bytes_s": 25e9,
    },
    "ram": {"free_bytes": 100 * GIB, "bytes_s": 30e9},
    "disk": {"free_bytes": 900 * GIB, "bytes_s": 6e9},
    "link": {"loopback_bytes_s": 4e9},
}


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("RTX-3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("rtx_2080_ti", "rtx2080ti"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA RTX A6000", "a6000"),
        ("Tesla V100-PCIE-32GB", "v100"),
        ("H200", "h200"),
    ],
)
def test_a_card_by_any_name(name, card):
    assert card_of(name) is CARDS[card]


def test_cards_nobody_published():
    assert card_of("Voodoo2") is None
    with pytest.raises(
        PlanError, match="host h: nothing is published here about gpu=Voodoo2 .*fedspeed probe"
    ):
        node_of(Host("h", 1, gpu="Voodoo2"))
    with pytest.raises(PlanError, match="host h: neither its card nor a measurement.*gpu="):
        node_of(Host("h", 1))


def test_the_hostfile_outweighs_what_is_published():
    stated = node_of(Host("h", 2, gpu="RTX-3090", gpu_mem_gib=12, ram_gib=40, link_gbps=100))
    plain = node_of(Host("h", 2, gpu="RTX-3090"))
    assert stated.device.memory == plain.device.memory // 2 < 12 * GIB
    assert stated.ram == 40 * GIB - RAM_RESERVED
    assert stated.link_rate == pytest.approx(10 * plain.link_rate)
    assert stated.assumed == () and plain.assumed == ("64 GiB RAM", "10 Gbit/s to other hosts")
    assert plain.nvme == 0 and node_of(Host("h", 2, gpu="RTX-3090", nvme="/n")).nvme > 0


def test_a_probe_outweighs_what_is_published():
    for host in (
        Host("alpha", 2),
        Host("alpha.example.org", 2, gpu="RTX-2080-Ti"),
        Host("beta", 2, gpu="RTX-3090"),
        Host("gamma", 1),
    ):
        node = node_of(host, [PROBE])
        assert node.device.source == "measured" and node.device.memory == 20 * GIB and node.ram == 100 * GIB
        assert node.device.flops["bf16"] == pytest.approx(36e12)
    other = node_of(Host("delta", 2, gpu="RTX-2080-Ti"), [PROBE])
    assert other.device.source == "published"
    assert node_of(Host("beta", 2, gpu="RTX-3090", gpu_mem_gib=10), [PROBE]).device.memory < 10 * GIB
    assert (
        node_of(Host("alpha", 2), [PROBE]).nvme == 900 * GIB
        and node_of(Host("beta", 2, gpu="RTX-3090"), [PROBE]).nvme == 0
    )


def test_what_probes_tell_since_their_second_version():
    """Files of the first version can be read; missing rates follow from published ratios."""
    rates = {**PROBE["device"]["flops"], "fp32": 20e12}
    first = {**PROBE, "device": {**PROBE["device"], "flops": rates}}
    second = {
        **first,
        "device": {
            **first["device"],
            "flops": {**rates, "fp16_accumulation": 100e12, "tf32": 30e12},
            "down_bytes_s": 22e9,
            "both_bytes_s": 18e9,
            "launch_forward_s": 7e-4,
            "launch_backward_s": 1.1e-3,
        },
    }
    old, new = (
        node_of(Host("alpha", 1), [checked_probe(probe, "p.json")]).device for probe in (first, second)
    )
    assert (old.down_rate, old.both_rate, old.launch_s) == (0.0, 0.0, None)
    assert (new.down_rate, new.both_rate, new.launch_s) == (22e9, 18e9, (7e-4, 1.1e-3))
    assert (new.fp16_accumulation, new.tf32) == (
        pytest.approx(60e12),
        pytest.approx(18e12),
    ) and new.flops == old.flops
    assert old.fp16_accumulation == pytest.approx(2 * old.flops["fp16"]) and old.tf32 == pytest.approx(
        0.6 * rates["fp32"]  # published as fast as fp32, and a block reaches as little of it as in 16 bits
    )
    unknown = {**first, "device": {**first["device"], "name": "Voodoo2"}}
    assert (
        node_of(Host("alpha", 1), [unknown]).device.fp16_accumulation,
        node_of(Host("alpha", 1), [unknown]).device.tf32,
    ) == (0.0, 0.0)
    assert common_type([new], "auto") == "bf16"  # what only engine.matmul brings is no numeric type


def test_a_file_that_is_no_probe():
    assert checked_probe(PROBE, "p.json") is PROBE
    for broken, message in (
        ([], "p.json: holds 0 of the 5 parts"),
        ({**PROBE, "ram": {"free_bytes": 1}}, "p.json: lacks ram.bytes_s"),
        ({**PROBE, "host": None}, "p.json: lacks host"),
    ):
        with pytest.raises(PlanError, match=message):
            checked_probe(broken, "p.json")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("device", "flops", {}),
        ("device", "flops", {"fp8": 1.0}),
        ("device", "flops", {"fp32": "fast"}),
        ("device", "flops", {"fp32": 0}),
        ("device", "flops", {"fp32": -1}),
        ("device", "kind", "tpu"),
        ("device", "free_bytes", "12"),
        ("device", "down_bytes_s", 0),
        ("device", "launch_forward_s", "fast"),
        ("ram", "bytes_s", 0),
        ("disk", "bytes_s", float("nan")),
    ],
)
def test_numbers_of_a_probe_that_cannot_be(part, name, value):
    facts = json.loads(json.dumps(PROBE))
    facts[part][name] = value
    with pytest.raises(PlanError, match=rf"here.json: {part}.*write it with `fedspeed probe"):
        checked_probe(facts, "here.json")


def test_a_mixed_run_takes_fp16():
    old = published_device(CARDS["rtx2080ti"])
    new = published_device(CARDS["rtx3090"])
    assert common_type([new], "auto") == "bf16" and common_type([new, old], "auto") == "fp16"
    assert common_type([new, old], "fp32") == "fp32"
    with pytest.raises(
        PlanError, match=r"model.dtype=bf16: 1 of the cards \(rtx2080ti\).*set model.dtype=fp16"
    ):
        common_type([new, old], "bf16")


@pytest.mark.parametrize("name", CARDS)
def test_sums_in_fp16_are_twice_as_fast_on_geforce_cards_only(name):
    card = CARDS[name]
    device = published_device(CARDS[name])
    assert device.fp16_accumulation == pytest.approx(
        (2 if name.startswith("rtx") else 1) * device.flops["fp16"], rel=1e-3
    )
    # Ampere introduced both.
    assert (device.tf32 > 0) is card.bf16 and device.tf32 <= device.flops["fp16"] / 2 * 1.01


def test_rates_are_those_of_the_reference():
    """The rates are 32 and 24 TFLOP/s in training (docs/planner.md)."""
    assert published_device(CARDS["rtx3090"]).flops["bf16"] == pytest.approx(32e12, rel=0.01)
    assert published_device(CARDS["rtx2080ti"]).flops["fp16"] == pytest.approx(24e12, rel=0.02)


def test_what_a_block_reaches_counts_and_an_older_probe_goes_on_working():
    device = {
        "name": "cpu",
        "kind": "cpu",
        "flops": {"fp32": 100e9, "bf16": 400e9},
        "free_bytes": 0,
        "memory_bytes_s": 1e10,
        "host_bytes_s": 1e10,
    }
    facts = {
        "host": "vm",
        "device": device,
        "ram": {"free_bytes": 1, "bytes_s": 1e10},
        "disk": {"free_bytes": 1, "bytes_s": 1e9},
        "link": {"loopback_bytes_s": 1e9},
    }
    assert measured_device(checked_probe(facts, "old.json")).flops == {"fp32": 80e9, "bf16": 240e9}
    facts["device"] = device | {"block_flops": {"bf16": 100e9}}
    assert measured_device(checked_probe(facts, "new.json")).flops == {"fp32": 80e9, "bf16": 100e9}
    for wrong in ({"bf16": 0.0}, {"int8": 1e9}, []):
        facts["device"] = device | {"block_flops": wrong}
        with pytest.raises(
            PlanError, match="bad.json: device.block_flops.* write it with `fedspeed probe --out FILE`"
        ):
            checked_probe(facts, "bad.json")
