"""No test loses a row when its cases are thinned."""

from tests.schedules.conftest import choose


def test_every_group_keeps_its_share():
    cases = [(group, f"case[{i}]") for group, count in (("a", 1), ("b", 7)) for i in range(count)]
    kept = choose(cases, {"a": 5, "b": 3}.get)
    assert kept <= set(cases)
    assert len([case for case in kept if case[0] == "a"]) == 1
    assert len([case for case in kept if case[0] == "b"]) == 3
    assert choose(cases, lambda group: 1) == set(cases)
