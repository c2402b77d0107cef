"""What an evaluation takes over from the model that it is of."""

from fedspeed.session.eval_target import resolve_target

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
