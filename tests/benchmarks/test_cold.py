"""Memory that a cold measurement walks over: three times whatever cache there is."""

import pytest

from benchmarks import cold


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(cold, "CACHES", tmp_path)
    monkeypatch.setattr(cold, "memory", lambda: 2**33)
    cold.largest_cache.cache_clear()
    yield tmp_path
    cold.largest_cache.cache_clear()


@pytest.mark.parametrize(
    "sizes, largest",
    [
        (("32K", "1024K", "32768K\n"), 2**25),
        (("48K", "300M"), 300 * 2**20),
        ((), 0),
        (("", "unknown"), 0),
    ],
)
def test_largest_cache(caches, sizes, largest):
    for i, size in enumerate(sizes):
        (caches / f"index{i}").mkdir()
        (caches / f"index{i}" / "size").write_text(size)
    assert cold.largest_cache() == largest
    assert cold.stream_bytes() == max(2**29, 3 * largest)
    for nbytes in (1e6, 4.4e6, 250e6, 2e9):
        copies = cold.copies(nbytes)
        assert copies >= 2 and (copies == 1000 or copies * nbytes >= max(3e8, 3 * largest))
    assert cold.copies(1) == 1000
    few = cold.copies(0.08 * 4.4e6, held=4.4e6)
    assert few * 4.4e6 <= max(2**31, 3 * largest) and few > cold.copies(4.4e6)


def test_a_part_of_each_copy_is_cold_where_memory_is_large(caches, monkeypatch):
    """Columns of a weight at 92 % zeros, on a host with 300 MB of cache."""
    (caches / "index3").mkdir()
    (caches / "index3" / "size").write_text("300M")
    held, read = 4.4e6, 0.08 * 4.4e6
    assert cold.copies(read, held) * read < cold.largest_cache()  # what 8 GiB allow
    monkeypatch.setattr(cold, "memory", lambda: 2**37)
    assert cold.copies(read, held) * read > cold.largest_cache()
