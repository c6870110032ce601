"""Every example runs in pods to its end, over small inputs of the same names.

The operator watches all namespaces here, so it runs with the chart's ClusterRole, as it does with its Role elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_api.contract import Result
from tests.e2e.bucket import Bucket, ClusterS3
from tests.e2e.cluster import Object, apply, get, kubectl
from tests.e2e.training import ONE_THREAD, READY_SECONDS, Installed, pods_of, release, succeed
from tests.support.examples import SMALL, check_delivery, documents, made_small, write_inputs

AT_ONCE = 4
"""Examples, so that a small node has room for their pods."""
WHOLE_SECONDS = 1500
FIRST = ("elastic.yaml", "image-classification/resnet-base.yaml", "image-classification/vit-base.yaml")
"""What takes many pods, and what others wait for."""
AFTER = {f"image-classification/{model}.yaml": f"image-classification/{model}-base.yaml" for model in ("resnet", "vit")}
"""Examples that read by its address what another one has delivered."""
pytestmark = pytest.mark.timeout(WHOLE_SECONDS + READY_SECONDS)


class Runs:
    """The examples on a cluster, some at a time."""

    def __init__(self, namespace: str, bucket: Bucket, pool: ThreadPoolExecutor) -> None:
        self.namespace = namespace
        self.bucket = bucket
        self._ends: dict[str, Future[list[Object]]] = {}
        for name in [*FIRST, *(name for name in SMALL if name not in FIRST)]:
            self._ends[name] = pool.submit(self._run, name)

    def statuses(self, name: str) -> list[Object]:
        """How the jobs of an example have ended, first to last."""
        return self._ends[name].result(WHOLE_SECONDS)

    def jobs(self, name: str) -> list[Object]:
        return [self._here(document) for document in documents(name)]

    def _here(self, document: Object) -> Object:
        """The same job in the test's namespace and bucket, and of a size that the test's nodes have."""
        job = made_small(document, self.bucket.url)
        job["metadata"]["namespace"] = self.namespace
        spec = job["spec"]
        spec["storage"] = self.bucket.s3.storage()
        spec["podTemplate"] = ONE_THREAD
        spec["resources"] = spec.get("resources", {}) | {"cpu": "100m", "memory": "2Gi", "scratch": "1Gi"}
        return job

    def _run(self, name: str) -> list[Object]:
        if name in AFTER:
            self.statuses(AFTER[name])
        jobs = self.jobs(name)
        apply(*jobs)
        return [succeed(self.namespace, job["metadata"]["name"]) for job in jobs]


@pytest.fixture(scope="module")
def everywhere() -> Iterator[Installed]:
    """A release with a ClusterRole."""
    with release(everywhere=True) as found:
        yield found


@pytest.fixture(scope="module")
def runs(everywhere: Installed, cluster_s3: ClusterS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    bucket = cluster_s3.fresh_bucket()
    bucket.upload(write_inputs(tmp_path_factory.mktemp("examples")))
    # Once, and not with each job: several at a time would be in each other's way.
    apply(cluster_s3.secret(everywhere.jobs))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            yield Runs(everywhere.jobs, bucket, pool)
        finally:
            # Of a test that was chosen alone, or was interrupted, the others are left.
            pool.shutdown(wait=False, cancel_futures=True)
            kubectl("-n", everywhere.jobs, "delete", "ftj", "--all", "--wait=true", seconds=120)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_trains_in_pods_and_delivers(runs: Runs, name: str, tmp_path: Path) -> None:
    for job, status in zip(runs.jobs(name), runs.statuses(name), strict=True):
        output = job["spec"]["output"]["uri"].removeprefix(runs.bucket.url + "/")
        folder = runs.bucket.download(f"{output}/", tmp_path / output)
        result = Result.model_validate_json((folder / "result.json").read_bytes())
        check_delivery(job, result, folder)
        assert (status["output"]["uri"], status["output"]["kind"]) == (result.output.uri, result.output.kind)
        assert status["progress"]["steps"] == f"{result.steps}/{result.steps}"
        assert (status["attempt"], status["restarts"]["total"]) == (1, 0)
        assert set(status["metrics"]) == set(status["baseline"])


def test_the_second_job_of_the_chain_begins_with_what_the_first_has_delivered(runs: Runs) -> None:
    first, second = runs.statuses("chain.yaml")
    assert second["references"] == {"spec.model.uri": first["output"]["uri"]}
    (pod,) = pods_of(runs.namespace, "chain-answers")
    assert first["completionTime"] <= pod["metadata"]["creationTimestamp"] <= second["completionTime"]
    resolved = get("configmap", "chain-answers-job", runs.namespace)["data"]["job.json"]
    assert first["output"]["uri"] in resolved
    adapter = runs.bucket.json("models/out/chain-answers/adapter/adapter_config.json")
    assert adapter["base_model_name_or_path"] == first["output"]["uri"]


def test_the_example_of_several_pods_trains_in_several(runs: Runs) -> None:
    runs.statuses("multi-node.yaml")
    assert len(pods_of(runs.namespace, "multi-node")) == 2
    assert runs.bucket.json("models/out/multi-node/result.json")["worldSize"] == 2


def test_the_elastic_example_trains_in_as_many_pods_as_it_has_been_given(runs: Runs) -> None:
    (status,) = runs.statuses("elastic.yaml")
    result = runs.bucket.json("models/out/elastic/result.json")
    assert 2 <= status["nodes"] == result["worldSize"] <= 4
    # Two rows, twice accumulated, of each of the four that it was written for.
    assert result["globalBatchSize"] == 16


def test_the_operator_was_refused_nothing(everywhere: Installed, runs: Runs) -> None:
    for name in SMALL:
        runs.statuses(name)
    assert everywhere.refusals() == []
