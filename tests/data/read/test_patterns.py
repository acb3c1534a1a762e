"""Shard patterns: what is none is said without opening or expanding anything."""

import pytest

from megavlm.data.read.patterns import expand_patterns, num_expansions


@pytest.mark.parametrize("pattern", ["a-{0..3}.tar", "{a,b{0..2}}", "{a..c}-{00..10..5}", "x", "{}", "a{b}c", "{3..1}", "{{a,b},{c,d}}"])
def test_counting_is_expanding_without_the_memory(pattern):
    assert num_expansions(pattern) == len(expand_patterns(pattern))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{a", "braces that do not match"),
        ("a}", "braces that do not match"),
        ("{0..1000000000000}", "more than"),
        ("{a,b}" * 60, "more than"),
        ("{" + "{a,b}" * 60 + ",c}", "more than"),
        ("http://[", "URL that is none"),
        ("http://host:port/x", "URL that is none"),
        ("http:///x.tar", "without a host"),
        ("s4://bucket/x.tar", "unknown kind"),
        ("", "empty name"),
        ("a" * 20_000, "characters"),
        ([], "at least one"),
        (["a", "{a,b}"], "more than once"),
    ],
)
def test_what_is_no_pattern(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_patterns(pattern)
