"""The hostfile grammar: what is read, what is refused, and that every refusal names file, line, value and
remedy.
"""

import re
from pathlib import Path

import pytest

from fedspeed.cluster.hostfile import ClusterFacts, Host, parse, read
from fedspeed.errors import HostfileError

ROOT = Path(__file__).parents[2]

GOOD = """\
# the department's servers
node1 slots=2   # front row: key=value may stand in a comment
  node2.lab slots=1

# fed-cluster fast gpu=RTX-3090 gpu_mem_gib=24 ram_gib=64 link_gbps=10 trust=shared
# fed-host node1 cluster=fast nvme=/local/nvme ram_gib=128
# federated learning is what this file is for
"""


def problems_of(text):
    with pytest.raises(HostfileError) as caught:
        parse(text, "hosts")
    return str(caught.value)


def test_hosts_keep_file_order_and_take_cluster_defaults_below_their_own_facts():
    file = parse(GOOD, "hosts")
    assert file.hosts == (
        Host(
            "node1",
            2,
            "fast",
            gpu="RTX-3090",
            gpu_mem_gib=24.0,
            ram_gib=128.0,
            nvme="/local/nvme",
            link_gbps=10.0,
            line=2,
        ),
        Host("node2.lab", 1, "default", line=3),
    )
    assert file.clusters == (
        ClusterFacts(
            "fast", "shared", "RTX-3090", gpu_mem_gib=24.0, ram_gib=64.0, nvme=None, link_gbps=10.0, line=5
        ),
    )
    assert file.slots == 3


def test_trust_is_separate_unless_declared():
    file = parse(GOOD, "hosts")
    assert (file.cluster("fast").trust, file.cluster("default").trust) == ("shared", "separate")


def test_facts_may_stand_before_their_hosts():
    assert parse("# fed-host a gpu=X\na slots=1\n", "hosts").hosts[0].gpu == "X"


@pytest.mark.parametrize(
    ("text", "place", "value", "remedy"),
    [
        ("a slots=1\na slots=2\n", "hosts:2", "a is named twice (line 1)", "keep one line"),
        ("a slots=0\n", "hosts:1", "slots=0", "delete the line"),
        ("a slots=-2\n", "hosts:1", "slots=-2", "number of ranks"),
        ("a slots=+2\n", "hosts:1", "slots=+2", "write slots=2"),
        ("a slots=two\n", "hosts:1", "`two`", "write `a slots=N`"),
        ("a slots=\n", "hosts:1", "slots=``", "write `a slots=N`"),
        ("a slots=2x\n", "hosts:1", "`2x`", "write `a slots=N`"),
        ("a slots=\N{ARABIC-INDIC DIGIT TWO}\n", "hosts:1", "not a whole number", "write `a slots=N`"),
        ("a\n", "hosts:1", "nothing", "write `a slots=N`"),
        ("a slots = 2\n", "hosts:1", "`slots = 2`", "write `a slots=N`"),
        ("a gpu=X slots=2\n", "hosts:1", "`gpu=X slots=2`", "write `a slots=N`"),
        ("a slots=2 gpu=X\n", "hosts:1", "`gpu=X`", "# fed-host a key=value"),
        ("a slots=2 # fed-host a gpu=X\n", "hosts:1", "stands behind a host", "line of their own"),
        ("a/b slots=2\n", "hosts:1", "`a/b`", "letters, digits"),
        ("a slots=1\r\n", "hosts:1", "carriage return", "Unix line ends"),
        ("a slots=1\n# fed-host a gpuu=X\n", "hosts:2", "`gpuu`", "did you mean `gpu`?"),
        ("a slots=1\n# fed-host a price=9\n", "hosts:2", "`price`", "known are cluster, role, gpu"),
        ("a slots=1\n# fed-host a trust=shared\n", "hosts:2", "`trust`", "fact of a `# fed-cluster` line"),
        ("a slots=1\n# fed-host a gpu=\n", "hosts:2", "`gpu=`", "key=value"),
        ("a slots=1\n# fed-host a gpu = X\n", "hosts:2", "`gpu = X`", "no blanks"),
        ("a slots=1\n# fed-host a gpu=X gpu=Y\n", "hosts:2", "`gpu`", "keep one"),
        ("a slots=1\n# fed-host a\n", "hosts:2", "states no fact", "add key=value"),
        ("a slots=1\n# fed-host\n", "hosts:2", "lacks the name", "# fed-host NAME"),
        ("node1 slots=1\n# fed-host node2 gpu=X\n", "hosts:2", "host node2", "did you mean node1?"),
        ("a slots=1\n# fed-host zzz gpu=X\n", "hosts:2", "host zzz", "add `zzz slots=N`"),
        (
            "a slots=1\n# fed-host a gpu=X\n# fed-host a ram_gib=1\n",
            "hosts:3",
            "host a are given twice (line 2)",
            "merge",
        ),
        (
            "a slots=1\n# fed-host a cluster=c\n# fed-cluster c gpu=X\n# fed-cluster c gpu=X\n",
            "hosts:4",
            "given twice (line 3)",
            "merge",
        ),
        (
            "a slots=1\n# fed-host a cluster=c gpu=X\n# fed-cluster c gpu=Y\n",
            "hosts:2",
            "gpu=X of host a contradicts gpu=Y",
            "another cluster",
        ),
        ("a slots=1\n# fed-cluster c gpu=X\n", "hosts:2", "cluster c", "# fed-host NAME cluster=c"),
        (
            "a slots=1\n# fed-host a cluster=fast\n# fed-cluster fats gpu=X\n",
            "hosts:3",
            "cluster fats",
            "did you mean fast?",
        ),
        ("a slots=1\n# fed-host a ram_gib=64GB\n", "hosts:2", "ram_gib=`64GB`", "without a unit"),
        ("a slots=1\n# fed-host a link_gbps=0\n", "hosts:2", "link_gbps=`0`", "above 0"),
        ("a slots=1\n# fed-host a link_gbps=inf\n", "hosts:2", "link_gbps=`inf`", "above 0"),
        ("a slots=1\n# fed-host a nvme=scratch\n", "hosts:2", "nvme=`scratch`", "absolute path"),
        (
            "a slots=1\n# fed-cluster default trust=maybe\n",
            "hosts:2",
            "trust=`maybe`",
            "`separate` or `shared`",
        ),
        ("a slots=1\n# fed-host a role=boss\n", "hosts:2", "role=`boss`", "`client` or `server`"),
        (
            "a slots=1\nb slots=1\n# fed-host a role=server\n# fed-host b role=server\n",
            "hosts:4",
            "role=server of b",
            "a federation has one",
        ),
        ("a slots=1\n#fed-host a gpu=X\n", "hosts:2", "`#fed-host`", "# fed-host NAME"),
        ("a slots=1\n## fed-host a gpu=X\n", "hosts:2", "`## fed-host`", "# fed-host NAME"),
        ("a slots=1\n# Fed-Host a gpu=X\n", "hosts:2", "`# Fed-Host`", "# fed-host NAME"),
        ("a slots=1\n# fed_host a gpu=X\n", "hosts:2", "`# fed_host`", "# fed-host NAME"),
        ("a slots=1\n# fed-hosts a gpu=X\n", "hosts:2", "`# fed-hosts`", "# fed-host NAME"),
        ("a slots=1\n# fedcluster: c gpu=X\n", "hosts:2", "`# fedcluster:`", "# fed-cluster NAME"),
        ("", "hosts", "names no host", "NAME slots=N"),
        ("\n# only a comment\n", "hosts", "names no host", "NAME slots=N"),
    ],
)
def test_a_mistake_is_refused_with_place_value_and_remedy(text, place, value, remedy):
    message = problems_of(text)
    assert message.startswith(f"{place}:"), message
    assert value in message
    assert remedy in message
    assert len(message.splitlines()) == 1, "one mistake, one message"


