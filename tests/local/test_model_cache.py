"""A job's model cache on this machine: kept beside the claims, over pods and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.operator.world import typed

from finetune_api.contract import ENV_MODEL_CACHE
from finetune_operator.cluster.local.folder import PodFolder
from finetune_operator.plan import plan
from finetune_operator.settings import Settings


@pytest.mark.parametrize(
    ("cache", "place"),
    [({"pvc": "models"}, "volumes/models"), ({"hostPath": "/var/cache/finetune"}, "node/var/cache/finetune")],
)
def test_the_cache_of_a_pod_outlives_it(tmp_path: Path, cache: dict[str, str], place: str) -> None:
    job = typed(model={"uri": "s3://models/smol", "cache": cache})
    manifests = plan(job, Settings())
    template = manifests.workload["spec"]["template"]
    pod = {"metadata": {"name": "tune-0", "namespace": "ml", **template["metadata"]}, "spec": template["spec"]}
    folder = PodFolder(tmp_path / "pods", pod, tmp_path / "volumes")
    variables = folder.variables(folder.make(lambda key: manifests.config_map))
    kept = tmp_path / place
    assert variables[ENV_MODEL_CACHE] == str(kept)
    kept.mkdir(parents=True, exist_ok=True)
    folder.remove_volumes()
    assert kept.is_dir()
