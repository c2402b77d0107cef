"""The section `A new metric` of docs/extending.md, applied to a copy of the package: the new file and the one
line.
"""

import json
import re
import shutil
import subprocess
import sys

from tests.conftest import ROOT
from tests.limits import LIMIT_S

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
    text = (
        (ROOT / "docs" / "extending.md").read_text().partition("## A new metric\n")[2].partition("\n## ")[0]
    )
    path = re.search(r"One new file, `(\S+)`:", text)[1]
    new_file, line = re.findall(r"```python\n(.*?)```", text, re.S)
    package = tmp_path / "fedspeed"
    shutil.copytree(ROOT / "fedspeed", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / path).write_text(new_file)
    registry = package / "monitor" / "metrics" / "registry.py"
    before = registry.read_text()
    registry.write_text(re.sub(r"MODULES = .*\n", line, before, count=1))
    assert len(set(registry.read_text().splitlines()) - set(before.splitlines())) == 1, "the one line"
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain, masked = (json.loads(shown) for shown in done.stdout.splitlines())
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
