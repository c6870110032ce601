"""Settings of the operator: one frozen dataclass, read from FINETUNE_OPERATOR_* variables, overridden by flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ENV_PREFIX = "FINETUNE_OPERATOR_"
PULL_POLICIES = ("IfNotPresent", "Always", "Never")
LOG_FORMATS = ("text", "json")
BOOLEANS = {"true": True, "false": False}


class SettingsError(ValueError):
    """A setting that cannot work; the message names the variable and the flag."""


def _setting(default: Any, doc: str, low: float | None = None, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"doc": doc, "low": low, "choices": tuple(choices)})


@dataclass(frozen=True)
class Gate:
    """What the NetworkPolicies of jobs are made of; fields as in the JSON, rules as in a NetworkPolicy's spec."""

    operatorNamespace: str  # noqa: N815
    operatorLabels: dict[str, str]  # noqa: N815
    ingress: list[dict[str, Any]]
    egress: list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What an administrator can set. Each field's text gives its unit and why its default is what it is."""

    trainer_image: str = _setting(
        "finetune-trainer:latest",
        "Image of the trainer pods. The chart pins it to the operator's own release, since both share a contract.",
    )
    image_pull_policy: str = _setting(
        "IfNotPresent",
        "Pull policy of the trainer image: releases never change under their tag, so what a node has is good.",
        choices=PULL_POLICIES,
    )
    image_pull_secrets: tuple[str, ...] = _setting(
        (), "Comma-separated names of Secrets in the jobs' namespaces for pulling the trainer image."
    )
    network_policy: str = _setting(
        "",
        "What each job's NetworkPolicy is made of, as JSON with operatorNamespace, operatorLabels, ingress and egress; "
        "empty: jobs get none.",
    )
    cluster_domain: str = _setting(
        "cluster.local",
        "DNS domain of the cluster's services, as kubelets are configured; it ends the pods' full names.",
    )
    namespaces: tuple[str, ...] = _setting(
        (), "Comma-separated namespaces to watch; empty means all, which needs cluster-wide permissions."
    )
    lease: str = _setting(
        "",
        "Lease that replicas compete for, as `namespace/name`; only its holder works. Empty: no election, for one "
        "process alone.",
    )
    lease_seconds: int = _setting(
        12,
        "Seconds without a renewal after which another replica takes over; renewed six times in that time.",
        low=3,
    )
    workers: int = _setting(
        16, "Jobs reconciled at the same time. A pass waits for the API server nearly all of its time.", low=1
    )
    resync_seconds: float = _setting(
        300.0, "Seconds between two LISTs of all unfinished jobs, in case a watch lost something without a word.", low=1
    )
    backoff_base_seconds: float = _setting(
        0.5, "Seconds until a failed pass is tried again; doubles with every failure.", low=0.001
    )
    backoff_max_seconds: float = _setting(
        300.0, "Most seconds between two tries: a job that waits for quota notices it within this time.", low=0.001
    )
    progress_poll_seconds: float = _setting(10.0, "Seconds between two reads of one job's progress.", low=0.1)
    progress_reads_per_second: float = _setting(
        50.0,
        "Most progress reads a second over all jobs, so that thousands of jobs do not fill the operator's network.",
        low=0.1,
    )
    progress_write_seconds: float = _setting(
        30.0,
        "Least seconds between two status writes that change nothing but progress: each costs etcd a full object.",
        low=0,
    )
    drain_seconds: float = _setting(
        20.0,
        "Seconds that passes under way have to finish after SIGTERM; less than the pod's grace period, or it is killed "
        "before it gives up its Lease.",
        low=0,
    )
    infiniband_ipc_lock: bool = _setting(
        False,
        "Whether trainer pods with network preset InfiniBand run as root with the capability IPC_LOCK (true or false). "
        "Needed only where the container runtime limits locked memory; namespaces must allow privileged pods then.",
    )
    request_timeout_seconds: float = _setting(
        30.0, "Seconds after which an API request counts as failed; the API server itself gives up after 60.", low=1
    )
    http_port: int = _setting(8080, "Port of /metrics, /healthz and /readyz; 0 turns them off.", low=0)
    log_format: str = _setting("text", "Log lines as text for people or json for collectors.", choices=LOG_FORMATS)
    log_level: str = _setting("INFO", "Least level that is logged.", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check(item, getattr(self, item.name))
        if self.lease and len([part for part in self.lease.split("/") if part]) != 2:
            raise SettingsError(f"{_names('lease')}: {self.lease!r} is no namespace/name")
        try:
            self.gate()
        except (ValueError, TypeError) as error:
            raise SettingsError(f"{_names('network_policy')}: {error}") from error

    def gate(self) -> Gate | None:
        """Who may reach the pods of jobs, and what they may reach; None where nothing bounds it."""
        return Gate(**json.loads(self.network_policy)) if self.network_policy else None


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    low, choices = item.metadata["low"], item.metadata["choices"]
    if low is not None and value < low:
        raise SettingsError(f"{_names(item.name)}: {value} is too small, the least is {low}")
    if choices and value not in choices:
        raise SettingsError(f"{_names(item.name)}: {value!r} is unknown, use one of {', '.join(choices)}")


def _names(name: str) -> str:
    return f"{ENV_PREFIX}{name.upper()} or {_flag(name)}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse(item: dataclasses.Field[Any], text: str) -> Any:
    try:
        if isinstance(item.default, tuple):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if isinstance(item.default, bool):
            return BOOLEANS[text.lower()]
        parser: Callable[[str], Any] = type(item.default)
        return parser(text)
    except (ValueError, KeyError) as error:
        raise SettingsError(f"{_names(item.name)}: {text!r} is no {type(item.default).__name__}") from error


def load(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment, overridden by flags. Raises SettingsError; unknown flags end the process."""
    items = dataclasses.fields(Settings)
    parser = argparse.ArgumentParser(prog="finetune-operator", description="Runs FineTuneJobs on Kubernetes.")
    for item in items:
        parser.add_argument(_flag(item.name), metavar="VALUE", help=f"{item.metadata['doc']} [{item.default!r}]")
    flags = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    for item in items:
        flag, variable = flags[item.name], environ.get(ENV_PREFIX + item.name.upper())
        text = variable if flag is None else flag
        if text is not None:
            values[item.name] = _parse(item, text)
    return Settings(**values)
