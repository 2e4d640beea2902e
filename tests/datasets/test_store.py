"""Rows of whole numbers, in memory and in a file."""

import numpy as np
import pytest

from openrlhf.datasets.store import RowWriter, as_floats, as_ints, open_rows

ROWS = [([1, 2, 3], []), ([], [7]), ([2**31 - 1, -1], [0, 0, 5])]


def in_memory(rows):
    writer = RowWriter(len(rows[0]))
    for row in rows:
        writer.add(*row)
    return writer.store()


def in_a_file(path, rows, facts=None):
    with path.open("wb") as file:
        writer = RowWriter(len(rows[0]), file)
        for row in rows:
            writer.add(*row)
        writer.seal(facts or {})
    return path


def listed(store):
    return [tuple(part.tolist() for part in store[index]) for index in range(len(store))]


@pytest.mark.parametrize("held_back", [1, 1 << 20])
def test_rows_come_back_from_memory_and_from_a_file_alike(tmp_path, monkeypatch, held_back):
    monkeypatch.setattr("openrlhf.datasets.store.FLUSHED", held_back)
    store, facts = open_rows(in_a_file(tmp_path / "rows", ROWS, {"cut": 3}), 2)
    memory = in_memory(ROWS)
    assert listed(store) == listed(memory) == ROWS
    assert (store.digest, facts) == (memory.digest, {"cut": 3})
    assert [store.lengths(part).tolist() for part in (0, 1)] == [[3, 0, 2], [0, 1, 3]]
    assert [part.tolist() for part in store[-1]] == list(ROWS[-1])
    with pytest.raises(IndexError):
        store[3]


def test_the_values_of_a_file_are_mapped_and_not_read(tmp_path):
    store, _ = open_rows(in_a_file(tmp_path / "rows", ROWS), 2)
    bases = [store[0][0]]
    while bases[-1] is not None:
        bases.append(getattr(bases[-1], "base", None))
    assert any(isinstance(base, np.memmap) for base in bases)
    assert not store[0][0].flags.writeable


@pytest.mark.parametrize(
    "other",
    [
        [*ROWS[:2], ([2**31 - 1, -2], [0, 0, 5])],
        [*ROWS[:2], ([2**31 - 1, -1, 0], [0, 5])],
        ROWS[::-1],
        ROWS[:2],
        [*ROWS, ROWS[0]],
        [*ROWS, ([], [])],
    ],
)
def test_the_digest_sees_every_value_border_order_and_number(other):
    assert in_memory(other).digest != in_memory(ROWS).digest


def test_numbers_with_a_fraction_come_back_without_loss():
    numbers = [0.1, -3.0, 1e300, 5e-324]
    (part,) = in_memory([(as_ints(numbers),)])[0]
    assert as_floats(part).tolist() == numbers


def test_no_byte_of_a_file_can_change_unnoticed(tmp_path):
    path = in_a_file(tmp_path / "rows", ROWS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert open_rows(path, 2) is None, place
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert open_rows(path, 2) is None, length
    path.write_bytes(whole + b"\0")
    assert open_rows(path, 2) is None
    path.write_bytes(whole)
    assert listed(open_rows(path, 2)[0]) == ROWS


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\0" * 4096])
def test_what_is_no_such_file_is_not_opened(tmp_path, content):
    path = tmp_path / "rows"
    if content is not None:
        path.write_bytes(content)
    assert open_rows(path, 2) is None


def test_rows_of_other_parts_are_not_opened(tmp_path):
    assert open_rows(in_a_file(tmp_path / "rows", ROWS), 1) is None
    assert open_rows(tmp_path, 2) is None
