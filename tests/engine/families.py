"""What a family's tiny model computes: by an engine, and by transformers and PEFT alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.data.config import TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.engine.generation.batches import right_aligned
from fedspeed.models.config import AdapterConfig
from tests.engine.engines import engine
from tests.engine.family_bases import VOCABULARY, attention_targets, linear_targets
from tests.tiny import random_step

RATE = (
    1024.0  # of the SGD step that gradients are read from; a power of two, far above the rounding of weights
)
LORA_RANK = 4
ALPHA = 8.0
MAX_NEW = 6
MICRO_BATCHES = 3
_RNG = np.random.default_rng(7)
_BEGINNING = _RNG.integers(3, VOCABULARY, 5)  # of all prompts, computed once; sliding windows attend to it
PROMPTS = [np.concatenate([_BEGINNING, _RNG.integers(3, VOCABULARY, length)]) for length in (9, 1, 5)]
SEQUENCES = [_RNG.integers(3, VOCABULARY, length) for length in (20, 11)]
PIPELINE = EngineConfig(pipeline="client")


@dataclass
class Measured:
    """What a model computes of the same rows, prompts and adapter, whoever executes it.

    Attributes:
        losses: summed cross-entropy of the answer tokens, of each micro-batch and of the training step.
        gradients: of the step's mean loss, by the trainable tensor's name.
        logits: of all tokens of SEQUENCES[0], [tokens, vocabulary].
        greedy: the answers to PROMPTS, which have several lengths, asked for together. alone: each asked for
            by itself.
        logprobs: of all but the first token of each of SEQUENCES.
    """

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    logits: np.ndarray
    greedy: list[list[int]]
    alone: list[list[int]]
    logprobs: np.ndarray


def rows(padded: bool) -> StepBatches:
    """Make a step of three micro-batches, the last of longer rows.

    Args:
        padded: whether the rows of a micro-batch have several lengths.
    """
    steps = [random_step(3 + i, 2, 1, length=40 if i == 2 else 24) for i in range(MICRO_BATCHES)]
    batches = [step.micro[0] for step in steps]
    if padded:
        batches = [_padded(batch, (5, 2 + i)) for i, batch in enumerate(batches)]
    return StepBatches(batches, sum(batch.answer_tokens for batch in batches))


def _padded(batch: Batch, ends: Sequence[int]) -> Batch:
    ids = batch.input_ids.copy()
    labels = batch.labels.copy()
    mask = batch.attention_mask.copy()
    for row, end in enumerate(ends):
        mask[row, -end:] = 0
        ids[row, -end:] = 0
        labels[row, -end:] = -100
    return Batch(ids, labels, mask, int((labels[:, 1:] != -100).sum()))


def adapter(targets: str) -> AdapterConfig:
    """Return the configuration of the adapter that is compared."""
    return AdapterConfig(targets=targets, lora_rank=LORA_RANK, alpha=ALPHA)


def drawn_state(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Draw the adapter's tensors, the same ones for the same names."""
    import torch

    generator = torch.Generator().manual_seed(5)
    return {name: 0.15 * torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}


