"""Peak bytes of a setting, by cause: on each GPU, in a node's RAM, on its disk. Pure.

The terms follow the tensors of the executors (engine/layer_major_executor.py, engine/stage.py, engine/base/);
docs/planner.md gives them as formulas.
"""

from dataclasses import dataclass
from functools import lru_cache

from fedspeed.models.families.base import SavedBytes
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.families.shape import BLOCK_INPUT, ModelShape
from fedspeed.planner.hardware import GIB
from fedspeed.planner.plan import SLOTTED, STREAMED, Memory, RankProfile, Setting, Task
from fedspeed.schedule.limits import CARRIED, EVAL_TOKENS, QUANTISED, READ_STAGES, UNIT_ALIGN, logits_bytes

DRIVER_BYTES = int(0.9 * GIB)  # CUDA context, cuBLAS workspaces, NCCL buffers
# RAM of a rank before it has a model: Python, libraries, driver.
PROCESS_BYTES = {"gpu": 3 * GIB, "cpu": int(0.9 * GIB)}
SCORE_BYTES = 24  # of each of attention's T x T scores with its tangent, in torch's plain kernel: six in fp32
FRAGMENTATION = 0.08  # memory that PyTorch's allocator reserves in addition, as a share of transient tensors


@dataclass(frozen=True)
class Sizes:
    """Bytes of the units of a base.

    Attributes:
        head: 0 if head and embedding are one tensor.
        other: parameters that always stay on the device, such as the final norm.
    """

    block: int
    embedding: int
    head: int
    other: int

    @property
    def embedding_and_head(self) -> int:
        """Return the bytes of embedding and head together."""
        return self.embedding + self.head


def sizes(shape: ModelShape, type_bytes: int) -> Sizes:
    """Return the bytes of a model's units as the engine packs them."""
    return Sizes(
        _aligned(shape.block * type_bytes),
        _aligned(shape.embedding * type_bytes),
        _aligned(shape.head * type_bytes),
        shape.other * type_bytes,
    )


def base_bytes(task: Task) -> int:
    """Return the bytes of the whole base."""
    unit = sizes(task.shape, task.type_bytes)
    return task.shape.layers * unit.block + unit.embedding_and_head + unit.other


def slots_of(task: Task, setting: Setting) -> int:
    """Return the number of block slots in use: at most one for each block that streams."""
    return (
        max(0, min(setting.block_slots, task.shape.layers - setting.resident_blocks))
        if setting.tier in SLOTTED
        else 0
    )


def memory_of(task: Task, setting: Setting, profile: RankProfile) -> Memory:
    """Predict the peak bytes of one rank and of its node."""
    persistent, transient = device_memory(task, setting, profile)
    device = persistent | transient
    client_slots = client_slots_of(setting, profile)
    streamed = setting.tier != "stock"
    host = _base_on_host(task, setting, profile)
    waiting = 0
    if streamed and setting.block_inputs == "host":
        micro_batches = client_slots * setting.accumulation
        waiting = pinned_input_bytes(task, setting) * (
            micro_batches * (task.shape.layers - 1) - kept_count(task, setting, micro_batches)
        )
    unit = sizes(task.shape, task.type_bytes)
    # While the base is loaded: a unit as read and as packed. It is freed before training begins.
    loading = 2 * max(unit.block, unit.embedding)
    host["block inputs" if waiting > loading else "loading"] = max(waiting, loading) * profile.ranks_here
    host["processes"] = PROCESS_BYTES[profile.node.device.kind] * profile.ranks_here
    disk = {"base": streamed_bytes(task, setting)} if setting.tier == "nvme" else {}
    if profile.node.device.kind == "cpu":
        for cause, count in device.items():
            host[cause] = host.get(cause, 0) + count * profile.ranks_here
        return Memory({}, host, disk)
    device["allocator"] = int(FRAGMENTATION * sum(transient.values()))
    device["driver"] = DRIVER_BYTES
    return Memory(device, host, disk)


