"""What an evaluation takes over from the model that it is of."""

from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.config.load import DEFAULT, load
from fedspeed.session.eval_target import resolve_target
from fedspeed.session.request import RunRequest

CARD = """---
fedspeed:
  template: chat
  dtype: bfloat16
  system_prompt: Be brief.
---
"""


def test_another_template_takes_nothing_of_the_models_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")

    def prompts_of(*overrides):
        data = resolve_target(str(tmp_path), overrides).data
        return data.template, data.chat_template, data.system_prompt

    own = ("chat", str(tmp_path / "chat_template.jinja"), "Be brief.")
    assert prompts_of() == prompts_of("data.template=chat") == own
    assert prompts_of("data.template=alpaca") == ("alpaca", "", "")
    assert prompts_of("data.template=alpaca", "data.template=chat") == own


def test_an_adapter_of_clients_with_unequal_ranks_is_one_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks = (
        "federation.method=flexlora",
        "adapter.rank_by_client={0: 2}",
        "adapter.lora_rank=4",
        "model.base=m",
        "run.out=.",
    )
    request = RunRequest(load(None, [*ranks, "run.name=mine", "routing.mode=plain"]))
    Journal(request.folder, 2).commit(Entry(1, request.fingerprint, 0, request.record), {})
    (request.folder / "adapter").mkdir()
    (request.folder / "adapter" / "adapter_config.json").write_text("{}")
    loaded = resolve_target("mine", ()).loaded
    adapter = loaded.config.adapter
    assert (adapter.rank_by_client, adapter.start_from) == ({}, "mine/adapter")
    assert loaded.sources["adapter.lora_rank"] == DEFAULT, "it has a larger one with a folded adapter"
