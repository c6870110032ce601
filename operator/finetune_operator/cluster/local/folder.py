"""A pod's folder: its volumes, its log and its termination message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api import contract
from finetune_operator.cluster.kubelet import StartError
from finetune_operator.cluster.port import Key, Object
from finetune_operator.cluster.rules import key_of

ConfigMaps = Callable[[Key], Object | None]
LOG_TAIL_BYTES = 2048
"""What the kubelet takes of a log in place of a termination message."""


class PodFolder:
    """`<root>/<pod>`: `log`, `termination-log`, and below `volumes` what the container sees at its mounts."""

    def __init__(self, root: Path, pod: Object, claims: Path) -> None:
        self.path = root / str(pod["metadata"]["name"])
        self.log = self.path / "log"
        self.termination_log = self.path / "termination-log"
        self._volumes = self.path / "volumes"
        self._pod = pod
        self._claims = claims

    def make(self, config_maps: ConfigMaps) -> dict[str, Path]:
        """Make all volumes; returns mount path -> folder. Raises StartError for a source that is not known here."""
        self._volumes.mkdir(parents=True)
        self.termination_log.touch()
        sources = {volume["name"]: volume for volume in self._pod["spec"].get("volumes", [])}
        mounts = {}
        for mount in self._pod["spec"]["containers"][0].get("volumeMounts", []):
            folder = self._volume(sources[mount["name"]], config_maps)
            if folder is not None:
                mounts[mount["mountPath"]] = folder / mount.get("subPath", "")
        return mounts

    def variables(self, mounts: dict[str, Path]) -> dict[str, str]:
        """The variables that tell the trainer where its files are, since they cannot be where a container has them."""
        job_file = Path(contract.JOB_FILE)
        cache = mounts.get(contract.MODEL_CACHE_DIR)
        return {
            **({contract.ENV_MODEL_CACHE: str(cache)} if cache is not None else {}),
            contract.ENV_JOB_FILE: str(mounts[str(job_file.parent)] / job_file.name),
            contract.ENV_SCRATCH_DIR: str(mounts[contract.SCRATCH_DIR]),
            contract.ENV_TERMINATION_LOG: str(self.termination_log),
            contract.ENV_VOLUMES_DIR: str(self._claims),
        }

    def termination_message(self, failed: bool) -> str:
        """What the container left; where it failed without a word, the end of its log."""
        message = self.termination_log.read_bytes()[: contract.MAX_TERMINATION_BYTES]
        if not message and failed:
            message = self.log.read_bytes()[-LOG_TAIL_BYTES:]
        return message.decode(errors="replace")

    def remove_volumes(self) -> None:
        """As with a pod that has ended, only its log and last word stay."""
        shutil.rmtree(self._volumes, ignore_errors=True)

    def _volume(self, volume: dict[str, Any], config_maps: ConfigMaps) -> Path | None:
        if "persistentVolumeClaim" in volume:
            return self._claims / str(volume["persistentVolumeClaim"]["claimName"])
        if "hostPath" in volume:
            # What a node keeps is kept beside the claims.
            folder = self._claims.parent / "node" / str(volume["hostPath"]["path"]).lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            return None  # /dev/shm is this machine's own
        folder = self._volumes / str(volume["name"])
        folder.mkdir(exist_ok=True)
        if "configMap" in volume:
            self._write(folder, volume["configMap"], config_maps)
        elif "emptyDir" not in volume:
            raise StartError("CreateContainerConfigError", f"the volume {volume['name']} has no source known here")
        return folder

    def _write(self, folder: Path, source: dict[str, Any], config_maps: ConfigMaps) -> None:
        found = config_maps(Key(key_of(self._pod).namespace, source["name"]))
        if found is None:
            raise StartError(
                "CreateContainerConfigError",
                f"the ConfigMap {source['name']!r} does not exist on this machine",
            )
        data = found.get("data", {})
        for item in source.get("items") or [{"key": key, "path": key} for key in data]:
            (folder / item["path"]).write_text(data[item["key"]], encoding="utf-8")
