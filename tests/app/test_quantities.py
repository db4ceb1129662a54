"""Times and sizes as people say them."""

from fusechat.app.quantities import duration, size


def test_numbers_as_people_say_them() -> None:
    assert [duration(s) for s in (None, 4.4, 89, 90, 700, 5400, 90000)] == [
        "?",
        "4 s",
        "89 s",
        "1.5 min",
        "12 min",
        "1.5 h",
        "25 h",
    ]
    assert [size(b) for b in (None, 900, 2.5e6, 31e9)] == ["?", "1 kB", "2.5 MB", "31.0 GB"]