def test_all_mistakes_come_in_one_message_in_file_order():
    message = problems_of("a slots=0\nb\n# fed-host c gpu=X\n#fed-host d gpu=X\n")
    assert message.startswith("4 problems")
    assert re.findall(r"hosts:(\d)", message) == ["1", "2", "3", "4"]


def test_a_broken_host_line_is_one_mistake_and_not_a_second_one_in_its_facts():
    message = problems_of("a slots=x\n# fed-host a cluster=c\n# fed-cluster c gpu=X\n")
    assert len(message.splitlines()) == 1 and "`x`" in message


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such hostfile"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00a"), "not a text file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, make, says):
    path = tmp_path / "hosts"
    make(path)
    with pytest.raises(HostfileError, match=says) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_windows_line_ends_are_seen_in_a_file(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"a slots=1\r\n")
    with pytest.raises(HostfileError, match="carriage return"):
        read(path)


def test_a_byte_order_mark_belongs_to_no_name(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"\xef\xbb\xbfa slots=1\n")
    assert [host.name for host in read(path).hosts] == ["a"]


@pytest.mark.parametrize("slots", ["1025", "999999999", "9" * 5000])
def test_more_slots_than_a_host_can_have(slots):
    message = problems_of(f"a slots={slots}\n")
    assert "more than one host has" in message and "at most 1024" in message and len(message) < 300
    assert parse("a slots=1024\n", "hosts").slots == 1024


@pytest.mark.parametrize(
    ("name", "hosts", "slots", "gpus"),
    [
        ("hetero10", 10, 20, {"RTX-3090": (24.0, 14), "RTX-2080-Ti": (11.0, 6)}),
        ("scale16", 9, 16, {"RTX-3090": (24.0, 14), "RTX-2080-Ti": (11.0, 2)}),
        ("local", 1, 2, {None: (None, 2)}),
    ],
)
def test_the_hostfiles_we_ship(name, hosts, slots, gpus):
    file = read(ROOT / "hostfiles" / name)
    assert (len(file.hosts), file.slots) == (hosts, slots)
    found = {}
    for host in file.hosts:
        found[host.gpu] = (host.gpu_mem_gib, found.get(host.gpu, (None, 0))[1] + host.slots)
    assert found == gpus
    assert all(host.link_gbps == 10.0 for host in file.hosts) or name == "local"
    assert file.hosts[0].gpu != "RTX-2080-Ti", "the faster hosts stand first"


def test_the_example_in_the_documentation_is_valid():
    text = (ROOT / "docs" / "hostfile.md").read_text(encoding="utf-8")
    example = re.search(r"```hostfile\n(.*?)```", text, re.DOTALL)
    file = parse(example[1], "docs/hostfile.md")
    assert len(file.hosts) >= 3 and len(file.clusters) >= 2
