import math
import struct
import subprocess
import sys

import pytest

from fedspeed.data.prompting import PromptFormat
from fedspeed.monitor.comparison import Comparison, ComparisonRow
from fedspeed.monitor.records import MissingUpdates, summarise
from fedspeed.monitor.report import Export, Facts, missing_text, write_report
from fedspeed.monitor.tables import clients_table, rounds_to_show
from tests.limits import LIMIT_S

FACTS = Facts(
    run={"model": "tiny Llama", "odd | name": "two\nlines"},
    hosts=(
        {"host": "alpha", "devices": "2 x A", "clients": "0"},
        {"host": "beta", "devices": "2 x B", "NVMe": "/scratch"},
    ),
    export=Export("adapter", "runs/one/adapter", "models/tiny", 2),
    resume_command="python launch.py --config one.yaml",
)


def report(
    folder,
    records,
    status="finished",
    *,
    total=3,
    mode="plain",
    facts=FACTS,
    comparison=None,
    plot=False,
    **changes,
):
    summary = summarise(records, status=status, total_rounds=total, **changes)
    path = write_report(
        folder,
        records,
        summary,
        "run:\n  seed: 3\n",
        facts,
        routing_mode=mode,
        comparison=comparison,
        plot=plot,
    )
    return path.read_text()


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_a_client_has_as_many_updates_as_it_has_trained(make_round, make_client):
    """The evaluation before round 1 and rounds without training do not count; their values are missing."""
    idle = make_client(1, local_steps=0)
    records = [
        make_round(0, per_client=(make_client(0, local_steps=0), idle)),
        make_round(1, per_client=(make_client(0), idle)),
        make_round(2, received=2, missing=(0,), per_client=(make_client(0), idle)),
    ]
    rows = [line.split("|")[1:4] for line in clients_table(records).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [["0", "1", "1"], ["1", "0", "0"]]


def test_finished(tmp_path, make_round, make_client):
    text = report(
        tmp_path / "one",
        [make_round(number, per_client=(make_client(0), make_client(1))) for number in (1, 2, 3)],
        plot=True,
    )
    lines = text.splitlines()
    assert lines[0] == "# Run `one`: finished"
    assert lines[2] == "> **Finished**: 3 of 3 rounds in 30s."
    assert "| held-out loss, best | 0.8000 (round 3) |" in lines
    assert "| tokens trained | 9.00k |" in lines
    assert "| peak memory of a rank | 2.00 GiB |" in lines
    assert "| odd \\| name | two lines |" in lines
    assert "| host | devices | clients | NVMe |" in lines
    assert "| beta | 2 x B | - | /scratch |" in lines
    assert "| 3 | 0.7500 | 0.8000 (best) | 3 of 3 | 10s | 300 | 4.00 KiB | 0.001 | 0.5 | ≈1e-02 |" in lines
    assert "| compute | 18s | 60.0 % |" in lines
    assert "| other | 1.5s | 5.0 % |" in lines
    assert "| 1 | 3 | 0 | 3.0000 | 3.5000 | 30 | 303 | 12s | 3.0s | 1.5s | 0.8s |" in lines
    assert "Every update of every finished round arrived. 0 restarts." in lines
    assert "base = AutoModelForCausalLM.from_pretrained('models/tiny', dtype=torch.float32)" in lines
    assert "model = PeftModel.from_pretrained(base, 'runs/one/adapter')" in lines
    assert "  seed: 3" in lines
    assert "![losses, time per round and speed over the rounds](report.png)" in lines
    width, height = png_size(tmp_path / "one" / "report.png")
    assert width > 1000
    assert height > 1000
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "report.md",
        "report.png",
        "summary.json",
    ]


def test_a_finished_run_that_lacks_updates_says_so_at_the_top(tmp_path, make_round):
    text = report(
        tmp_path, [make_round(1), make_round(2, received=1, missing=(0, 2)), make_round(3)], restarts=1
    )
    assert "> **2 updates are missing** from the result" in "\n".join(text.splitlines()[:6])
    assert "- round 2: 2 updates (clients 0 and 2)\n" in text
    assert "1 restart." in text
    assert "| missing updates | 2 |" in text


def test_a_run_whose_updates_did_not_count_fully_says_so_at_the_top(tmp_path, make_round):
    records = [make_round(1), make_round(2, clipped=30)]
    text = report(tmp_path, records, mode="mask", exit_code=1)
    top = text.partition("## Result")[0]
    assert "30 values of the updates counted for less than they should" in top and "Exit code 1." in top


def test_a_skipped_round_is_reported_at_the_top_and_in_the_table(tmp_path, make_round):
    records = [make_round(number, skipped=int(number == 2)) for number in range(1, 41)]
    text = report(tmp_path, records, mode="mask", exit_code=1)
    top = text.partition("## Result")[0]
    assert "1 round skipped" in top and "they were discarded, and the state stayed as it was" in top
    assert "| rounds that were skipped | 1 |" in text and "\n| 2 |" in text and ", skipped |" in text
    assert "Every update of every finished round arrived; those of skipped rounds were discarded." in text
    assert " skipped" not in report(tmp_path, [make_round(1, skipped=0)], mode="mask")


