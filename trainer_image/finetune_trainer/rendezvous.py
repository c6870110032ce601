"""How the agents of a gang find each other: a TCP store on the pod with index 0, at a stable name.

torch's own static rendezvous waits inside C++, where SIGTERM is not heard, binds every address of the host, and lets
pods of different attempts meet. This one waits in Python and checks who it met.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from finetune_api.contract import RENDEZVOUS_PORT
from finetune_trainer.diagnosis import PeersLostError
from finetune_trainer.errors import UnavailableError
from finetune_trainer.runtime import Pod

CONNECT_SECONDS = 5.0
POLL_SECONDS = 0.2
STORE_TIMEOUT = timedelta(seconds=20)


class GangRendezvous(RendezvousHandler):
    """Static membership: `pod.nodes` agents of the same attempt, each node rank once.

    Args:
        pod: the pod's settings.
        patience: seconds to wait for all the others.
        watch: called while waiting; raises to give up.
    """

    def __init__(self, pod: Pod, patience: float, watch: Callable[[], None]) -> None:
        self._pod, self._patience, self._watch = pod, patience, watch

    def get_backend(self) -> str:
        return "static"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the gang; raises UnavailableError where it does not come together, PeersLostError where it is over."""
        pod = self._pod
        deadline = time.monotonic() + self._patience
        tcp, address, port = self._host() if pod.node_rank == 0 else self._join(deadline)
        store = PrefixStore(self.get_run_id(), tcp)
        if pod.nodes > 1:
            self._meet(tcp, store, deadline)
        return RendezvousInfo(store, pod.node_rank, pod.nodes, RendezvousStoreInfo(address, port))

    def _host(self) -> tuple[TCPStore, str, int]:
        """Listen on the pod's own address only; where no port was asked for and nobody else must know it, on any."""
        pod = self._pod
        wanted = pod.master_port or (RENDEZVOUS_PORT if pod.nodes > 1 else 0)
        family = socket.AF_INET6 if ":" in pod.address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((pod.address, wanted))
        except OSError as error:
            listener.close()
            raise UnavailableError(
                f"cannot listen on {pod.address}:{wanted}: {error.strerror}", _bind_advice(error)
            ) from error
        listener.listen(1024)
        port = listener.getsockname()[1]
        store = TCPStore(
            pod.address, port, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False, multi_tenant=True,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        store.set("attempt", str(pod.attempt))
        return store, pod.address, port

    def _join(self, deadline: float) -> tuple[TCPStore, str, int]:
        name, port = self._pod.master_addr, self._pod.master_port or RENDEZVOUS_PORT
        while True:
            address, failure = _reach(name, port)
            if address is not None:
                store = TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
                return store, address, port
            if time.monotonic() > deadline:
                message = (
                    f"the pod with index 0 was not found at {name}:{port} within {self._patience:.0f} s: {failure}"
                )
                raise UnavailableError(message, "look at that pod: is it scheduled, running, and of the same job?")
            self._pause()

    def _meet(self, tcp: TCPStore, store: Store, deadline: float) -> None:
        """Wait for the whole gang; a pod of another attempt, or a second one of the same index, must not take part."""
        pod = self._pod
        hosted = int(tcp.get("attempt"))
        if hosted != pod.attempt:
            raise PeersLostError(f"this pod belongs to attempt {pod.attempt}, but index 0 to attempt {hosted}")
        if store.add(f"node/{pod.node_rank}", 1) > 1:
            raise PeersLostError(f"the gang of attempt {pod.attempt} has already begun without this pod")
        store.add("joined", 1)
        print(f"waiting for the other pods of attempt {pod.attempt} ({pod.nodes} in all)", file=sys.stderr, flush=True)
        while (joined := store.add("joined", 0)) < pod.nodes:
            if time.monotonic() > deadline:
                message = f"only {joined} of {pod.nodes} pods came within {self._patience:.0f} s"
                raise UnavailableError(
                    message, "look at the other pods: are they scheduled, and is the queue a gang queue?"
                )
            self._pause()

    def _pause(self) -> None:
        self._watch()
        time.sleep(POLL_SECONDS)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """A gang of fixed size has nobody to close it to."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return f"attempt-{self._pod.attempt}"

    def shutdown(self) -> bool:
        return True


def _reach(name: str, port: int) -> tuple[str | None, str]:
    """The address at which a connection was taken, or None and why not. A pod's name is unknown until it runs."""
    try:
        address = str(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0])
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except socket.gaierror as error:
        return None, f"its name does not resolve ({error.strerror})"
    except OSError as error:
        return None, str(error.strerror or error)
    return address, ""


def _bind_advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process of this host uses the port; without hostNetwork a pod has all ports to itself"
    return "check that the address belongs to this pod"
