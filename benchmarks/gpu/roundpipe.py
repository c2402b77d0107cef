"""RoundPipe on the same model, rows, adapter and cap, through its public interface.

The package (PyPI: roundpipe) streams the layers of an nn.Sequential from host memory. Here a layer is a
decoder block of the model that our own engine trains, with the same weights and the same LoRA; the last
one is norm and head for answer tokens. Embeddings are looked up in host memory, as ours are. It steps as
it does by default: asynchronously, one step behind.
"""

import json
import statistics
import time
from importlib.util import find_spec

import torch
from torch import nn

from benchmarks.gpu import card
from benchmarks.gpu.engines import Scene
from benchmarks.gpu.record import LeftOut
from benchmarks.gpu.shapes import Step, model_of, step_of, write_model

STEPS = (Step("8k", tokens=4096, micro=2), Step("32k", tokens=4096, micro=8))
OURS = "perf-14b-24gib"  # the phase that measures ours on the same model and cap
WARM_UP = 3  # RoundPipe divides its stages anew, from measured times
REPEAT = 3
STEP_S = {"8k": 30, "32k": 45}  # what is left must be more than this
OF_CAP = 0.6  # for weights: RoundPipe's own share of what is free
TOLERANCE = 2e-2
LR = 1e-4


class Block(nn.Module):
    """A decoder block behind a sequence's one argument; the first is given the sequence's own."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        """Compute (hidden, cosines, sines) from the same."""
        hidden, cos, sin = inputs if len(inputs) > 1 else inputs[0]
        return self.block(hidden, attention_mask=None, position_embeddings=(cos, sin)), cos, sin


class Head(nn.Module):
    """Norm and head, for the positions that predict an answer token."""

    def __init__(self, norm: nn.Module, head: nn.Module, first: int):
        super().__init__()
        self.norm = norm
        self.head = head
        self.first = first

    def forward(self, inputs):
        """Compute logits from what the last block has given."""
        return self.head(self.norm(inputs[0][:, self.first : -1]))


def run(scene: Scene) -> None:
    """Measure it where it can run; without a card, hold the sequence it would get against the model."""
    shape = model_of(scene.phase.options["model"], scene.dry)
    base = write_model(scene.folder / "model", shape)
    if scene.dry:
        with scene.record.guarded("sequence"):
            scene.record.note("sequence", check_sequence(base, step_of(STEPS[0], True), shape.vocab))
    with scene.record.guarded("RoundPipe"):
        check_installed(scene.dry)
        card.draw_there()
        card.cap(scene.phase.options["cap"], False)
        net = load(base)
        scene.record.note("loaded s", round(scene.record.seconds, 1))
        measure_all(scene, net, shape.vocab)


def check_installed(dry: bool) -> None:
    """Check that RoundPipe can run.

    Raises:
        LeftOut: it cannot.
    """
    if find_spec("roundpipe") is None:
        raise LeftOut("the package roundpipe is not installed (benchmarks/gpu/prepare.sh)")
    if dry:
        raise LeftOut("roundpipe asks for the memory of a card when it is imported, and there is none")


def load(base) -> nn.Module:
    """Load the model with its adapter in host memory, with the random weights of our engine."""
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.models.loading import materialise, meta_model

    model = ModelConfig(base=str(base), init="random", dtype="bf16")
    adapter = AdapterConfig()
    net = meta_model(model, adapter)
    materialise(net, model, adapter, 0, _in_ram)
    return net.train()


def _in_ram(name: str, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.data.cpu(), requires_grad=parameter.requires_grad)


def sequence_of(net: nn.Module, first: int) -> nn.Sequential:
    """Return the layers of the model between the embedding and the loss."""
    decoder = net.base_model.model.model
    return nn.Sequential(
        *(Block(block) for block in decoder.layers), Head(decoder.norm, net.base_model.model.lm_head, first)
    )


class Rows:
    """The rows of a step as a sequence is given them, in host memory."""

    def __init__(self, net: nn.Module, step: Step, vocab: int):
        from fedspeed.models.blocks import anatomy

        batches = step.batches(vocab)
        ids = torch.cat([torch.from_numpy(batch.input_ids) for batch in batches.micro])
        labels = torch.cat([torch.from_numpy(batch.labels) for batch in batches.micro])
        prompt = int((labels[0] == -100).sum())
        self.ids = ids
        self.first = prompt - 1
        self.labels = labels[:, prompt:].contiguous()
        self.answers = batches.step_answer_tokens
        with torch.no_grad():
            self.hidden = anatomy(net).embedding(ids)
            self.cos, self.sin = net.base_model.model.model.rotary_emb(
                self.hidden, torch.arange(step.tokens)[None]
            )

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the contribution of some rows to the mean loss of the step."""
        return (
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            / self.answers
        )


