"""What the agents of a gang tell each other while their workers run.

That they live, that their ranks make progress or have ended well, that one was asked to stop, and at last that index 0
has delivered.

A dead process breaks its connections at once. A dead node breaks none: without this its peers would wait in their
collectives, or for ranks that never come, until TCP or torch gives up, which takes from minutes to an hour.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from finetune_trainer.runtime import Pod

BEAT_SECONDS = 1.0
SILENT_SECONDS = 25.0
"""A pod that was not heard of for so long is dead: with the beat and the look at it, less than half a minute."""
FINAL_BEAT_SECONDS = 0.1
"""Of index 0 when it has delivered and only waits for the others to hear of it."""
BROKEN_SECONDS = 5.0
"""When the store is gone the workers, if they are in a collective, may say first what they saw."""
FAREWELL_SECONDS = 2.0
STORE_TIMEOUT = timedelta(seconds=20)


class Pulse:
    """A thread with a connection of its own: a call to a store whose host is gone may block for minutes.

    Args:
        address: of the store on index 0.

    Attributes:
        beats: how often the store has been spoken to.
        moves: how often a pod of the gang has told of progress.
        delivered: whether index 0 has.
        heard: how many of the others have heard of that; known to index 0 alone.
    """

    def __init__(self, pod: Pod, address: str, port: int) -> None:
        self._pod, self._address, self._port = pod, address, port
        self._asked = self._stopped = False
        self._done = self._over = False
        self.delivered = False
        self.beats = self.moves = self.heard = 0
        self._moved = False
        self._wake = threading.Event()
        self._silent = ""
        self._broken_at: float | None = None
        self._heard_at = time.monotonic()
        self._nodes = dict.fromkeys(range(pod.nodes), (0, self._heard_at))
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def tell_stop(self) -> None:
        """This pod was asked to stop: tell the others."""
        if not self._asked:
            self._asked = True
            self._wake.set()

    def tell_move(self) -> None:
        """A rank of this pod has made progress: the others hear of it with the next beat."""
        self._moved = True

    def tell_done(self) -> None:
        """The ranks of this pod have ended well: whether it lives is nothing that the others depend on any more."""
        self._done = True
        self._wake.set()

    def tell_delivered(self) -> None:
        """Index 0 has delivered: tell the others, for whom `delivered` is true when they have heard it."""
        self.delivered = True
        self._wake.set()

    @property
    def stopped(self) -> bool:
        """Whether a pod of the gang was asked to stop."""
        return self._stopped

    def lost(self) -> str | None:
        """Who is no longer there, in words; None while all are."""
        now = time.monotonic()
        if self._silent:
            return self._silent
        if self._broken_at is not None and now - self._broken_at > BROKEN_SECONDS:
            return "the pod with index 0 has ended"
        return _silence(0) if now - self._heard_at > SILENT_SECONDS else None

    def end(self) -> None:
        """Beat no more; what is to be told is told before this returns, if the store still hears it."""
        self._over = True
        self._wake.set()
        self._thread.join(FAREWELL_SECONDS)

    def _run(self) -> None:
        try:
            tcp = TCPStore(self._address, self._port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
            store = PrefixStore(f"pulse-{self._pod.attempt}", tcp)
            over = False
            while not over:
                over = self._over
                self._beat(store)
                self._wake.wait(FINAL_BEAT_SECONDS if self.delivered else BEAT_SECONDS)
                self._wake.clear()
        except RuntimeError:
            # torch's word for a connection that is gone; `lost` tells of it.
            self._broken_at = time.monotonic()

    def _beat(self, store: Store) -> None:
        store.add(f"beat/{self._pod.node_rank}", 1)
        moved, self._moved = self._moved, False
        self.moves = store.add("moves", int(moved))
        if self._asked:
            store.set("stop", "1")
        if self._done:
            store.set(f"done/{self._pod.node_rank}", "1")
        self._stopped = self._stopped or store.check(["stop"])
        if self._pod.node_rank == 0:
            self._look_around(store)
            self._say_delivered(store)
        elif not self.delivered and store.check(["delivered"]):
            self.delivered = True
            store.add("heard", 1)
        if store.check(["silent"]):
            self._silent = store.get("silent").decode()
        self._heard_at = time.monotonic()
        self.beats += 1

    def _look_around(self, store: Store) -> None:
        now = time.monotonic()
        for node, (known, since) in self._nodes.items():
            beats = store.add(f"beat/{node}", 0)
            if beats != known:
                self._nodes[node] = (beats, now)
            elif now - since > SILENT_SECONDS and not store.check([f"done/{node}"]):
                store.set("silent", _silence(node))

    def _say_delivered(self, store: Store) -> None:
        if self.delivered:
            store.set("delivered", "1")
            self.heard = store.add("heard", 0)


def _silence(node: int) -> str:
    return f"the pod with index {node} was not heard of for {SILENT_SECONDS:.0f} s"
