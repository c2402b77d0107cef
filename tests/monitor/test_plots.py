import math

from fedspeed.monitor.comparison import Comparison, ComparisonRow
from fedspeed.monitor.plots import comparison_figure, run_figure
from fedspeed.monitor.records import summarise


def figure_of(records, **changes):
    return run_figure(records, summarise(records, total_rounds=9, **{"status": "finished"} | changes), "name")


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_curves_are_the_records(make_round):
    records = [make_round(0, train_loss=None, tokens=0), make_round(1, val_loss=None), make_round(2)]
    loss, seconds, speed = figure_of(records).axes
    training, held_out = loss.lines[:2]
    assert list(training.get_xdata()) == [1, 2]
    assert list(training.get_ydata()) == [1.5, 1.0]
    assert list(held_out.get_xdata()) == [0, 2]
    assert list(speed.lines[0].get_ydata()) == [300.0, 300.0]
    assert max(bar.get_y() + bar.get_height() for bar in seconds.patches) == 10.0
    assert legend(seconds) == ["compute", "gather", "exchange", "idle", "other"]


def test_a_chart_for_each_metric_that_has_one_and_was_measured(make_round):
    records = [make_round(0, val_exact=0.0), make_round(1, val_exact=None), make_round(2, val_exact=0.25)]
    *_, exact, speed = figure_of(records).axes
    assert (exact.get_ylabel(), speed.get_ylabel(), speed.get_xlabel()) == (
        "held-out answers\nexactly right",
        "trained tokens/s",
        "round",
    )
    assert list(exact.lines[0].get_xdata()) == [0, 2] and list(exact.lines[0].get_ydata()) == [0.0, 0.25]
    assert exact.yaxis.get_major_formatter()(0.25).startswith("25")
    assert list(speed.lines[0].get_xdata()) == [1, 2]


def test_the_legend_names_what_is_marked(make_round):
    records = [
        make_round(1),
        make_round(2, received=2, missing=(0,)),
        make_round(3, received=2),
        make_round(4, train_loss=math.nan),
    ]
    figure = figure_of(records, status="failed")
    assert legend(figure.axes[0]) == [
        "training",
        "held out",
        "best: 0.6400 in round 4",
        "an update is missing",
        "not finite from round 4",
    ]
    assert figure.get_suptitle() == "name: failed, 4 of 9 rounds in 40s"


def test_losses_that_nobody_is_told_are_no_empty_curve(make_round):
    axes = figure_of([make_round(number, train_loss=None, val_loss=None) for number in (1, 2)]).axes[0]
    assert not axes.lines and axes.get_legend() is None
    assert [text.get_text() for text in axes.texts] == ["losses are hidden"]


def test_few_rounds_have_no_fractions_on_the_axis(make_round):
    figure = figure_of([make_round(1), make_round(2)])
    assert list(figure.axes[-1].get_xticks()) == [1, 2]


def test_the_federated_bar_stands_out():
    rows = (
        ComparisonRow("client 0 alone", 2.0, 0.2),
        ComparisonRow("all", 1.0, 0.8),
        ComparisonRow("client 1 alone", 2.0, 0.3),
    )
    for axes in comparison_figure(Comparison(rows, federated="all")).axes:
        colours = [bar.get_facecolor() for bar in axes.patches]
        assert colours[0] == colours[2] != colours[1]


def test_scores_of_evaluation_tasks_have_a_curve_below_the_loss(make_round):
    scores = {0: 0.02, 2: 0.1, 4: 0.3}
    records = [make_round(n, **({"eval_gsm8k": scores[n]} if n in scores else {})) for n in range(5)]
    figure = figure_of(records)
    [axes] = [axes for axes in figure.axes if axes.get_ylabel() == "eval: gsm8k\naccuracy"]
    [curve] = axes.lines
    assert list(curve.get_xdata()) == [0, 2, 4] and list(curve.get_ydata()) == [0.02, 0.1, 0.3]
    assert "eval: held_out\nloss" not in [axes.get_ylabel() for axes in figure.axes]
