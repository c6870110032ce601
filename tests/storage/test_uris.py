from __future__ import annotations

import pytest

from finetune_trainer.errors import UsageError
from finetune_trainer.storage.uris import Location, glob_regex, parse, relative_name


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("s3://bucket/dir/file.txt", Location("s3", "bucket", "dir/file.txt")),
        ("s3://bucket", Location("s3", "bucket", "")),
        ("s3://bucket/a b%20c+ü", Location("s3", "bucket", "a b%20c+ü")),
        ("pvc://claim/dir/file", Location("pvc", "claim", "dir/file")),
        ("file:///data/x", Location("file", "", "data/x")),
        ("hf://org/name@v1/dir/x", Location("hf", "org/name@v1", "dir/x")),
    ],
)
def test_a_uri_is_taken_as_written(uri: str, location: Location) -> None:
    assert parse(uri) == location


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("/data/x", "not an address"),
        ("hf://org", "names no repository"),
        ("hf://org/@main/x", "names no repository"),
        ("hub://org/name", "not an address"),
        ("s3:///key", "names no bucket"),
        ("pvc:///key", "names no claim"),
        ("file://host/x", "no absolute path"),
        ("pvc://claim/../../etc/passwd", "climbs"),
        ("file:///data/../etc", "climbs"),
    ],
)
def test_a_wrong_uri_is_refused_with_the_way_out(uri: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse(uri)
    assert caught.value.advice


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("d/*.jsonl", "d/a.jsonl", True),
        ("d/*.jsonl", "d/e/a.jsonl", False),
        ("d/*.jsonl", "d/a.jsonl.gz", False),
        ("d/**/a.jsonl", "d/a.jsonl", True),
        ("d/**/a.jsonl", "d/e/f/a.jsonl", True),
        ("d/**", "d/e/f", True),
        ("d/?.txt", "d/é.txt", True),
        ("d/?.txt", "d//.txt", False),
        ("part-[0-3].x", "part-2.x", True),
        ("part-[!0-3].x", "part-2.x", False),
        ("a[]]b", "a]b", True),
        ("a[x", "a[x", True),
        ("a.b", "axb", False),
        ("line\n*", "line\nbreak", True),
    ],
)
def test_a_glob_stays_in_its_folder_unless_it_has_two_stars(pattern: str, key: str, matches: bool) -> None:
    assert bool(glob_regex(pattern).fullmatch(key)) is matches


@pytest.mark.parametrize("key", ["d/../../etc/passwd", "d/./x", "d//x", "d/x/", "d/", "d/a\0b"])
def test_a_key_that_would_leave_the_folder_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="no safe file name"):
        relative_name(key, "d/", "s3://bucket/d/")
