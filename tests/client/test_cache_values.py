"""How a revision is stored: nothing of it can change without being noticed."""

from hypothesis import given
from hypothesis import strategies as st

from zeolith.client.cache_values import DATA, TID, encode, is_whole

ids = st.binary(min_size=8, max_size=8)


@given(ids, ids, st.binary(max_size=300))
def test_what_is_stored_is_read_again(oid, tid, data):
    value = encode(oid, tid, data)
    assert (value[TID], value[DATA]) == (tid, data)
    assert is_whole(oid, value)


@given(ids, ids, st.binary(max_size=100), st.data())
def test_each_bit_counts_and_so_does_the_oid(oid, tid, data, draw):
    value = bytearray(encode(oid, tid, data))
    bit = draw.draw(st.integers(0, 8 * len(value) - 1))
    value[bit // 8] ^= 1 << bit % 8
    assert not is_whole(oid, bytes(value))
    value[bit // 8] ^= 1 << bit % 8
    assert not is_whole(bytes([oid[0] ^ 1, *oid[1:]]), bytes(value))
