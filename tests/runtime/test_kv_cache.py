"""Rows and slots: bookkeeping against a model that simply moves labelled data."""

from hypothesis import given
from hypothesis import strategies as st

from glm4_runtime.kv_cache import SMALLEST_BUCKET, Move, SlotTable, bucket


def test_bucket_is_a_power_of_two_within_the_limit():
    assert bucket(1, 10_000) == SMALLEST_BUCKET
    assert bucket(256, 10_000) == 256
    assert bucket(257, 10_000) == 512
    assert bucket(9_000, 10_000) == 10_000
    assert bucket(5, 100) == 100


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from("agr"), st.integers(0, 2**16)), max_size=40))
def test_data_follows_its_slot(count, actions):
    table, rows = SlotTable(count), [None] * count
    for kind, seed in actions:
        used, free = sorted(set(range(count)) - set(table.free())), table.free()
        if kind == "a" and free:
            slot = free[seed % len(free)]
            rows[table.add(slot)] = slot
            table.set_length(slot, seed % 7)
        elif kind == "r" and used:
            table.remove(used[seed % len(used)])
        elif kind == "g" and used:
            chosen = [slot for i, slot in enumerate(used) if seed >> i & 1] or used[:1]
            before = {slot: table.row(slot) for slot in chosen}
            moves = list(table.gather(chosen))
            for move in moves:
                other = rows[move.target]
                rows[move.target] = rows[move.source]
                if move.swapped_length:
                    rows[move.source] = other
            assert sorted(table.row(slot) for slot in chosen) == list(range(len(chosen)))
            assert len(moves) == sum(row >= len(chosen) for row in before.values())
        for slot in set(range(count)) - set(table.free()):
            if table.length(slot):  # an empty slot has no data to follow it
                assert rows[table.row(slot)] == slot


def test_a_set_that_sits_in_front_does_not_move():
    table = SlotTable(4)
    for slot in (2, 0, 3):
        table.add(slot)
        table.set_length(slot, 5)
    assert list(table.gather([0, 2])) == []
    assert table.in_row_order([0, 2]) == [2, 0]
    moves = list(table.gather([3]))
    assert len(moves) == 1
    assert (moves[0].length, moves[0].swapped_length) == (5, 5)


def test_what_a_slot_expects_counts_until_it_is_reached_or_given_up():
    table = SlotTable(2)
    for slot in (0, 1):
        table.add(slot)
        table.set_length(slot, 10)
    table.expect(0, 100)
    table.set_length(1, 20)
    table.set_length(0, 99)
    assert (table.longest(), table.needed()) == (99, 100)
    table.set_length(0, 100)
    table.set_length(0, 30)
    assert table.needed() == 30
    for give_up in (lambda: table.set_length(1, 19), lambda: table.expect(1, 0), lambda: table.remove(1)):
        table.expect(1, 200)
        assert table.needed() == 200
        give_up()
        assert table.needed() == 30


def test_a_move_that_fails_leaves_both_slots_where_they_are():
    table = SlotTable(3)
    for slot in (0, 1, 2):
        table.add(slot)
        table.set_length(slot, 5 + slot)
    moves = table.gather([1, 2])
    assert next(moves) == Move(2, 0, 7, 5)
    moves.close()  # as the move failed, its caller asks for no other
    assert [table.row(slot) for slot in (0, 1, 2)] == [0, 1, 2]