def test_an_estimate_is_printed_as_one(tmp_path, make_round):
    rows = report(
        tmp_path,
        [
            make_round(1, factor_error=0.0123),
            make_round(2, factor_error=0.0123, factor_error_exact=True),
            make_round(3, factor_error=None),
        ],
    )
    assert (
        "| 0.5 | ≈1e-02 |" in rows
        and "| 0.5 | 1.23e-02 |" in rows
        and "| 0.5 | - |" in rows
        and "estimated from random probes" in rows
    )
    exact = report(tmp_path, [make_round(1, factor_error_exact=True)])
    assert "≈" not in exact


def test_held_out_answers_exactly_right_stand_beside_the_loss(tmp_path, make_round, make_client):
    clients = (make_client(0, val_exact=0.125), make_client(1))
    text = report(
        tmp_path,
        [make_round(1, val_exact=0.25, per_client=clients), make_round(2, val_exact=0.5), make_round(3)],
    )
    assert (
        "| 2 | 1.0000 | 1.0667 | 50.0 % | 3 of 3 |" in text
        and "| 3 | 0.7500 | 0.8000 (best) | - | 3 of 3 |" in text
    )
    assert "| held-out answers exactly right, last | 50.0 % |" in text
    assert (
        "| 0 | 1 | 0 | 2.0000 | 2.5000 | 12.5 % | 10 |" in text
        and "| 1 | 1 | 0 | 3.0000 | 3.5000 | - | 10 |" in text
    )
    assert "held-out exact" not in report(tmp_path, [make_round(1)])


def test_failed(tmp_path, make_round):
    text = report(
        tmp_path,
        [make_round(1)],
        "failed",
        reason="client 2 did not answer within 30 s",
        exit_code=75,
        also_missing=(MissingUpdates(2, 1, (2,)),),
    )
    top = "\n".join(text.splitlines()[:8])
    assert "**FAILED** after 1 of 3 rounds" in top
    assert "client 2 did not answer within 30 s." in top
    assert "**1 update is missing**" in top
    assert "Exit code 75." in top
    assert "To continue from the last finished round: python launch.py --config one.yaml." in top
    assert "- round 2: 1 update (client 2)" in text


def test_failed_for_good_offers_no_resume(tmp_path, make_round):
    text = report(tmp_path, [make_round(1)], "failed", reason="bug", exit_code=1)
    assert "Exit code 1." in text
    assert "To continue" not in text


def test_preempted(tmp_path, make_round):
    text = report(tmp_path, [make_round(1), make_round(2)], "preempted", exit_code=75)
    assert "**PREEMPTED** after 2 of 3 rounds in 20s" in text
    assert "To continue from the last finished round" in text


def test_early_stop(tmp_path, make_round):
    records = [make_round(1), make_round(2, val_loss=1.7)]
    text = report(tmp_path, records, "early stop", total=9, reason="no better held-out loss in 1 evaluation")
    assert "**Stopped early**, as configured: 2 of 9 rounds" in text
    assert "| held-out loss, best | 1.6000 (round 1) |" in text


def test_failed_before_the_first_round(tmp_path):
    text = report(tmp_path, [], "failed", reason="no data", exit_code=2, facts=Facts(), plot=True)
    assert "**FAILED** after 0 of 3 rounds" in text
    assert "Nothing was exported." in text
    assert "## Rounds" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "summary.json"]


@pytest.mark.parametrize("losses", [(math.nan, math.nan), (math.inf, None), (None, None)])
def test_losses_that_cannot_be_drawn_do_not_stop_the_report(tmp_path, make_round, losses):
    text = report(
        tmp_path,
        [make_round(1), make_round(2, train_loss=losses[0], val_loss=losses[1])],
        "failed",
        exit_code=1,
        plot=True,
    )
    assert "| held-out loss, best | 1.6000 (round 1) |" in text
    png_size(tmp_path / "report.png")


def test_a_model_is_used_as_a_model(tmp_path, make_round):
    text = report(
        tmp_path, [make_round(1)], facts=Facts(export=Export("model", "runs/x/model", "", 1, "bfloat16"))
    )
    assert "AutoModelForCausalLM.from_pretrained('runs/x/model', dtype=torch.bfloat16)" in text
    assert "PeftModel" not in text


def test_an_adapter_of_sixteen_bits_is_computed_in_them(tmp_path, make_round):
    text = report(
        tmp_path, [make_round(1)], facts=Facts(export=Export("adapter", "runs/x/adapter", "b", 1, "bfloat16"))
    )
    assert "from_pretrained('b', dtype=torch.bfloat16)" in text
    assert "PeftModel.from_pretrained(base, 'runs/x/adapter', autocast_adapter_dtype=False)" in text


