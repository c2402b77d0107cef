"""Names of a fresh adapter's target modules, compared with those of the base."""

import pytest

from fedspeed.config.load import load
from fedspeed.config.spelling import flow
from fedspeed.errors import FedSpeedError, ModelError
from fedspeed.models.adapter_checks import check_adapter
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.loading import meta_model


@pytest.mark.parametrize(
    "targets", [("qproj",), ("q_proj", "vproj"), ("self_attn.q_prj",), ("attention", "v_proj")]
)
def test_targets_that_the_base_lacks_are_refused_with_those_it_has(base, targets):
    with pytest.raises(ModelError) as caught:
        check_adapter(load(None, [f"model.base={base}", f"adapter.targets={flow(targets)}"]))
    assert all(
        word in str(caught.value)
        for word in (
            "command line",
            f"adapter.targets={flow(targets)}",
            "gate_proj",
            "embed_tokens",
            "q_proj",
        )
    )
    with pytest.raises(FedSpeedError, match="does not fit llama.*q_proj, k_proj"):
        meta_model(ModelConfig(base=base, dtype="fp32"), AdapterConfig(targets=targets))


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj",),
        ("self_attn.q_proj", "down_proj"),
        ("embed_tokens", "lm_head"),
        ("model.layers.1.mlp.up_proj",),
    ],
)
def test_targets_that_it_has_are_not(base, targets):
    assert check_adapter(load(None, [f"model.base={base}", f"adapter.targets={flow(targets)}"])) == []
    meta_model(ModelConfig(base=base, dtype="fp32"), AdapterConfig(targets=targets))
