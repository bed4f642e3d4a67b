"""Memories by namespace: the same one each time, apart from the others, and the least recently used forgotten."""

import pytest

from specdec.drafters.namespaces import Namespaces


class Bytes:
    """A memory of some size."""

    def __init__(self, bytes_used=10):
        self.bytes_used = bytes_used


def test_each_namespace_has_its_own_memory_until_it_is_forgotten():
    kept = Namespaces(Bytes)
    ours, theirs = kept["ours"], kept["theirs"]
    assert kept["ours"] is ours is not theirs
    assert kept.items() == {"theirs": theirs, "ours": ours}
    assert list(kept.items()) == ["theirs", "ours"]  # the last used is last
    assert kept.bytes_used == 20
    kept.forget("ours")
    assert kept["ours"] is not ours
    kept.forget("unheard of")
    assert kept["theirs"] is theirs
    kept.forget()
    assert kept.items() == {}


def test_the_least_recently_used_is_forgotten_where_there_are_too_many():
    kept = Namespaces(Bytes, most=2)
    for name in ("a", "b", "a", "c"):
        assert kept[name]
    assert list(kept.items()) == ["a", "c"]
    kept.replace({"d": Bytes(), "e": Bytes(), "f": Bytes()})
    assert list(kept.items()) == ["e", "f"]


def test_the_least_recently_used_is_forgotten_where_they_are_too_large_but_not_the_last():
    kept = Namespaces(Bytes, max_bytes=25)
    for name in ("a", "b", "c"):
        assert kept[name]
    assert list(kept.items()) == ["b", "c"]
    kept["b"].bytes_used = 16
    kept.trim()
    assert list(kept.items()) == ["b"]
    kept["b"].bytes_used = 99
    kept.trim()
    assert list(kept.items()) == ["b"]


def test_no_namespaces_at_all_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Namespaces(Bytes, most=0)
