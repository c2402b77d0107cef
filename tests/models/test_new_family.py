"""The section `A new model family` of docs/extending.md, run exactly as it is printed there: in a copy of the
package, with the new file and the one line.
"""

import json

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.catalogue import from_config
from tests.page_examples import after, copy_with_example, run_in

COHERE = {
    "model_type": "cohere",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 97,
    "attention_bias": True,
    "logit_scale": 0.5,
}
# Compares the new family with transformers' model of the same configuration.
USE = """
import json, sys
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import fedspeed
from fedspeed.data.batches import Batch
from fedspeed.engine.compute.micro_batches import MicroBatchModel, MicroBatchTask
from fedspeed.errors import ModelError
from fedspeed.models.blocks import anatomy
from fedspeed.models.catalogue import from_config
from fedspeed.models.families.registry import FAMILIES

values = json.loads(sys.argv[1])
shape = from_config(values, "cohere", "config.json")
config = AutoConfig.for_model(**values, pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = AutoModelForCausalLM.from_config(config).eval()
parts = anatomy(model)
theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
ids = torch.tensor([[3, 4, 5, 6]])
with torch.no_grad():
    rows = parts.family.embed(parts.embedding.weight[ids], model.config)
    logits = parts.family.logits(parts.head(parts.decoder(inputs_embeds=rows)[0]), model.config)
    same = torch.equal(logits, model(ids).logits)

# One micro-batch forwards and backwards, block by block, as the engine computes it.
tokens = np.random.default_rng(0).integers(3, 97, (2, 12))
task = MicroBatchTask(Batch(tokens, tokens, np.ones_like(tokens), 22), owner=0)
compute = MicroBatchModel(model, parts)
entered, calls = compute.enter(task, parts.embedding.weight.detach())
hidden = entered.requires_grad_()
for b in range(len(parts.blocks)):
    hidden = compute.block(b, task, calls, hidden)
score, downward = compute.head(hidden.detach(), task)
[gradient] = torch.autograd.grad(hidden, entered, downward)
plain = entered.detach().requires_grad_()
raw = model(inputs_embeds=plain).logits[:, :-1].flatten(0, 1)
loss = torch.nn.functional.cross_entropy(raw, torch.from_numpy(tokens[:, 1:]).flatten(), reduction="sum")
[expected] = torch.autograd.grad(loss, plain)
off = float((gradient - expected).abs().max() / expected.abs().max())
trains = abs(float(score.loss) / loss.item() - 1) < 1e-5 and off < 1e-5
try:
    from_config(values | {"use_qk_norm": True}, "cohere", "config.json")
    refused = ""
except ModelError as error:
    refused = str(error)
print(json.dumps({
    "package": fedspeed.__file__,
    "exact": dict(FAMILIES["cohere"].parameters(shape)) == theirs,
    "total": shape.total == sum(p.numel() for p in model.parameters()),
    "same": same,
    "trains": trains,
    "refused": refused,
}))
"""


def test_without_it_the_model_is_refused_with_a_pointer_to_the_page():
    with pytest.raises(ModelError, match=r"model_type is 'cohere', which.*docs/extending.md"):
        from_config(COHERE, "cohere", "config.json")


def test_the_example_of_a_new_family_works_as_it_is_printed(tmp_path):
    registry = "fedspeed/models/families/registry.py"
    copy_with_example(tmp_path, "A new model family", registry, after("MODULES = ("))
    found = json.loads(run_in(tmp_path, USE, json.dumps(COHERE)))
    assert found.pop("package").startswith(str(tmp_path))
    assert "use_qk_norm=True" in found.pop("refused")
    assert found == {"exact": True, "total": True, "same": True, "trains": True}
