"""Whether pods will find each other."""

from __future__ import annotations

import ipaddress
import socket

from finetune_trainer.errors import UnavailableError

ALWAYS_THERE = "kubernetes.default.svc"
"""A service of every cluster, so a name that its DNS must know."""


def check_names(master_address: str) -> str:
    """Raise UnavailableError where the cluster has no DNS: ranks meet under the name of the pod with index 0.

    Args:
        master_address: that name, of a pod that is not there yet; an address needs no DNS.

    Returns:
        What was found, in words.
    """
    if _is_address(master_address):
        return "addresses are known"
    domain = master_address.partition(".svc.")[2]
    name = f"{ALWAYS_THERE}.{domain}" if domain else ALWAYS_THERE
    try:
        socket.getaddrinfo(name, 443)
    except socket.gaierror as error:
        raise UnavailableError(
            f"the cluster's DNS does not know {name} ({error.strerror}), and the pods of a job with several nodes find "
            "each other by name",
            "install cluster DNS (CoreDNS), or correct the operator's cluster domain; resources.nodes 1 needs none",
        ) from error
    return "names are resolved"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
