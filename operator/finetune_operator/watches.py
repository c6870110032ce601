"""What the watches have delivered, compared with what the API server lists: a watch that died says nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from finetune_operator.cluster.port import FINE_TUNE_JOB, JOB, POD, Kind, Object

WATCHED = (FINE_TUNE_JOB, JOB, POD)
QUIET_SECONDS = 30.0
"""A watch that has delivered nothing for so long, while a LIST shows news, is dead."""
LATE_SECONDS = 300.0
"""A single change that is delivered later than that is lost, however lively the watch is otherwise. A LIST of
everything after a broken connection takes thousands of events, which are worked through within this time."""


@dataclass
class _Watch:
    heard: float
    versions: dict[str, str] = field(default_factory=dict)
    """uid -> newest resource version that came; what is deleted goes."""
    missing: dict[str, tuple[str, float]] = field(default_factory=dict)
    """uid -> version that a LIST showed and that did not come yet, and since when it is known."""
    gone: set[str] = field(default_factory=set)
    """uids whose deletion came, until a LIST no longer shows them: one that is under way still may."""


class Watches:
    """Kept per kind by uid, since a namesake is another object.

    Deletions that a watch has missed prove nothing: after a lost connection the server replays what exists, never what
    went. They are forgotten here and found by the LIST itself.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds = {kind.kind: _Watch(clock()) for kind in WATCHED}

    def delivered(self, kind: Kind, metadata: Mapping[str, str], deleted: bool) -> None:
        """A watch has told of an object."""
        watch, uid = self._kinds[kind.kind], metadata["uid"]
        watch.heard = self._clock()
        if deleted:
            watch.versions.pop(uid, None)
            watch.missing.pop(uid, None)
            watch.gone.add(uid)
            return
        version = watch.versions[uid] = metadata["resourceVersion"]
        if uid in watch.missing and not _is_newer(watch.missing[uid][0], version):
            del watch.missing[uid]

    def known(self, kind: Kind) -> frozenset[str]:
        """The uids of all objects that exist as far as the watch has told; taken before a LIST is asked for."""
        return frozenset(self._kinds[kind.kind].versions)

    def compare(self, kind: Kind, before: frozenset[str], listed: Iterable[Object]) -> None:
        """Note what a LIST shows and the watch has not delivered.

        Args:
            before: what `known` said before the LIST was asked for.
            listed: metadata of all objects, as the LIST has them.
        """
        watch, now = self._kinds[kind.kind], self._clock()
        seen = set()
        for metadata in listed:
            uid, version = metadata["uid"], metadata["resourceVersion"]
            seen.add(uid)
            if uid in watch.gone:
                continue
            if uid not in watch.versions or _is_newer(version, watch.versions[uid]):
                _, since = watch.missing.get(uid, ("", now))
                watch.missing[uid] = version, since
        for uid in before - seen:
            watch.versions.pop(uid, None)
        for uid in watch.missing.keys() - seen:
            del watch.missing[uid]
        watch.gone &= seen

    def age(self, kind: Kind) -> float:
        """Seconds since the watch has delivered anything."""
        return self._clock() - self._kinds[kind.kind].heard

    def lag(self, kind: Kind) -> float:
        """Seconds for which a LIST has known a change that the watch has not told of; 0 when nothing is missing."""
        since = [since for _, since in self._kinds[kind.kind].missing.values()]
        return self._clock() - min(since) if since else 0.0

    def dead(self) -> list[str]:
        """The kinds whose watch no longer works."""
        return [kind.kind for kind in WATCHED if self._is_dead(kind)]

    def _is_dead(self, kind: Kind) -> bool:
        return self.lag(kind) > (QUIET_SECONDS if self.age(kind) > QUIET_SECONDS else LATE_SECONDS)


def _is_newer(one: str, other: str) -> bool:
    """Whether the first resource version is newer. They are numbers (promised since Kubernetes 1.35); a server whose
    versions are not is taken to deliver in order."""
    if one.isdigit() and other.isdigit():
        return int(one) > int(other)
    return False
