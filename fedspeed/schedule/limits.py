"""Sizes and counts of the execution that the engine obeys and the planner must know."""

QUANTISED = ("int8", "nf4")  # tiers of the base that need bitsandbytes

UNIT_ALIGN = 4096  # bytes; what reading past the page cache asks of offsets, lengths and addresses
READERS = 4  # threads that read one unit from disk: one read at a time leaves an NVMe disk half idle
READ_BYTES = 8 << 20  # of one read
READ_STAGES = 2  # of a base on disk, on its way to a GPU: one is read into while the other is copied
CARRIED = (
    2  # blocks whose inputs are on a GPU where they wait on the host: those in use, and those on their way
)
LOGITS_BYTES = {
    "cpu": 1 << 26,
    "gpu": 1 << 28,
}  # of one chunk of the vocabulary's logits, in the model's type
EVAL_TOKENS = 32_768  # of one evaluation pass: bounds the activations that wait between two blocks
PIECE_TOKENS = 4_096  # of prompts that generation computes together: bounds the activations of one block
CACHE_BYTES = {"cpu": 1 << 30, "gpu": 1 << 31}  # keys and values of the rows that are generated together
