"""Measure, simulate, and write the results of `scale`."""

import argparse
import json
import os
from typing import Any

from benchmarks.compare.results import ROOT, keep, save
from benchmarks.compare.scale import measured, report, simulated
from benchmarks.compare.scale.bounds import bound, fitted_member_s, measured_terms, simulated_terms
from fedspeed.planner import many_clients

MODES = ("plain", "mix+mask")


def run(arguments: argparse.Namespace) -> int:
    """Run the part; return the exit code. Each point is saved when it has been measured."""
    path = arguments.out / "scale.json"
    kept = json.loads(path.read_text())["measured"] if path.is_file() and not arguments.fresh else []
    wanted = [(n, mode, False) for n in arguments.clients for mode in MODES]
    refused = {}
    if reason := no_hosts(arguments.no_hosts):
        refused["hosts"] = reason
    else:
        wanted += [(measured.HOSTS_CLIENTS, mode, True) for mode in MODES]
    points = list(kept)
    for number, one in enumerate(wanted, 1):
        clients, mode, hosts = one
        if one in map(key, points):
            continue
        where = f"hosts of {measured.HOSTFILE}" if hosts else "processes"
        print(f"{number} of {len(wanted)}: {clients} clients, {mode}, {where} ...", flush=True)
        folder = ROOT / "runs" / "bench" / "scale"
        point = measured.measure(folder, clients, mode, hosts=hosts)
        points.append(point)
        print(
            f"  {point['seconds']:.1f} s a round, {point['cpu_exchange_s']:.3f} CPU-s of exchange a client, "
            f"{point['whole_s']:.0f} s in all",
            flush=True,
        )
        save(path, values(points, arguments.simulate, refused))
    save(path, values(points, arguments.simulate, refused))
    report.write(path)
    keep(path, arguments.keep)
    print(path.with_suffix(".md").read_text())
    return 0


def key(point: dict[str, Any]) -> tuple[int, str, bool]:
    """Return what makes a point the same as another one."""
    return point["clients"], point["mode"], point["kind"] == "hosts"


def no_hosts(left_out: bool) -> str:
    """Return why the hosts of scale16 are not measured; empty if they are."""
    from tests.lab.cluster import why_not

    return "left out by --no-hosts" if left_out else why_not() or ""


def values(points: list[dict], counts: tuple[int, ...], refused: dict[str, str]) -> dict[str, Any]:
    """Return everything that is known: measured points with their bounds, the formula at the same points, and
    simulated ones.
    """
    cores = os.cpu_count() or 1
    sizes = {point["update_bytes"] for point in points}
    own = points[0]["update_bytes"]
    real = sorted({point["clients"] for point in points})
    formula = simulated.same_update(own, (*real, *counts))
    by_key = {(f["clients"], f["mode"]): f for f in formula}
    found = []
    for point in points:
        predicted = by_key[point["clients"], point["mode"]]
        hosts = point["kind"] == "hosts"
        # Two clients share the link of most hosts.
        link = 2 * (point["link_bytes"] or 0.0) / simulated.LINK if hosts else 0.0
        terms = measured_terms(
            point["clients"],
            point["cpu_training_s"],
            point["cpu_exchange_s"],
            predicted["streams"],
            cores=cores,
            link=link,
        )
        name, share = bound(point["seconds"], terms)
        found.append(point | {"bound": name, "bound_share": share})
    masked = [
        (p["clients"], p["cpu_exchange_s"] - by_key[p["clients"], p["mode"]]["streams"])
        for p in points
        if p["mode"] != "plain"
    ]
    messages = many_clients.MESSAGES * many_clients.MESSAGE_S
    return {
        "update_bytes": sorted(sizes),
        "measured": found,
        "not_measured": refused,
        "formula": formula,
        "fitted_member_s": fitted_member_s(masked, messages) if masked else None,
        "member_s": many_clients.MEMBER_S,
        "simulated_model": simulated.MODEL,
        "simulated": [simulated_point(one) for one in simulated.reference(counts)],
    }


def simulated_point(one: dict[str, Any]) -> dict[str, Any]:
    """Return a simulated number of clients with what bounds its rounds."""
    messages = one["plain_cpu"]
    plain = simulated_terms(one["train"], one["plain_sent"] / simulated.LINK, 0.0, messages)
    masked = simulated_terms(one["train"], one["link"], one["streams"], one["members"])
    return one | {
        "plain_bound": bound(one["train"] + one["plain"], plain)[0],
        "masked_bound": bound(one["round"], masked)[0],
    }
