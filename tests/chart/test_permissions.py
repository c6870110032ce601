"""Permissions: exactly what one reconcile needs, in the namespaces that are watched and nowhere else.

That it is exactly what running operators ask for is tested with them, in tests/operator/test_process.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.chart.rendering import NAMESPACE, Object, environment, of_kind

NEEDED = {
    ("finetune.dev", "finetunejobs"): {"get", "list", "watch", "delete"},
    ("finetune.dev", "finetunejobs/status"): {"patch"},
    ("batch", "jobs"): {"get", "list", "watch", "create", "patch", "delete"},
    ("batch", "jobs/status"): {"patch"},
    ("", "configmaps"): {"get", "create", "patch"},
    ("", "services"): {"get", "create"},
    ("networking.k8s.io", "networkpolicies"): {"get", "create"},
    ("", "pods"): {"list", "watch", "delete"},
    ("", "pods/status"): {"patch"},
    ("", "events"): {"list", "create", "patch"},
}
NAMESPACED: Object = {"watch": {"namespaces": ["ml", "vision"]}}
NO_USER_ROLES: Object = {"rbac": {"aggregate": False}}


ROLES = re.compile(r"namespaced Roles: (.+?); one lease;")
RULE = re.compile(r"([a-z]+)(?: and ([a-z]+))? ((?:[a-z]+, )*[a-z]+)( and their status patch)?")


def granted(role: Object) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for rule in role["rules"]:
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                assert (group, resource) not in found
                found[group, resource] = set(rule["verbs"])
    return found


def assert_binds(binding: Object, role: Object) -> None:
    assert binding["roleRef"]["kind"] == role["kind"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (account,) = of_kind("ServiceAccount")
    subject: Any = {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": NAMESPACE}
    assert binding["subjects"] == [subject]


def test_cluster_wide_the_operator_gets_exactly_the_verbs_it_uses() -> None:
    (role,) = of_kind("ClusterRole", NO_USER_ROLES)
    (binding,) = of_kind("ClusterRoleBinding")
    assert granted(role) == NEEDED
    assert_binds(binding, role)
    assert [role["metadata"]["namespace"] for role in of_kind("Role")] == [NAMESPACE]


def test_the_documentation_names_every_verb() -> None:
    documents = Path(__file__).parents[2] / "docs"
    (rules,) = ROLES.findall((documents / "architecture.md").read_text())
    named: dict[str, set[str]] = {}
    for rule in re.sub(r" \(.*?\)", "", rules).split("; "):
        matched = RULE.fullmatch(rule)
        assert matched is not None, rule
        one, other, verbs, status = matched.groups()
        named |= {resource: set(verbs.split(", ")) for resource in (one, other) if resource}
        named |= {f"{one}/status": {"patch"}} if status else {}
    assert named == {resource: verbs for (_, resource), verbs in NEEDED.items()}
    assert "delete those whose `ttlSecondsAfterFinished` is over" in (documents / "operations.md").read_text()


def election_apart(kind: str, values: Object) -> list[Object]:
    return [role for role in of_kind(kind, values) if not role["metadata"]["name"].endswith("-election")]


def test_the_election_takes_one_lease_beside_the_operator() -> None:
    role = next(role for role in of_kind("Role", NAMESPACED) if role["metadata"]["name"].endswith("-election"))
    assert role["metadata"]["namespace"] == NAMESPACE
    create, one = role["rules"]
    assert create == {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]}
    namespace, name = environment()["FINETUNE_OPERATOR_LEASE"].split("/")
    assert (namespace, one["resourceNames"], one["verbs"]) == (NAMESPACE, [name], ["get", "patch"])
    binding = next(o for o in of_kind("RoleBinding") if o["metadata"]["name"] == role["metadata"]["name"])
    assert_binds(binding, role)


def test_without_network_policies_nothing_is_asked_of_them() -> None:
    (role,) = of_kind("ClusterRole", {**NO_USER_ROLES, "networkPolicies": {"enabled": False}})
    assert ("networking.k8s.io", "networkpolicies") not in granted(role)


def test_namespaced_the_operator_gets_them_in_each_namespace_and_nothing_beyond() -> None:
    roles, bindings = election_apart("Role", NAMESPACED), election_apart("RoleBinding", NAMESPACED)
    assert [role["metadata"]["namespace"] for role in roles] == ["ml", "vision"]
    assert [binding["metadata"]["namespace"] for binding in bindings] == ["ml", "vision"]
    for role, binding in zip(roles, bindings, strict=True):
        assert granted(role) == NEEDED
        assert_binds(binding, role)
    assert not of_kind("ClusterRoleBinding", NAMESPACED)
    assert not of_kind("ClusterRole", {**NAMESPACED, **NO_USER_ROLES})


def test_nothing_is_said_in_wildcards() -> None:
    for role in [*of_kind("ClusterRole"), *of_kind("Role", NAMESPACED)]:
        assert "*" not in str(role["rules"])


def test_the_roles_for_people_add_up_to_the_jobs_alone() -> None:
    view, edit = (
        next(role for role in of_kind("ClusterRole") if role["metadata"]["name"].endswith(f"-{name}"))
        for name in ("view", "edit")
    )
    assert granted(view) == {("finetune.dev", "finetunejobs"): {"get", "list", "watch"}}
    assert granted(edit) == {
        ("finetune.dev", "finetunejobs"): {"create", "update", "patch", "delete", "deletecollection"}
    }
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in edit["metadata"]["labels"]


def test_permissions_can_be_left_to_the_administrator() -> None:
    assert not of_kind("ClusterRoleBinding", {"rbac": {"create": False}})
    assert not of_kind("RoleBinding", {**NAMESPACED, "rbac": {"create": False}})
