"""Seconds of one local step of every baseline, by cause, for one rank. Pure.

The arithmetic is that of the planner (`planner.timing`): 2 operations for each weight and token of a forward
pass, 2 more for the gradients of activations, attention's scores, the reading of weights, the launches of
kernels. What it lacks of the baselines is here, each as one function. Where a published system is not known
to reach a bound, the bound counts, so that a baseline is never slower here than it has to be.
"""

from dataclasses import replace

from fedspeed.planner.many_clients import MESSAGE_S
from fedspeed.planner.memory import sizes
from fedspeed.planner.plan import RankProfile, Setting, Task
from fedspeed.planner.timing import OPTIMIZER_START, block_times_of, copy_rate, seconds_of

Causes = dict[str, float]
ARITHMETIC = ("forward", "again", "gradients", "head")
# A forward pass with tangents: values and their tangents, 2 operations a weight each. By count of operations;
# the attention with all scores that forward derivatives need is slower than the fused one assumed here.
TANGENT_PASSES = 2
MESSAGES_OF_SPLIT = 4  # of a micro-batch: hidden states, the body's output, and the gradients of both


def stock_setting(micro_batch: int, accumulation: int, *, checkpointing: bool) -> Setting:
    """Return the execution of transformers and PEFT: a whole model, one micro-batch after the other."""
    return Setting("stock", micro_batch, accumulation, checkpointing=checkpointing)


def resident(task: Task, setting: Setting, rank: RankProfile) -> Causes:
    """Return a step with the base on the device (`fs_llm`, `fedavg_lora`): that of the planner."""
    return dict(seconds_of(task, setting, rank).causes)


def optimizer_on_host(task: Task, setting: Setting, rank: RankProfile) -> Causes:
    """Return a step whose masters and moments are in host memory (`fate_llm`: ZeRO-2 with offload).

    The optimizer reads and writes 40 bytes a parameter there, after the gradients (fp32) came and before the
    new values (16 bit) go: 40 P / RAM + 6 P / PCIe, once for each client of the rank.
    """
    node = rank.node
    copies = 6 * task.trainable / copy_rate(node.device.host_rate, rank)
    seconds = OPTIMIZER_START + 40 * task.trainable / node.ram_rate + copies
    return resident(task, setting, rank) | {"optimizer": rank.carried * seconds}


def offloaded(task: Task, setting: Setting, rank: RankProfile) -> Causes:
    """Return a step of stock ZeRO-3 with parameters and optimizer in host memory (`zero3_offload`,
    `fs_llm_offload`).

    Every micro-batch gathers each block twice, for its forward and its backward pass, and embedding and head
    once; nothing is shared among micro-batches. Three bounds favour the baseline: a rank reads at the whole
    rate of its PCIe, though its ranks hold halves that they would have to exchange; a load starts at no cost;
    and loads and arithmetic overlap completely, so that a step waits max(0, loads - arithmetic).
    """
    unit = sizes(task.shape, task.type_bytes)
    nbytes = 2 * task.shape.layers * unit.block + unit.embedding_and_head
    loads = nbytes / copy_rate(rank.node.device.host_rate, rank)
    causes = optimizer_on_host(task, setting, rank)
    arithmetic = sum(causes[cause] for cause in ARITHMETIC)
    waited = max(0.0, rank.carried * setting.accumulation * loads - arithmetic)
    return causes | {"waiting for loads": waited}


def forward_mode(task: Task, setting: Setting, rank: RankProfile, directions: int) -> Causes:
    """Return a step of forward gradients (`spry`): for each direction one forward pass with tangents,
    TANGENT_PASSES times the operations of a forward pass; head and loss of answer tokens only. Nothing is
    computed again or differentiated backwards.
    """
    causes = resident(task, setting, rank)
    passes = directions * TANGENT_PASSES
    # The planner's head has two forward passes' operations: values and gradients of all tokens.
    head = causes["head"] * task.answer_share * directions
    return causes | {"forward": passes * causes["forward"], "again": 0.0, "gradients": 0.0, "head": head}


def emulator(task: Task, setting: Setting, rank: RankProfile) -> Causes:
    """Return a step of a FedBiOT client: all blocks that it has forward, gradients through the last
    `differentiated_blocks` only.

    Args:
        task: from `Method.planned`: its shape has the blocks of the client.
    """
    assert task.differentiated_blocks is not None, "FedBiOT differentiates its adapter's blocks"
    causes = resident(task, setting, rank)
    share = task.differentiated_blocks / task.shape.layers
    return causes | {"gradients": share * causes["gradients"]}


def alignment_step(task: Task, setting: Setting, server: RankProfile) -> Causes:
    """Return a step of FedBiOT's server, which aligns the emulator on public rows: one forward pass of all
    blocks (the teacher), then forward and gradients of the emulator's and the adapter's; both heads for the
    divergence, the gradients of one.

    Args:
        task: of the server, from `Method.planned`: `adapted_blocks` are those of emulator and adapter.
    """
    assert task.adapted_blocks is not None, "the server trains the emulator's blocks"
    times = block_times_of(task, setting, server)
    micro_batches = setting.accumulation
    student = task.adapted_blocks
    return {
        "forward": micro_batches * (task.shape.layers + student) * times.forward,
        "gradients": micro_batches * student * times.gradients,
        "head": micro_batches * 1.5 * times.head,
        "optimizer": seconds_of(task, setting, server).causes["optimizer"],
    }


def split_step(
    client: Task, body: Task, setting: Setting, client_rank: RankProfile, server: RankProfile
) -> Causes:
    """Return a step of one M2FedSA client with its server, which serves nobody else meanwhile.

    The ranks of a client compute their own rows at the same time, and the server the rows of all of them.
    Within a micro-batch everything waits for what comes before: ends forward, body forward, head, body
    backward, ends backward, and between them four messages of one vector a token. No side computes again what
    it has kept.

    Args:
        client, body: from `Method.planned`, for both roles. setting: of one rank of the client.
    """
    micro_batches = setting.accumulation
    ends = block_times_of(client, setting, client_rank)
    joint = replace(setting, micro_batch=setting.micro_batch * client_rank.client_ranks)
    middle = block_times_of(body, joint, server)
    rate = min(client_rank.node.link_rate, server.node.link_rate)
    message = joint.micro_batch * client.tokens * client.shape.hidden * client.type_bytes / rate + MESSAGE_S
    own = seconds_of(client, setting, client_rank).causes
    updates = [own["optimizer"], own["client's ranks"], seconds_of(body, joint, server).causes["optimizer"]]
    return {
        "forward": micro_batches * client.shape.layers * ends.forward,
        "gradients": micro_batches * client.shape.layers * ends.gradients,
        "head": micro_batches * ends.head * client.answer_share,
        "server's forward": micro_batches * body.shape.layers * middle.forward,
        "server's gradients": micro_batches * body.shape.layers * middle.gradients,
        "messages": micro_batches * MESSAGES_OF_SPLIT * message,
        "optimizer": sum(updates) / client_rank.carried,
    }
