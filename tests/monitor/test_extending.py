"""The section `A new metric` of docs/extending.md, applied to a copy of the package: the new file and the one
line.
"""

import json
import re

from tests.page_examples import copy_with_example, run_in

USE = """
import io, json, sys
from pathlib import Path
from fedspeed.federation.ledger import Ledger
from fedspeed.monitor.config import MonitorConfig
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.monitor import Monitor
from fedspeed.monitor.records import summarise
from fedspeed.monitor.report import Facts
from fedspeed.monitor.round_record import round_record
from fedspeed.monitor.tensorboard import scalars

for mode in ("plain", "mask"):
    ledger = Ledger(1, 1, sums_only=mode != "plain")
    ledger.add_client(0, asked=1, received=1)
    ledger.set_rank(0, **registry.measured(), ranks=1, wall_s=1.0)
    record = round_record(ledger, 1, (0,), lr=0.1, factor_error_exact=False, clipped=0)
    folder, out = Path(sys.argv[1]) / mode, io.StringIO()
    config = MonitorConfig(plot=False, tensorboard=False, progress=False)
    monitor = Monitor(folder, config, mode, 1, json_out=out)
    monitor.round(record)
    monitor.finish(summarise(monitor.records, status="finished", total_rounds=1), Facts())
    report = (folder / "report.md").read_text().splitlines()
    print(json.dumps({"json": json.loads(out.getvalue().splitlines()[0])["open_files"],
                      "log": json.loads((folder / "rounds.jsonl").read_text())["open_files"],
                      "summary": json.loads((folder / "summary.json").read_text())["open_files"],
                      "tag": scalars(record).get("system/open_files"),
                      "report": [line for line in report if "open files" in line]}))
"""


def test_the_example_of_a_new_metric_works_as_it_stands(tmp_path):
    registry = "fedspeed/monitor/metrics/registry.py"
    copy_with_example(
        tmp_path, "A new metric", registry, lambda text, line: re.sub(r"MODULES = .*\n", line, text, count=1)
    )
    shown_in = run_in(tmp_path, USE, str(tmp_path)).splitlines()
    plain, masked = (json.loads(shown) for shown in shown_in)
    count = plain["log"]
    assert count > 2 and plain == {
        "json": count,
        "log": count,
        "summary": count,
        "tag": count,
        "report": plain["report"],
    }
    assert len(plain["report"]) == 2 and f"| open files of all ranks, most | {count} |" in plain["report"]
    assert masked == {"json": None, "log": None, "summary": None, "tag": None, "report": []}