def client_slots_of(setting: Setting, profile: RankProfile) -> int:
    """Return the number of clients that train at the same time."""
    return 1 if setting.tier == "stock" else min(setting.client_slots, profile.carried)


def device_memory(
    task: Task, setting: Setting, profile: RankProfile, evaluation: bool = True
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of tensors on one rank's device, by cause: (persistent, peak of the transient ones).

    Args:
        evaluation: whether the peak includes evaluation passes, or training steps only.
    """
    client_slots = client_slots_of(setting, profile)
    persistent = _base_on_device(task, setting, profile) | trainable_bytes(
        task, client_slots, client_ranks=profile.client_ranks
    )
    if task.folded_rank:  # one for all client slots
        persistent["folded adapter"] = task.shape.folded(task.targets, task.folded_rank) * task.type_bytes
    if setting.tier == "stock":
        return persistent, _stock_activations(task, setting, profile.node.device.kind)
    return persistent, _streamed_activations(
        task, setting, client_slots, profile.node.device.kind, evaluation=evaluation
    )


def input_bytes(task: Task, setting: Setting) -> int:
    """Return the bytes of one block input of one micro-batch."""
    return setting.micro_batch * task.tokens * task.shape.hidden * task.type_bytes


def kept_bytes(task: Task, setting: Setting) -> int:
    """Return the bytes of the activation budget that one pair of a block and a micro-batch takes.

    Where block inputs wait on the host, the input of such a pair stays on the device and counts too.
    """
    inputs = input_bytes(task, setting) if setting.block_inputs == "host" else 0
    return setting.micro_batch * task.tokens * saved_per_token(task) + inputs


def kept_count(task: Task, setting: Setting, micro_batches: int) -> int:
    """Return how many pairs of a block and a micro-batch the activation budget keeps in a pass with so many
    micro-batches. The last block needs none.
    """
    return min(setting.activation_bytes // kept_bytes(task, setting), micro_batches * (task.shape.layers - 1))


def streamed_bytes(task: Task, setting: Setting) -> int:
    """Return the bytes of the streamed part of the base, of which one copy is stored off the device."""
    unit = sizes(task.shape, task.type_bytes)
    return (task.shape.layers - setting.resident_blocks) * unit.block + unit.embedding_and_head


def _base_on_device(task: Task, setting: Setting, profile: RankProfile) -> dict[str, int]:
    unit = sizes(task.shape, task.type_bytes)
    shape = task.shape
    whole = base_bytes(task)
    if task.method == "full":
        return {}
    if setting.tier in QUANTISED:
        resident = setting.resident_blocks * unit.block
        quantised = (shape.layers - setting.resident_blocks) * quantised_block(task, setting.tier)
        return {
            "base": resident + quantised + unit.embedding_and_head + unit.other,
            "slots": slots_of(task, setting) * unit.block,
        }
    if setting.tier not in STREAMED:
        return {"base": whole}
    group = {"client": profile.client_ranks, "cluster": profile.cluster_ranks}.get(setting.tier)
    # One slot more is for the head, and for the embedding if it is not read in host memory; both are equally
    # large.
    found = {
        "base": setting.resident_blocks * unit.block + unit.other,
        "slots": slots_of(task, setting) * unit.block + (unit.head or unit.embedding),
    }
    if group and not task.offload:
        found["share of the base"] = -(-streamed_bytes(task, setting) // group)
    return found


def quantised_block(task: Task, tier: str) -> int:
    """Return the bytes of a block whose matrices have 8 or 4 bits a number and an fp32 scale for every 256 or
    64 of them.
    """
    matrices = task.shape.matrices
    rounded = matrices + matrices // 64 if tier == "int8" else matrices // 2 + matrices // 16
    return rounded + (task.shape.block - matrices) * task.type_bytes


def _base_on_host(task: Task, setting: Setting, profile: RankProfile) -> dict[str, int]:
    unit = sizes(task.shape, task.type_bytes)
    group = {"client": profile.client_ranks, "cluster": profile.cluster_ranks}.get(setting.tier)
    if setting.tier == "ram":
        return {"base": streamed_bytes(task, setting)}
    if setting.tier == "nvme" and profile.node.device.kind == "gpu":
        return {"read buffers": READ_STAGES * _pinned(max(unit.block, unit.embedding)) * profile.ranks_here}
    if group and task.offload:
        return {"share of the base": -(-streamed_bytes(task, setting) // group) * profile.ranks_here}
    return {}


def trainable_bytes(task: Task, client_slots: int, *, client_ranks: int) -> dict[str, int]:
    """Return the bytes of the trainable parameters of all client slots: working copies, fp32 masters and
    moments, and gradients (fp32 sums, a copy in the model's type and ZeRO's fp32 copy).
    """
    p = task.trainable
    s = task.type_bytes
    moments = {"adamw": 8, "sgd": 4}[task.optimizer]
    shards = client_ranks if task.stage >= 1 else 1
    copies = -(-p * s // (client_ranks if task.method == "full" and task.stage >= 3 else 1))
    return {
        "adapter" if task.method == "lora" else "model": client_slots * copies,
        "masters and optimizer": client_slots * -(-p * (4 + moments) // shards),
        "gradients": client_slots * (p * 4 + -(-p * 4 // shards)) + p * s,
    }


def _streamed_activations(
    task: Task, setting: Setting, client_slots: int, kind: str, *, evaluation: bool
) -> dict[str, int]:
    """Return the peak of transient bytes, by cause, of training or (if it counts) of evaluation, whichever is
    larger. Evaluation keeps EVAL_TOKENS tokens between two blocks.
    """
    shape = task.shape
    s = task.type_bytes
    batch = setting.micro_batch * task.tokens
    micro_batches = client_slots * setting.accumulation
    hidden = batch * shape.hidden * s
    kept = kept_count(task, setting, micro_batches)
    between = micro_batches * hidden  # the current output of each micro-batch, or its gradient
    if setting.block_inputs == "device":
        between += micro_batches * (shape.layers - 1) * hidden
    else:
        between += min(CARRIED, shape.layers - 1) * micro_batches * hidden
    masks = task.tokens if has_masks(task) else 0  # a byte for each pair of tokens of a row
    between += micro_batches * batch * masks
    # Head and loss are computed while the graph of the last block exists, and its gradients afterwards.
    block = batch * saved_per_token(task)
    working = batch * working_per_token(task)
    head = head_bytes(task, batch, kind)
    activations = kept * kept_bytes(task, setting)
    evaluated = max(batch, EVAL_TOKENS)
    eval_between = evaluated * (shape.hidden * s + masks)
    eval_block = batch * working_per_token(task)
    training = between + activations + block + max(working, head)
    if not evaluation or training >= eval_between + max(eval_block, head):
        found = {"between blocks": between, "one block": block, **_larger(working, head)}
        return found | ({"activations": activations} if activations else {})
    return {"between blocks (evaluation)": eval_between, **_larger(eval_block, head)}


def _larger(working: int, head: int) -> dict[str, int]:
    return {"computing one block": working} if working >= head else {"head and loss": head}


def _stock_activations(task: Task, setting: Setting, kind: str) -> dict[str, int]:
    shape = task.shape
    s = task.type_bytes
    batch = setting.micro_batch * task.tokens
    saved = saved_per_token(task) * batch
    working = working_per_token(task) * batch
    reached = shape.layers if task.differentiated_blocks is None else task.differentiated_blocks
    blocks = reached * saved
    if setting.checkpointing and reached:
        blocks = reached * shape.hidden * s * batch + saved
    copies = 2 + shape.logits_copies
    masks = batch * task.tokens if has_masks(task) else 0
    if not reached:
        return _forward_activations(task, batch, masks, kind)
    # transformers' logits of all tokens, their fp32 copy, its log-softmax, and the gradients of both.
    return {"activations": blocks + working + masks, "head and loss": batch * shape.vocab * (copies * s + 12)}


def _forward_activations(task: Task, batch: int, masks: int, kind: str) -> dict[str, int]:
    """Return the peak of transient bytes of stock forward passes: one block, or head and loss. With tangents
    they count twice, attention has all scores, and the head computes answer tokens only, some at a time.
    """
    shape = task.shape
    s = task.type_bytes
    block = (saved_per_token(task) + working_per_token(task)) * batch
    if not task.tangents:
        logits = batch * shape.vocab * (s * (1 + shape.logits_copies) + 8)  # with fp32 copy and log-softmax
        return {"one block": block + masks, "head and loss": logits}
    scores = batch * task.tokens * shape.heads * SCORE_BYTES
    return {
        "one block": 2 * block + masks,
        "attention scores": scores,
        "head and loss": 2 * head_bytes(task, batch, kind),
    }


def head_bytes(task: Task, batch: int, kind: str) -> int:
    """Return the bytes of head and loss: the final norm of all tokens, the head's input and its gradient, and
    a chunk of logits of answer tokens with its gradient and two fp32 copies.
    """
    shape = task.shape
    s = task.type_bytes
    chunk = logits_bytes(task.logits_mib, kind)
    rows = max(1, min(int(task.answer_share * batch), chunk // (shape.vocab * s)))
    copies = 2 + shape.logits_copies
    return batch * shape.hidden * (8 + 5 * s) + rows * shape.vocab * (copies * s + 8)


def pinned_input_bytes(task: Task, setting: Setting) -> int:
    """Return the bytes of page-locked host memory for one block input of one micro-batch."""
    return _pinned(input_bytes(task, setting))


@lru_cache(maxsize=1024)
def saved_per_token(task: Task) -> int:
    """Return the bytes per token that autograd saves for one block. Frozen matrices need no saved input.

    A matrix with an adapter saves its input for the gradient of A, once for all matrices with the same input.
    With dropout, every matrix saves an input of its own and the mask.
    """
    shape = task.shape
    s = task.type_bytes
    h = shape.hidden
    i = shape.intermediate
    # Cards before Ampere, which make a run fp16, compute attention fast only with k and v repeated for every
    # head of q. transformers repeats them where it gives attention a mask.
    repeated = task.dtype == "fp16" or has_masks(task)
    saved = SavedBytes(s, shape.heads if repeated else shape.kv_heads)
    kept = FAMILIES[shape.family].saved_bytes_per_token(shape, saved)
    if has_masks(task):  # attention converts the mask to the model's type, [T, T] for each row
        kept += s * task.tokens
    if task.method == "full":
        return kept + s * (3 * h + i)
    inputs = [linear.rows_in for linear in shape.adapted(task.targets)]
    if task.dropout:
        return kept + sum(2 * s * n for n in inputs)  # CUDA keeps a mask in bytes, a CPU in the model's type
    return kept + s * sum(_distinct_inputs(shape, task.targets))


def _distinct_inputs(shape: ModelShape, targets: str | tuple[str, ...]) -> list[int]:
    """Return the widths of the adapted matrices' inputs, a shared input once, without the input of the block,
    which is counted elsewhere.
    """
    widths = {linear.reads: linear.rows_in for linear in shape.adapted(targets)}
    widths.pop(BLOCK_INPUT, None)
    return list(widths.values())


def has_masks(task: Task) -> bool:
    """Tell whether blocks are given masks, as they are where rows are longer than a sliding window."""
    return task.shape.windowed > 0 and task.tokens > task.shape.window


def working_per_token(task: Task) -> int:
    """Return the bytes per token that a block needs while it is computed or differentiated, in addition to
    what is saved: gradients of the widest tensors and fp32 norms. Experts copy their input for each expert of
    the token, and their output twice.
    """
    shape = task.shape
    s = task.type_bytes
    copies = 3 * shape.experts.per_token if shape.experts else 0
    return s * (3 * shape.intermediate + (4 + copies) * shape.hidden) + 8 * shape.hidden


def _aligned(nbytes: int) -> int:
    return -(-nbytes // UNIT_ALIGN) * UNIT_ALIGN


def _pinned(nbytes: int) -> int:
    """Round up to a power of two, as PyTorch does for page-locked memory."""
    return 1 << (nbytes - 1).bit_length()
