"""Addresses of objects: s3://bucket/key, pvc://claim/path, file:///path and hf://org/name@revision/file. Pure.

Each is a name, a glob or a folder.

URIs are taken as written: nothing is percent-decoded, so a key is in the URI what it is in the bucket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from finetune_trainer.errors import UsageError

SCHEMES = ("s3", "pvc", "file", "hf")
GLOB_CHARACTERS = re.compile(r"[*?\[]")
GLOB_TOKENS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


@dataclass(frozen=True)
class Location:
    """A parsed URI: `bucket` is the bucket, the claim (empty for file), or the repository with its revision; `key` has
    no leading slash."""

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def at(self, key: str) -> Location:
        """Another key in the same bucket."""
        return replace(self, key=key)

    @property
    def is_folder(self) -> bool:
        return not self.key or self.key.endswith("/")

    @property
    def is_pattern(self) -> bool:
        return GLOB_CHARACTERS.search(self.key) is not None

    @property
    def fixed_prefix(self) -> str:
        """What every key that matches starts with."""
        found = GLOB_CHARACTERS.search(self.key)
        return self.key[: found.start()] if found else self.key

    @property
    def base(self) -> str:
        """The folder, with its slash, below which the names of matching objects are relative."""
        return self.fixed_prefix[: self.fixed_prefix.rfind("/") + 1]


def parse(uri: str) -> Location:
    """Split a URI.

    Raises:
        UsageError: another scheme, no bucket, or a path that climbs out of its volume.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in SCHEMES:
        raise UsageError(
            f"`{uri}` is not an address of stored data", "use s3://bucket/key, pvc://claim/path or file:///path"
        )
    if scheme == "hf":
        return _of_hub(uri, rest)
    bucket, _, key = rest.partition("/")
    if scheme == "file" and (bucket or not key):
        raise UsageError(f"`{uri}` has no absolute path", "write file:///path with three slashes")
    if scheme != "file" and not bucket:
        raise UsageError(f"`{uri}` names no {'bucket' if scheme == 's3' else 'claim'}", f"write {scheme}://name/path")
    if scheme != "s3" and ".." in key.split("/"):
        raise UsageError(f"`{uri}` climbs by `..`", "write the path without `..`")
    return Location(scheme, bucket, key)


def _of_hub(uri: str, rest: str) -> Location:
    owner, _, rest = rest.partition("/")
    name, _, key = rest.partition("/")
    if not owner or not name.partition("@")[0] or ".." in key.split("/"):
        raise UsageError(f"`{uri}` names no repository of the hub", "write hf://org/name or hf://org/name@revision")
    return Location("hf", f"{owner}/{name}", key)


def glob_regex(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one folder, `**` crosses folders, `[a-z]` and `[!a-z]` are sets of characters."""
    return re.compile("".join(_token_regex(token) for token in GLOB_TOKENS.findall(pattern)))


def _token_regex(token: str) -> str:
    fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if token in fixed:
        return fixed[token]
    if token.startswith("[") and len(token) > 1:
        negated = token.startswith("[!")
        inner = token[2 if negated else 1 : -1].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
        return f"[{'^' if negated else ''}{inner}]"
    return re.escape(token)


def relative_name(key: str, base: str, origin: str) -> str:
    """The path below the download folder for a key.

    Raises:
        UsageError: the key would land outside of the folder, or on no file name at all.
    """
    name = key[len(base) :]
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise UsageError(
            f"the object `{key}` under {origin} has no safe file name", "rename it without empty, `.` or `..` parts"
        )
    return name
