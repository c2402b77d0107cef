"""Published facts of NVIDIA cards, for hosts without a probe. Pure."""

import re
from dataclasses import dataclass

PCIE = {3: 12e9, 4: 24e9, 5: 48e9}  # generation -> bytes/s of 16 lanes from page-locked memory


@dataclass(frozen=True)
class Card:
    """Published facts of a card.

    Attributes:
        tflops_16: dense matrix rate [TFLOP/s] of 16-bit numbers with fp32 accumulation.
        tflops_32: dense matrix rate [TFLOP/s] of fp32 numbers without tensor cores.
        memory_gbs: memory bandwidth [GB/s].
        pcie: generation of PCI Express.
        tflops_16_sum_16: rate of fp16 with fp16 accumulation; 0 if it is the same.
        tflops_tf32: rate of TF32; 0 if the card has none.
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
# of it. Sources are NVIDIA's white papers "Turing GPU Architecture" (2080 Ti, T4), "Ampere GA102 GPU
# Architecture" (3080, 3090, A6000), "Ada GPU Architecture" (4090); "Tesla V100 GPU Architecture", "A100
# Tensor Core GPU Architecture", "H100 Tensor Core GPU Architecture", and the data sheet of the H200; SXM
# modules.
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


def normalised_name(name: str) -> str:
    """Reduce a card's name to its model: `NVIDIA GeForce RTX 3090` and `RTX-3090` both give `rtx3090`."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def card_of(name: str) -> Card | None:
    """Return the published facts of a card by any of its names, or None if there are none."""
    matches = [key for key in CARDS if key in normalised_name(name)]
    return CARDS[max(matches, key=len)] if matches else None
