"""Organisations that train together: each site with its own keys, rows, YAML and output folder."""

import json
import subprocess
import sys

import yaml

from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.processes import free_ports
from tests.run.launched import rounds_seen


class Federation:
    """Hold several sites, each with its own YAML, and start them."""

    def __init__(self, workshop, name: str, size: int):
        self.workshop = workshop
        self.size = size
        self.folder = workshop.folder / name
        self.ports = free_ports(size)
        cards = []
        for i, port in enumerate(self.ports):
            self.run_keys(
                "new", f"site{i}", "--address", f"127.0.0.1:{port}", "--out", str(self.folder / f"keys{i}")
            )
            cards.append(str(self.folder / f"keys{i}" / f"site{i}.json"))
        self.run_keys("new", "operator", "--address", "127.0.0.1:1", "--out", str(self.folder / "keys"))
        self.cards = cards
        self.sign(1)
        for i in range(size):
            (self.folder / f"rows{i}.jsonl").write_text(
                "".join(
                    json.dumps({"instruction": f"say {word}", "output": word}) + "\n"
                    for word in (f"{i}{n:03d}" for n in range(40 + 10 * i))
                )
            )
            if i == 2:  # a row that has no answer within 64 tokens
                with (self.folder / "rows2.jsonl").open("a") as file:
                    file.write(json.dumps({"instruction": "2 " * 40, "output": "2"}) + "\n")

    def run_keys(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fedspeed", "keys", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sign(self, epoch: int, cards=None) -> None:
        self.run_keys(
            "roster",
            *(cards or self.cards),
            "--signer",
            str(self.folder / "keys" / "operator.key"),
            "--epoch",
            str(epoch),
            "--out",
            str(self.folder / "roster.json"),
        )

    def roster_of(self, i: int):
        """Return the site's own copy of the roster if it has one, else the shared roster."""
        own = self.folder / f"roster{i}.json"
        return own if own.exists() else self.folder / "roster.json"

    def config(self, i: int, **routing):
        path = self.folder / f"site{i}.yaml"
        path.write_text(
            yaml.safe_dump({
                "model": {
                    "base": str(self.workshop.folder / "model"),
                    "init": "random",
                    "dtype": "fp32",
                    "tokenizer": "bytes",
                },
                "adapter": {"lora_rank": 4},
                "data": {
                    "task": "file",
                    "path": str(self.folder / f"rows{i}.jsonl"),
                    "clients": 1,
                    "split": "iid",
                    "max_tokens": 64,
                    "template": "plain",
                    "val_fraction": 0.1,
                },
                "train": {"local_steps": 2, "micro_batch": 4, "lr": 3e-3},
                "federation": {"rounds": 4},
                "routing": {
                    "mode": "mix+mask",
                    "transport": "tls",
                    "identity": str(self.folder / f"keys{i}" / f"site{i}.key"),
                    "roster": str(self.roster_of(i)),
                    "roster_signer": str(self.folder / "keys" / "operator.json"),
                    **routing,
                },
                "cluster": {"local_ranks": 1, "start_timeout_s": 40, "max_restarts": 0},
                "run": {"name": f"site{i}", "out": str(self.folder / f"runs{i}")},
                "monitor": {"progress": False, "plot": False},
            })
        )
        return path

    def run(self, i: int):
        return self.folder / f"runs{i}" / f"site{i}"

    def until_a_round(self, started: list) -> None:
        """Wait until the first site has finished a round; on failure show the output of all sites."""
        try:
            started[0].until(lambda: rounds_seen(self.run(0)) >= 1)
        except AssertionError as error:
            raise AssertionError("\n".join(f"site{i}: {s.said()}" for i, s in enumerate(started))) from error

    def start_sites(self, *arguments: str, sites=None, env=None, launcher=(), **routing) -> list:
        return [
            self.workshop.start_run(*arguments, launcher=launcher, config=self.config(i, **routing), env=env)
            for i in (range(self.size) if sites is None else sites)
        ]
