"""What a host has, and the way to another."""

import os
import socket
from pathlib import Path

import pytest

from sft_dist.affinity import cores_near, keep_near_gpu
from sft_dist.errors import ConfigError
from sft_dist.machine import Route, num_numa_nodes, require_free_port, route_to


def test_numa_nodes_are_counted_where_they_have_cores(tmp_path: Path) -> None:
    assert num_numa_nodes(tmp_path) == 1
    for node, cores in (("node0", "0-3\n"), ("node1", "4-7\n"), ("node2", "\n")):  # node2: memory only
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cores)
    assert num_numa_nodes(tmp_path) == 2


def test_the_route_names_the_interface_that_carries_the_address() -> None:
    assert route_to("127.0.0.1") == Route("lo", is_to_itself=True)
    assert route_to("localhost").interface == "lo"


def test_a_name_that_leads_nowhere_or_to_each_host_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"main host nowhere\.invalid: .*; give an address of host 0"):
        route_to("nowhere.invalid")
    loopback = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: loopback)  # as Debian's /etc/hosts has it
    with pytest.raises(
        ConfigError, match=r"main host node-0 is 127\.0\.1\.1 on this host, which no other host reaches"
    ):
        route_to("node-0")


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: .*; choose another one, the same on every host"):
            require_free_port(port)
    require_free_port(port)
    with pytest.raises(ConfigError, match="port 70000"):
        require_free_port(70000)


def fake_system(root: Path, *, node: int) -> Path:
    gpu = root / "bus/pci/devices/0000:3b:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text(f"{node}\n")
    (root / "devices/system/node/node1").mkdir(parents=True)
    (root / "devices/system/node/node1/cpulist").write_text("16-18,40\n")
    return root


def test_cores_beside_a_gpu(tmp_path: Path) -> None:
    system = fake_system(tmp_path / "two", node=1)
    assert cores_near("0000:3b:00.0", system=system) == {16, 17, 18, 40}
    assert cores_near("0000:5e:00.0", system=system) == set(), "no such device"
    assert cores_near("0000:3b:00.0", system=fake_system(tmp_path / "one", node=-1)) == set()


def test_affinity_is_left_alone_unless_it_is_asked_for(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    keep_near_gpu(0, environ={}, system=tmp_path)
    assert os.sched_getaffinity(0) == before