def by_engine(
    base: str,
    kind: str,
    targets: str,
    padded: bool,
    *,
    ranks: int = 1,
    options: EngineConfig | None = None,
    nvme: str | Path = "unused",
    blocks: tuple[int, ...] | None = None,
) -> Measured:
    """Measure what an engine of some kind computes. Collective over the world's ranks, one client's."""
    step = rows(padded)
    train = TrainConfig(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    with engine(
        base,
        kind,
        clients=(tuple(range(ranks)),),
        adapter=adapter(targets),
        train=train,
        options=options,
        join=False,
        micro=2,
        nvme=nvme,
        blocks=blocks,
    ) as client_engine:
        start = drawn_state({name: tuple(value.shape) for name, value in client_engine.state().items()})
        client_engine.load(start)
        losses = [sums.loss for sums in client_engine.evaluate([[batch] for batch in step.micro])]
        greedy = client_engine.generate(PROMPTS, max_new=MAX_NEW)
        alone = [client_engine.generate([prompt], max_new=MAX_NEW)[0] for prompt in PROMPTS]
        logprobs = client_engine.logprobs(SEQUENCES, [(1, len(tokens)) for tokens in SEQUENCES])
        logits = client_engine._execute_series(_all_logits(SEQUENCES[0], client_engine.data_share[1] == 0))
        client_engine.load(start)
        losses.append(client_engine.train_step([step], RATE)[0].loss)
        ended = {name: value.detach().numpy() for name, value in client_engine.state().items()}
        client_engine.close()
    return Measured(
        np.array(losses),
        {name: (start[name].numpy() - value) / RATE for name, value in ended.items()},
        np.concatenate(logits).reshape(-1, VOCABULARY) if logits else np.zeros((0, VOCABULARY)),
        greedy=[answers[0].tolist() for answers in greedy],
        alone=[answers[0].tolist() for answers in alone],
        logprobs=np.concatenate(logprobs),
    )


def _all_logits(tokens: np.ndarray, asks: bool):
    """Yield one piece that reads every logit of every token; ends with the logits, flat."""
    import torch

    from fedspeed.engine.generation.cache import Segment, View
    from fedspeed.engine.generation.pieces import Piece

    if not asks:
        return []
    where = np.repeat(np.arange(len(tokens)), VOCABULARY)
    which = torch.arange(VOCABULARY).repeat(len(tokens))
    positions = np.arange(len(tokens))[None]
    piece = Piece(
        tokens[None],
        positions,
        View([], Segment(1), positions),
        wanted=(np.zeros_like(where), where),
        read=lambda logits, part: logits.gather(-1, which[part, None])[:, 0],
        reads_tokens=False,
    )
    return (yield [piece])


def by_transformers(family: str, base: str, targets: str, padded: bool) -> Measured:
    """Measure what transformers and PEFT compute, given the same adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    modules = linear_targets(family) if targets == "all-linear" else attention_targets(family)
    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=ALPHA,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(model, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in drawn_state({n: tuple(p.shape) for n, p in trained.items()}).items():
            trained[name].copy_(value)
    step = rows(padded)
    model.train()
    losses = []
    for batch in step.micro:
        loss = _summed_loss(model, batch)
        (loss / step.step_answer_tokens).backward()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        logits_of = [model(input_ids=torch.from_numpy(tokens)[None]).logits[0] for tokens in SEQUENCES]
        greedy = generated(model, PROMPTS, MAX_NEW)
        alone = [_without_cache(model, prompt) for prompt in PROMPTS]
    logprobs = [
        logits[:-1].log_softmax(-1).gather(-1, torch.from_numpy(tokens)[1:, None])[:, 0]
        for logits, tokens in zip(logits_of, SEQUENCES)
    ]
    return Measured(
        np.array([*losses, sum(losses)]),
        {name: p.grad.numpy() for name, p in trained.items()},
        logits_of[0].numpy(),
        greedy=greedy,
        alone=alone,
        logprobs=torch.cat(logprobs).numpy(),
    )


def _summed_loss(model, batch: Batch):
    import torch

    ids, labels, mask = (
        torch.from_numpy(array) for array in (batch.input_ids, batch.labels, batch.attention_mask)
    )
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def generated(model, prompts: Sequence[np.ndarray], max_new: int) -> list[list[int]]:
    """Answer greedily with transformers' `generate`, all prompts in one batch that is padded on the left."""
    import torch

    tokens, real = right_aligned(prompts)
    whole = model.generate(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        max_new_tokens=max_new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return whole[:, tokens.shape[1] :].tolist()


def _without_cache(model, prompt: np.ndarray) -> list[int]:
    """Answer greedily without a cache: every token from a forward over all tokens before it."""
    import torch

    tokens = torch.from_numpy(prompt)[None]
    for _ in range(MAX_NEW):
        following = model(input_ids=tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], 1)
    return tokens[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Differences:
    """The largest differences from what transformers computes, relative to its largest value of the same kind
    (losses: each to its own).

    Attributes:
        same_answers: whether the greedy answers are equal: the engine's, asked for together and one by one,
            those of transformers' `generate` with padding, and those of forward passes without a cache.
    """

    logits: float
    losses: float
    gradients: float
    logprobs: float
    same_answers: bool

    @property
    def largest(self) -> float:
        """Return the largest of all, infinite where the answers differ."""
        if not self.same_answers:
            return float("inf")
        return max(self.logits, self.losses, self.gradients, self.logprobs)


def compare(found: Measured, expected: Measured) -> Differences:
    """Compare what an engine computes with what transformers computes."""
    assert found.gradients.keys() == expected.gradients.keys()
    return Differences(
        _off(found.logits, expected.logits),
        float(np.abs(found.losses / expected.losses - 1).max()),
        _off(_flat(found.gradients), _flat(expected.gradients)),
        _off(found.logprobs, expected.logprobs),
        found.greedy == found.alone == expected.greedy == expected.alone,
    )


def _flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())
