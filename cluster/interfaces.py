"""The network interface that gloo is to use: that of the node's address in the cluster.

Left to itself gloo asks what the host's name resolves to, which may be 127.0.1.1: the others then call themselves.
"""

from __future__ import annotations

import os
import socket

import psutil


def tell_gloo(host: str) -> None:
    """Nothing; process groups of this process use the interface with this address, unless the environment names one."""
    if interface := _interface_of(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface_of(host: str) -> str | None:
    """The network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(
            address.family in (socket.AF_INET, socket.AF_INET6) and address.address == host for address in addresses
        ):
            return name
    return None