def split(args: tuple, kwargs: dict, parts: int) -> tuple[list, list]:
    """Divide a step's rows into micro-batches; rotations are the same for all."""
    hidden, cos, sin = args
    return [(part, cos, sin) for part in hidden.chunk(parts)], [{}] * parts


def check_sequence(base, step: Step, vocab: int) -> dict:
    """Compare the loss of the sequence of layers with that of the model; fail if they differ."""
    net = load(base)
    rows = Rows(net, step, vocab)
    with torch.no_grad():
        args, _ = split((rows.hidden, rows.cos, rows.sin), {}, step.micro)
        labels = rows.labels.chunk(step.micro)
        layers = sequence_of(net, rows.first)
        loss = sum(rows.loss(_through(layers, some), label) for some, label in zip(args, labels)).item()
        expected = rows.loss(net(input_ids=rows.ids).logits[:, rows.first : -1], rows.labels).item()
    found = {"loss": round(loss, 6), "of the model": round(expected, 6)}
    if not abs(loss / expected - 1) <= TOLERANCE:
        found["failed"] = "the sequence for RoundPipe does not compute what the model computes"
    return found


def _through(layers: nn.Sequential, args: tuple) -> torch.Tensor:
    state = layers[0](*args)
    for layer in layers[1:]:
        state = layer(state)
    return state


def measure_all(scene: Scene, net: nn.Module, vocab: int) -> None:
    """Measure each step on one pipe."""
    from roundpipe import RoundPipe

    steps = [step_of(step, scene.dry) for step in STEPS]
    first = Rows(net, steps[0], vocab).first  # the same for all: their rows have one length
    pipe = RoundPipe(sequence_of(net, first), optim_dtype=torch.float32, name="fedspeed-benchmark")
    optimizer = torch.optim.AdamW(list(pipe.optim_parameters()), lr=LR)
    scene.record.note("page-locked s", round(scene.record.seconds, 1))
    for step in steps:
        with scene.record.guarded(step.name):
            scene.record.need(STEP_S[step.name])
            scene.record.note(step.name, measure(scene, pipe, optimizer, Rows(net, step, vocab), step))
            with scene.record.guarded(f"{step.name} beside ours"):
                scene.record.note(f"{step.name} beside ours", beside_ours(scene, step))


def measure(scene: Scene, pipe, optimizer, rows: Rows, step: Step) -> dict:
    """Seconds, tokens and memory of a step."""
    seconds = []
    losses = []
    for i in range(WARM_UP + REPEAT):
        if i == WARM_UP:
            card.forget_peaks(scene.dry)
        card.synchronise(scene.dry)
        begin = time.perf_counter()
        losses.append(take_step(scene, pipe, optimizer, rows, step))
        card.synchronise(scene.dry)
        seconds.append(time.perf_counter() - begin)
    counted = seconds[WARM_UP:]
    one = statistics.median(counted)
    found = {"s a step": round(one, 4), "least s": round(min(counted), 4), "most s": round(max(counted), 4)}
    return (
        found
        | {"tokens/s": round(step.total / one), "losses": [round(loss, 6) for loss in losses]}
        | card.peaks(scene.dry)
    )


def take_step(scene: Scene, pipe, optimizer, rows: Rows, step: Step) -> float:
    """One step; its loss. The plan knows of the cap, which RoundPipe's own would not."""
    from roundpipe import ModelExecutePlan, RoundPipeRunConfig

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    plan = ModelExecutePlan.auto("fused", pipe, model_memory_limit=OF_CAP * scene.phase.options["cap"])
    config = RoundPipeRunConfig(
        num_microbatch=step.micro, split_input=split, preserve_rng_state=False, execute_plan=plan
    )
    loss = pipe.forward_backward(
        input_args=(rows.hidden, rows.cos, rows.sin), label=rows.labels, loss_fn=rows.loss, run_config=config
    )
    pipe.step(update)
    return float(loss)


def beside_ours(scene: Scene, step: Step) -> dict:
    """Our speed in times of RoundPipe's, and the first loss of both, from what our phase has written."""
    path = scene.out / f"{OURS}.json"
    name = f"{step.name} planned"
    ours = json.loads(path.read_text())["results"].get(name, {}) if path.is_file() else {}
    if "tokens/s" not in ours:
        raise LeftOut(f"the phase {OURS} has not measured {name!r}")
    theirs = scene.record.results[step.name]
    off = abs(theirs["losses"][0] / ours["losses"][0] - 1)
    found = {
        "times the speed of RoundPipe": round(ours["tokens/s"] / theirs["tokens/s"], 2),
        "first loss off": float(f"{off:.2e}"),
    }
    if not off <= TOLERANCE and step.name == STEPS[0].name:
        found["failed"] = f"the first losses differ by {off:.2e}, more than {TOLERANCE:g}: not the same task"
    return found
