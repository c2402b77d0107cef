"""lm-evaluation-harness over our engines and over its own `hf` model, for tests."""

from contextlib import contextmanager

from tests.engine.engines import engine


@contextmanager
def engine_lm(base, tokenizer, kind="resident", *, ranks=1, **options):
    """Build an engine of one client in this rank's world, which must have been joined, and the adapter to
    it.
    """
    from fedspeed.evaluation.lm_eval_adapter import EngineLM

    with engine(base, kind, clients=(tuple(range(ranks)),), join=False) as client_engine:
        client_engine.load(client_engine.state())
        yield EngineLM(client_engine, tokenizer, **options)
        client_engine.close()


def hf_lm(base, tokenizer, **options):
    """Build the harness's own model, in fp32 on the CPU."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=4, **options
    )


def requests(kind, arguments, task="test"):
    """Make requests of the harness."""
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, argument, number, metadata=(task, number, 1))
        for number, argument in enumerate(arguments)
    ]
