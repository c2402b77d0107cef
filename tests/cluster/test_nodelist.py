"""The schedulers' notations for hosts."""

import pytest

from fedspeed.cluster.nodelist import count_lines, expand_counts, expand_hosts
from fedspeed.errors import HostfileError


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-3,07-09],gpu2", ["node1", "node2", "node3", "node07", "node08", "node09", "gpu2"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("a[008-010]", ["a008", "a009", "a010"]),
        ("rack[1-2]n[1,3]", ["rack1n1", "rack1n3", "rack2n1", "rack2n3"]),
        ("a[1-2].lab.org,b", ["a1.lab.org", "a2.lab.org", "b"]),
    ],
)
def test_slurm_lists_expand(nodelist, hosts):
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "a[1-", "a1]", "a[3-1]", "a[x]", "a[]"])
def test_other_text_is_refused(nodelist):
    with pytest.raises(HostfileError, match="--hostfile"):
        expand_hosts(nodelist)


def test_slurm_counts_expand():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(HostfileError, match="2x3"):
        expand_counts("2x3")


def test_a_pbs_node_file_counts_lines_in_order():
    assert count_lines("b\na\n\nb\n") == {"b": 2, "a": 1}