PROMPT = PromptFormat("alpaca", ((1,), "<s>"), ((2,), "</s>"), 2, ("Below ... ### Response:", 64))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_prompt_is_shown_as_it_was_trained_with(tmp_path, make_round, kind):
    text = report(
        tmp_path,
        [make_round(1)],
        facts=Facts(export=Export(kind, f"runs/x/{kind}", "b", round=1, dtype="float32", prompt=PROMPT)),
    )
    for words in (
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n```",
        "### Instruction:\n{instruction}\n\n### Response:\n```",
        "the token `<s>`, then the prompt (template `alpaca`), the answer, and the token `</s>`",
        f"`fedspeed chat runs/x/{kind}`",
        "tokens = [1] + tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids",
        "max_new_tokens=64, do_sample=False",
    ):
        assert words in text
    assert "chat template" not in text


def test_an_adapter_of_a_base_that_is_in_no_file_is_not_said_to_load(tmp_path, make_round):
    text = report(
        tmp_path,
        [make_round(1)],
        facts=Facts(
            export=Export(
                "adapter", "runs/x/adapter", "b", round=1, dtype="float32", prompt=PROMPT, drawn=True
            )
        ),
    )
    assert "The base's weights were drawn at random and are in no file" in text
    assert "from_pretrained" not in text and "fedspeed chat" not in text


def test_comparison(tmp_path, make_round):
    rows = (ComparisonRow("client 0 alone", 2.5, 0.25), ComparisonRow("federated", 1.25, 0.875))
    text = report(tmp_path, [make_round(1)], comparison=Comparison(rows), plot=True)
    assert "| client 0 alone | 2.5000 | 25.0 % |\n| **federated** | **1.2500** | **87.5 %** |" in text
    assert "](comparison.png)" in text
    png_size(tmp_path / "comparison.png")


def test_comparison_without_accuracy_has_one_panel(tmp_path, make_round):
    rows = (ComparisonRow("$a$ alone", 2.5, None), ComparisonRow("federated", 1.25, None))
    text = report(tmp_path, [make_round(1)], comparison=Comparison(rows), plot=True)
    assert "| $a$ alone | 2.5000 | - |" in text
    png_size(tmp_path / "comparison.png")


def test_masked_modes_hide_hosts_clients_and_comparison(tmp_path, make_round, make_client):
    records = [make_round(1, received=2, missing=(1,), per_client=(make_client(0), make_client(2)))]
    comparison = Comparison((
        ComparisonRow("client 0 alone", 2.5, 0.25),
        ComparisonRow("federated", 1.25, 0.875),
    ))
    text = report(tmp_path, records, mode="masked", comparison=comparison, plot=True)
    assert "- round 1: 1 update\n" in text
    assert "2 hosts;" in text
    for hidden in ("alpha", "beta", "client 0", "client 1", "## Clients", "peak memory", "comparison.png"):
        assert hidden not in text
    assert not (tmp_path / "comparison.png").exists()


def test_idle_pipelines_and_hidden_exchanges_are_told_where_there_are_any(tmp_path, make_round):
    told = report(tmp_path / "a", [make_round(1, bubble=0.25, overlap=0.5)])
    assert (
        "idle part of the pipelines' passes, median round | 25% |" in told
        and "exchange hidden behind training, median round | 50% |" in told
    )
    silent = report(tmp_path / "b", [make_round(1, overlap=0.001)])
    assert "idle part" not in silent and "hidden behind" not in silent


def test_long_runs_are_condensed(tmp_path, make_round):
    records = [
        make_round(number, val_loss=1.0 if number == 50 else 2.0, received=2 if number == 52 else 3)
        for number in range(1, 101)
    ]
    shown = [record.round for record in rounds_to_show(records, best_round=50)]
    assert {1, 50, 52, 100} <= set(shown)
    assert shown == sorted(set(shown))
    assert len(shown) <= 23
    assert f"{len(shown)} of 100 rounds; all of them are in `rounds.jsonl`." in report(
        tmp_path, records, total=100
    )


def test_twenty_rounds_are_not_condensed(make_round):
    records = [make_round(number) for number in range(21)]
    assert rounds_to_show(records, best_round=None) == records


def test_missing_text():
    assert missing_text(MissingUpdates(3, 1, (4,))) == "round 3: 1 update (client 4)"
    assert missing_text(MissingUpdates(3, 3, (1, 2, 4))) == "round 3: 3 updates (clients 1, 2 and 4)"
    assert missing_text(MissingUpdates(3, 2)) == "round 3: 2 updates"


def test_a_configuration_cannot_end_its_own_block(tmp_path, make_round):
    summary = summarise([make_round(1)], status="finished", total_rounds=1)
    path = write_report(
        tmp_path,
        [make_round(1)],
        summary,
        "a: |\n~~~\n# not a heading\n",
        Facts(),
        routing_mode="plain",
        plot=False,
    )
    assert "\n~~~~yaml\na: |\n~~~\n# not a heading\n~~~~\n" in path.read_text()


def test_reading_the_module_loads_no_matplotlib_and_no_torch():
    code = (
        "import sys; import fedspeed.monitor.monitor, fedspeed.monitor.report; "
        "assert not {'matplotlib', 'torch', 'tensorboard', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
