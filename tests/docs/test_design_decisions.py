"""The page of decisions tells of every ask that was found in other projects, and names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "design-decisions.md"
ISSUE = re.compile(r"\[([\w.-]+/[\w.-]+)#(\d+)\]\((https://github\.com/[^)]+)\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ASKED = """
kubeflow/trainer#2000
kubeflow/trainer#2269
kubeflow/trainer#2045
kubeflow/trainer#2044
kubeflow/trainer#1589
kubeflow/trainer#2200
kubeflow/trainer#1579
kubernetes-sigs/jobset#976 #1129
kubernetes-sigs/jobset#1117
kubeflow/trainer#2072
kubeflow/trainer#2185
kubernetes-sigs/jobset#576
kubeflow/pytorch-operator#359 #364
ray-project/kuberay#3860 #3903 #1489 #2161
ray-project/kuberay#4178
NVIDIA/cluster-readiness-engine#310
pytorch/pytorch#97191 flyteorg/flyte-sdk#698
kubeflow/trainer#2779 #2905 #3227
kubeflow/trainer#2713 #2725 #3019
kubeflow/trainer#3666 kubeflow/sdk#803
kubeflow/trainer#3671 #2351
kubeflow/trainer#1749
kubeflow/trainer#2899 #4052
kubeflow/trainer#2981 #3737 #3779
kubeflow/trainer#3994
kubeflow/trainer#4033
kubeflow/trainer#3358 #3419
kubeflow/trainer#3008
kubeflow/trainer#2245 #2101 #2438
Red-Hat-AI-Innovation-Team/training_hub#145
ray-project/kuberay#2155
kubeflow/trainer#3310
kubeflow/trainer#2618 #2715
kserve/kserve#1766 #1935 #1472
kubeflow/trainer#2903 #3654 kubernetes-sigs/jobset#463
kubeflow/trainer#3316 #3315
kubernetes-sigs/kueue#14811
kubernetes-sigs/kueue#10487
kubernetes-sigs/kueue#800 #7649 #1568 #1527
kubernetes-sigs/kueue#2732
kubeflow/trainer#2318
kubeflow/trainer#2361 #4031 #829 #830
kubeflow/trainer#1814
kubeflow/trainer#2341 #3120 #3345
kubeflow/trainer#2992
kubeflow/trainer#3650 #3655 NVIDIA/aicr#720
kubeflow/trainer#3429 #3430 #3803
kubeflow/kubeflow#6919 #4897 #1522
dask/dask-kubernetes#669 HolmesGPT/holmesgpt#2254
nolar/kopf#1276 #1145 #957 #955 #1094
nolar/kopf#1266 #734 #255
nolar/kopf#1087
nolar/kopf#698 #641
"""
"""One ask a line, in the page's order; a number without a project belongs to the one before."""


def rows() -> list[list[str]]:
    """Issue, what was asked for, what is done, proof."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def asked() -> list[list[str]]:
    found = []
    for line in ASKED.strip().splitlines():
        project, issues = "", []
        for word in line.split():
            project = word.split("#")[0] or project
            issues.append(f"{project}#{word.split('#')[1]}")
        found.append(issues)
    return found


@cache
def functions(file: str) -> set[str]:
    """Tests in a file; none where there is no file."""
    path = ROOT / file
    tree = ast.parse(path.read_text() if path.exists() else "")
    defined = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name for node in defined if node.name.startswith("test_")}


NAMED = sorted(set(TEST.findall(PAGE.read_text())))


def test_every_ask_has_its_row() -> None:
    told = [[f"{project}#{number}" for project, number, _ in ISSUE.findall(row[0])] for row in rows()]
    assert told == asked()


def test_every_row_is_whole_and_its_links_lead_to_its_issues() -> None:
    for row in rows():
        assert len(row) == 4, row[0]
        assert all(row), row[0]
        for project, number, link in ISSUE.findall(row[0]):
            assert link == f"https://github.com/{project}/issues/{number}"


def test_every_row_has_a_proof_or_says_why_not() -> None:
    reasons = ("not done", "not ours")
    assert [row[0] for row in rows() if not TEST.search(row[3]) and not row[3].startswith(reasons)] == []


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_test_that_is_named_exists(file: str, name: str) -> None:
    assert name in functions(file), f"{file} has no {name}: docs/design-decisions.md names it"


def test_a_test_that_names_an_issue_is_named_by_the_page() -> None:
    """Else nobody would find it by the number."""
    issue = re.compile(r"\b[\w.-]+/[\w.-]+#\d+")
    for path in ROOT.glob("tests/**/test_*.py"):
        file = str(path.relative_to(ROOT))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and issue.search(ast.get_docstring(node) or ""):
                assert (file, node.name) in NAMED
