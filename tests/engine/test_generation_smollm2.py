"""Answers of a real language model: those of transformers, from every tier."""

import numpy as np
import pytest

from tests.engine.engines import engine
from tests.engine.families import generated
from tests.engine.small_models import LORA
from tests.processes import run_clusters
from tests.smollm2 import smollm2

MAX_NEW = 6
BEGINNING = "Question: What is the capital of Italy?\nAnswer: Rome\n\nQuestion: "  # of all prompts
QUESTIONS = (
    "What is the capital of France?",
    "Which colours are in the flag of Germany, from top to bottom?",
    "How many legs does a spider have, and how many has an ant?",
)


def answers(rank, base, prompts, nvme):
    """Return the answers in fp32, in which no two logits are equal: to all prompts together by transformers
    and by engines of several tiers, and to each prompt by itself.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    found = {"transformers": generated(model, prompts, MAX_NEW)}
    del model
    for kind in ("resident", "ram", "nvme"):
        with engine(base, kind, adapter=LORA, nvme=nvme, join=False) as client_engine:
            client_engine.load(client_engine.state())
            together = client_engine.generate(prompts, max_new=MAX_NEW)
            found[kind] = [answer.tolist() for (answer,) in together]
            if kind == "resident":
                alone = [client_engine.generate([prompt], max_new=MAX_NEW)[0][0] for prompt in prompts]
                found["one by one"] = [answer.tolist() for answer in alone]
            client_engine.close()
    leave_world()
    return found


@pytest.mark.slow
def test_a_real_model_answers_from_every_tier_as_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    base = str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [f"{BEGINNING}{question}\nAnswer:" for question in QUESTIONS]
    prompts = [np.array(tokenizer(text).input_ids) for text in texts]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    [found] = run_clusters([1], answers, base, prompts, tmp_path)
    expected = found.pop("transformers")
    assert "Paris" in tokenizer.decode(expected[0])
    assert found == dict.fromkeys(found, expected)
