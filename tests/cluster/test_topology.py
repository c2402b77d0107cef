"""Laying clients on ranks: the rules by example, then what must hold for any hosts and clients."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.cluster.hostfile import Host, parse
from fedspeed.cluster.topology import place_clients, warnings
from fedspeed.errors import ConfigError


def hosts(*slots, clusters=None):
    return [
        Host(f"h{index}", count, (clusters or {}).get(index, "default")) for index, count in enumerate(slots)
    ]


def client_ranks(topology):
    return [client.ranks for client in topology.clients]


@pytest.mark.parametrize(
    ("slots", "clients", "setting", "expected"),
    [
        ((2, 2, 2), 3, "auto", [(0, 1), (2, 3), (4, 5)]),
        ((2, 3, 1), 2, "auto", [(0, 1), (2, 3, 4)]),
        ((2, 2), 3, "auto", [(0,), (1,), (2,)]),
        ((2, 2), 4, "auto", [(0,), (1,), (2,), (3,)]),
        ((8, 8), 4, "auto", [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]),
        ((4, 2), 3, "auto", [(0, 1), (2, 3), (4, 5)]),
        ((2, 2), 6, "auto", [(0,), (0,), (1,), (1,), (2,), (3,)]),
        ((1,), 3, "auto", [(0,), (0,), (0,)]),
        ((2,), 1, "auto", [(0, 1)]),
        ((2, 2), 2, 1, [(0,), (1,)]),
        ((2, 2), 4, 2, [(0, 1), (0, 1), (2, 3), (2, 3)]),
        ((2, 2), 5, 2, [(0, 1), (0, 1), (0, 1), (2, 3), (2, 3)]),
        ((1, 4), 2, 2, [(1, 2), (3, 4)]),
        ((2, 3), 1, 2, [(0, 1)]),
        ((2, 2, 2, 2, 2), 2, 4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ((2, 1, 3), 1, 4, [(2, 3, 4, 5)]),
        ((1, 1, 1, 1), 3, 2, [(0, 1), (0, 1), (2, 3)]),
    ],
)
def test_clients_take_ranks(slots, clients, setting, expected):
    assert client_ranks(place_clients(hosts(*slots), clients, setting)) == expected


def test_clusters_hold_only_working_ranks_and_keep_their_own_numbering():
    topology = place_clients(
        hosts(2, 2, 2, 2, clusters={0: "fast", 1: "slow", 2: "fast", 3: "slow"}), 3, "auto"
    )
    assert [(cluster.name, cluster.ranks, cluster.clients) for cluster in topology.clusters] == [
        ("fast", (0, 1, 4, 5), (0, 2)),
        ("slow", (2, 3), (1,)),
    ]
    assert topology.idle == (6, 7)
    assert (
        topology.placement(4).host,
        topology.placement(4).local_rank,
        topology.placement(4).cluster_rank,
    ) == ("h2", 0, 2)
    assert (
        topology.placement(6).cluster,
        topology.placement(6).cluster_rank,
        topology.placement(6).clients,
    ) == (None, None, ())
    assert topology.gateways == topology.participants == (0, 2, 4)
    assert topology.cluster_of("slow").ranks == (2, 3)


def with_server(*slots, at):
    return [replace(host, role="server") if index == at else host for index, host in enumerate(hosts(*slots))]


def test_a_server_carries_no_client_and_takes_part():
    topology = place_clients(with_server(2, 2, 2, at=1), 2, "auto", server=True)
    assert client_ranks(topology) == [(0, 1), (4, 5)] and topology.server == (2, 3) and topology.idle == ()
    assert (
        topology.participants == (0, 2, 4)
        and topology.contributors == (0, 4)
        and topology.workers == tuple(range(6))
    )
    assert topology.placement(3).cluster_rank == 1 and topology.cluster_of(
        topology.placement(3).cluster
    ).ranks == (2, 3)
    assert client_ranks(place_clients(with_server(8, 2, 2, at=0), 2, 2, server=True)) == [(8, 9), (10, 11)]
    assert client_ranks(place_clients(with_server(1, 1, 1, 1, at=1), 1, 2, server=True)) == [(2, 3)], (
        "a client does not span the server"
    )


def test_a_method_without_a_server_leaves_it_idle():
    topology = place_clients(with_server(2, 2, at=0), 2, "auto")
    assert (
        client_ranks(topology) == [(2,), (3,)] and topology.idle == (0, 1) and topology.participants == (2, 3)
    )
    assert warnings(topology) == [
        "h0 with 2 ranks has role=server, and federation.method has no server: it stays idle; write "
        "role=client "
        "in the hostfile to use it"
    ]


@pytest.mark.parametrize(
    ("machines", "says"),
    [(hosts(2), "role=server` in the hostfile"), (with_server(2, at=0), "name another one")],
)
def test_a_server_that_is_not_there_is_asked_for(machines, says):
    with pytest.raises(ConfigError, match=says):
        place_clients(machines, 1, "auto", server=True)


def test_a_client_over_hosts_stays_in_one_cluster():
    topology = place_clients(hosts(2, 2, 2, 2, clusters={0: "a", 1: "b", 2: "b", 3: "a"}), 1, 4)
    assert (
        topology.clients[0].ranks == (2, 3, 4, 5)
        and topology.clients[0].cluster == "b"
        and topology.idle == (0, 1, 6, 7)
    )
    with pytest.raises(ConfigError, match="no neighbours of one cluster have 4 together"):
        place_clients(hosts(2, 2, 2, clusters={1: "b"}), 1, 4)


def test_clients_that_share_a_rank_share_its_gateway():
    topology = place_clients(hosts(1, 1), 3, "auto")
    assert topology.gateways == (0, 0, 1)
    assert topology.participants == (0, 1)
    assert topology.placement(0).clients == (0, 1)


def test_sixteen_clients_use_the_3090s_first():
    text = "".join(f"n{index} slots=2\n" for index in range(10))
    text += "".join(f"# fed-host n{index} cluster={'fast' if index < 7 else 'slow'}\n" for index in range(10))
    topology = place_clients(parse(text, "hosts").hosts, 16, "auto")
    assert [(cluster.name, len(cluster.clients)) for cluster in topology.clusters] == [
        ("fast", 14),
        ("slow", 2),
    ]


@pytest.mark.parametrize(
    ("slots", "clients", "setting", "says"),
    [
        ((2,), 0, "auto", "data.clients=0"),
        ((), 1, "auto", "no host"),
        (
            (2, 4),
            1,
            5,
            "largest host (h1) has slots=4, and no neighbours of one cluster have 5 together; ask for at "
            "most 4 or",
        ),
        ((3,), 1, 2, "leaves 1 of the 3 slots of h0 unused; ask for 1 or 3, or write slots=2"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_a_remedy(slots, clients, setting, says):
    with pytest.raises(ConfigError) as caught:
        place_clients(hosts(*slots), clients, setting)
    assert says in str(caught.value)


def test_idle_capacity_is_told():
    assert warnings(place_clients(hosts(2, 2), 2, "auto")) == []
    (whole,) = warnings(place_clients(hosts(2, 2, 2), 1, "auto"))
    assert "2 hosts with 4 ranks idle (h1, h2)" in whole and "data.clients" in whole
    (part,) = warnings(place_clients(hosts(3), 2, "auto"))
    assert "world ranks 2" in part and "h0" in part


some_hosts = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=12
).map(lambda drawn: [Host(f"h{index}", slots, cluster) for index, (slots, cluster) in enumerate(drawn)])


@settings(max_examples=200, deadline=None)
@given(some_hosts, st.integers(1, 60), st.sampled_from(["auto", 1, 2, 3, 10]))
def test_nothing_is_lost_and_nothing_is_doubled(machines, clients, setting):
    try:
        topology = place_clients(machines, clients, setting)
    except ConfigError:
        assert setting != "auto", "auto always finds a plan"
        return
    host_of = [host for host in machines for _ in range(host.slots)]
    assert [place.world_rank for place in topology.ranks] == list(range(len(host_of)))
    assert [place.host for place in topology.ranks] == [host.name for host in host_of]

    assert [client.client for client in topology.clients] == list(range(clients))
    for client in topology.clients:
        assert client.gateway in client.ranks
        assert client.ranks == tuple(range(client.ranks[0], client.ranks[-1] + 1))
        over = [host_of[rank].name for rank in client.ranks]
        if len(set(over)) > 1:
            assert setting != "auto" and int(setting) > max(host.slots for host in machines)
            assert all(over.count(host.name) == host.slots for host in machines if host.name in over)
        assert all(client.client in topology.placement(rank).clients for rank in client.ranks)
        assert all(
            topology.placement(rank).cluster == client.cluster == host_of[rank].cluster
            for rank in client.ranks
        )
    for place in topology.ranks:
        sharing = {topology.clients[client].ranks for client in place.clients}
        assert len(sharing) <= 1, "clients that share a rank share all of them"

    working = {rank for client in topology.clients for rank in client.ranks}
    assert set(topology.idle) == set(range(len(host_of))) - working
    members = [rank for cluster in topology.clusters for rank in cluster.ranks]
    assert sorted(members) == sorted(working)
    for cluster in topology.clusters:
        assert [topology.placement(rank).cluster_rank for rank in cluster.ranks] == list(
            range(len(cluster.ranks))
        )
        assert list(cluster.ranks) == sorted(cluster.ranks)
    assert sorted(client for cluster in topology.clusters for client in cluster.clients) == list(
        range(clients)
    )

    loads = [len(topology.placement(gateway).clients) for gateway in topology.participants]
    assert max(loads) - min(loads) <= 1
    if setting == "auto" and clients <= len(host_of):
        assert max(loads) == 1, "every client has ranks of its own while there is one for each"
    if setting != "auto":
        assert {len(client.ranks) for client in topology.clients} == {int(setting)}
    assert bool(warnings(topology)) == bool(topology.idle)
