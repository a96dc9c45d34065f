"""Names of shards: short, and never equal."""

import pytest

from data_tools.tar.location import Location
from data_tools.tar.shard_names import ShardNames


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["data/0.tar", "data/1.tar"], ["0.tar", "1.tar"]),
        (["data/web/0.tar", "data/clean/0.tar", "x/1.tar"], ["web/0.tar", "clean/0.tar", "1.tar"]),
        (["a/x/y/0.tar", "b/x/y/0.tar", "b/z/0.tar"], ["a/x/y/0.tar", "b/x/y/0.tar", "z/0.tar"]),
        (["0.tar", "a/0.tar"], ["0.tar", "a/0.tar"]),
        (["/0.tar", "0.tar"], ["/0.tar", "0.tar"]),
        (["https://h/web/0.tar?key=1", "https://h/clean/0.tar?key=2"], ["web/0.tar", "clean/0.tar"]),
        (["https://h/get?id=1", "https://h/get?id=2"], ["https://h/get#1", "https://h/get#2"]),
    ],
)
def test_a_name_is_as_short_as_it_may_be(places: list[str], names: list[str]):
    found = ShardNames([Location(place) for place in places])
    assert found.names == names
    assert [found[i] for i in range(len(names))] == names


def test_a_path_of_an_earlier_place_has_the_same_name():
    names = ShardNames([Location("data/web/0.tar"), Location("data/clean/0.tar"), Location("1.tar")])
    assert [names.of(path) for path in ("/old/web/0.tar", "clean/0.tar", "there/1.tar", "there/2.tar")] == [
        *("web/0.tar", "clean/0.tar", "1.tar", "2.tar")
    ]
