"""Which GPU a rank takes, and which ranks may share one."""

import re

import pytest

from fedspeed.cluster import local_ranks
from fedspeed.cluster.gpus import Gpu, check_gpus, device_index, gpus_of_ranks
from fedspeed.cluster.hostfile import read
from fedspeed.cluster.topology import place_clients
from fedspeed.errors import ConfigError
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("local_rank", "seen", "index"), [(0, 1, 0), (3, 1, 0), (1, 2, 1), (3, 2, 1), (2, 4, 2), (5, 0, 0)]
)
def test_a_rank_takes_a_device_that_it_sees(local_rank, seen, index):
    """A launcher that shows each rank one device calls them all 0."""
    assert device_index(local_rank, seen) == index


def test_two_ranks_of_a_world_share_no_card():
    with pytest.raises(ConfigError) as refused:
        check_gpus({"cluster fast": (0, 1, 2)}, gpus_of_ranks(3, 2, "alpha"))
    assert (
        "host alpha: ranks 0 and 2 of cluster fast would compute on one GPU (GPU 0; a rank there sees 2 GPUs)"
        in str(refused.value)
    )
    assert "cluster.local_ranks=2" in str(refused.value) and "docs/gpu.md" in str(refused.value)


def test_ranks_of_different_worlds_may_share_a_card_which_is_said():
    worlds = {f"cluster {name}": (rank,) for rank, name in enumerate("abc")}
    [note] = check_gpus(worlds, gpus_of_ranks(3, 1, "alpha"))
    assert "ranks 0, 1 and 2 share GPU 0 of alpha" in note
    two = check_gpus({"client 0": (0, 1), "client 1": (2, 3)}, gpus_of_ranks(4, 2, "alpha"))
    assert [note.partition(":")[0] for note in two] == [
        "ranks 0 and 2 share GPU 0 of alpha",
        "ranks 1 and 3 share GPU 1 of alpha",
    ]


def test_ranks_with_a_card_each_are_not_spoken_of():
    """Nor are ranks that compute on the CPU, and those that carry no client."""
    assert check_gpus({"cluster default": (0, 1)}, gpus_of_ranks(2, 2, "alpha")) == []
    assert check_gpus({"cluster default": (0, 1)}, {}) == []
    assert check_gpus({"cluster default": (0,)}, gpus_of_ranks(2, 1, "alpha")) == []


def test_a_card_is_known_by_its_name_whatever_else_is_told_of_it():
    """A launcher may show two ranks of a machine the same GPU, or each another one under the same number."""
    same = {0: Gpu("GPU-1", "alpha", 1), 1: Gpu("GPU-1", "alias", 1)}
    with pytest.raises(ConfigError, match="ranks 0 and 1 of cluster default would compute on one GPU"):
        check_gpus({"cluster default": (0, 1)}, same)
    assert check_gpus({"cluster default": (0, 1)}, {0: Gpu("GPU-1", "alpha"), 1: Gpu("GPU-2", "alpha")}) == []


def test_the_page_shows_how_three_participants_share_a_card(tmp_path):
    [text] = re.findall(r"```hostfile\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)
    (tmp_path / "hosts").write_text(text)
    topology = place_clients(read(tmp_path / "hosts").hosts, 3, "auto")
    assert len(topology.participants) == 3
    [note] = check_gpus(topology.worlds("none"), gpus_of_ranks(3, 1, "here"))
    assert note.startswith("ranks 0, 1 and 2 share GPU 0 of here")


def test_a_world_is_a_cluster_or_a_client_that_is_a_pipeline():
    topology = place_clients(read(ROOT / "hostfiles" / "local").hosts, 2, 1)
    assert list(topology.worlds("client")) == ["client 0", "client 1"]
    assert all(name.startswith("cluster ") for name in topology.worlds("cluster"))


def test_cores_are_crowded_only_where_ranks_compute_on_them(monkeypatch):
    monkeypatch.setattr(local_ranks, "usable_cores", lambda: 2)
    monkeypatch.setattr(local_ranks, "computing_gpus", lambda env: 0)
    assert local_ranks.oversubscription_notes(2) == [] and local_ranks.oversubscription_notes(3)[
        0
    ].startswith("3 ranks on 2 cores: they take turns")
    monkeypatch.setattr(local_ranks, "computing_gpus", lambda env: 1)
    assert local_ranks.oversubscription_notes(3) == []
