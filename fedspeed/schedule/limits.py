"""Sizes and counts of the execution that both the engine and the planner use."""

QUANTISED = ("int8", "nf4")  # tiers of the base that need bitsandbytes

UNIT_ALIGN = 4096  # bytes; direct I/O requires such offsets, lengths and addresses
READERS = 4  # threads that read one unit from disk: one read at a time leaves an NVMe disk half idle
READ_BYTES = 8 << 20  # of one read
READ_STAGES = 2  # read buffers between disk and GPU: one is filled while the other is copied
CARRIED = 2  # blocks whose inputs are on the GPU if inputs wait on the host: in use, and being copied
LOGITS_MIB = {"cpu": 64, "gpu": 256}  # of one chunk of logits, in the model's type: engine.logits_mib=auto
EVAL_TOKENS = 32_768  # of one evaluation pass: bounds the activations that wait between two blocks
PIECE_TOKENS = 4_096  # of prompts that generation computes together: bounds the activations of one block
CACHE_BYTES = {"cpu": 1 << 30, "gpu": 1 << 31}  # keys and values of the rows that are generated together


def logits_bytes(logits_mib: int | str, kind: str) -> int:
    """Return the bytes of a chunk of logits.

    Args:
        logits_mib: engine.logits_mib. kind: of the device, `cpu` or `gpu`.
    """
    return (LOGITS_MIB[kind] if logits_mib == "auto" else int(logits_mib)) << 20
