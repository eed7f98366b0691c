"""Two hosts on one machine: network namespaces that see each other through a pair of virtual interfaces only.

They vanish with the processes in them.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

ADDRESSES = "10.77.0.1", "10.77.0.2"
# Inside of the first host: makes the second one, connects both, and runs a command in each. Both have one name, from
# which torchrun cannot tell where the rendezvous is.
_SCRIPT = """
set -e
ip link set lo up
unshare --net sleep 600 & second=$!
trap 'kill $second $other 2> /dev/null' EXIT
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add veth0 type veth peer name veth1 netns $second
ip addr add 10.77.0.1/24 dev veth0
ip link set veth0 up
in_second="nsenter --target $second --net"
$in_second ip link set lo up
$in_second ip addr add 10.77.0.2/24 dev veth1
$in_second ip link set veth1 up
GLOO_SOCKET_IFNAME=veth1 $in_second "$@" --local-addr=10.77.0.2 --rdzv-conf=is_host=0 $SCRIPT & other=$!
GLOO_SOCKET_IFNAME=veth0 "$@" --local-addr=10.77.0.1 --rdzv-conf=is_host=1 $SCRIPT
wait $other
"""


def on_two_hosts(command: Sequence[str], script: Sequence[str]) -> None:
    """Run torchrun, ``command``, with a script on two hosts; skip where no namespaces can be made.

    Raises:
        AssertionError: one of the runs failed.
    """
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
        pytest.skip(f"two hosts need {', '.join(missing)}")
    tried = subprocess.run(
        [*inside, "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        pytest.skip(f"this process may make no network namespace: {tried.stderr.strip()}")
    found = subprocess.run(
        [*inside, "bash", "-c", _SCRIPT, "bash", *command],
        env=os.environ | {"SCRIPT": " ".join(script)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
