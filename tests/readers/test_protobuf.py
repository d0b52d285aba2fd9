"""Messages are read as protobuf's encoding guide writes them, and broken ones are refused."""

from __future__ import annotations

import pytest

from converters.readers.protobuf import Malformed, Message, fields, varint

# field 1: 150; 2: "testing"; 3: {1: 150}; 4: -2; 5: fixed32 1; 6: fixed64 2; 3 again: {}
GUIDE = bytes.fromhex("089601 120774657374696e67 1a03089601 20feffffffffffffffff01 2d01000000 310200000000000000 1a00")


def test_every_kind_of_field_is_read() -> None:
    message = Message(GUIDE)
    assert [message.integer(number) for number in (1, 4, 5, 6, 7)] == [150, -2, 1, 2, 0]
    assert (message.text(2), bytes(message.view(2)), message.text(8)) == ("testing", b"testing", "")
    assert [part.integer(1) for part in message.messages(3)] == [150, 0]
    assert 4 in message
    assert 7 not in message
    assert [number for number, _ in fields(GUIDE)] == [1, 2, 3, 4, 5, 6, 3]


def test_a_cut_is_found_unless_it_falls_between_fields() -> None:
    between = {0, 3, 12, 17, 28, 33, 42}
    for size in range(len(GUIDE)):
        if size in between:
            Message(GUIDE[:size])
        else:
            with pytest.raises(Malformed):
                Message(GUIDE[:size])


@pytest.mark.parametrize("data", [b"\x00\x01", b"\x0b", b"\x0c", b"\x0f", b"\x80" * 11, b"\xff" * 9 + b"\x02"])
def test_what_no_encoder_writes_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        list(fields(data))


def test_a_field_of_another_kind_is_refused() -> None:
    message = Message(b"\x08\x01\x12\x01\xff")
    for ask in (lambda: message.view(1), lambda: message.integer(2), lambda: message.text(2)):
        with pytest.raises(Malformed):
            ask()


def test_the_largest_number_is_64_bits_wide() -> None:
    assert varint(b"\xff" * 9 + b"\x01", 0) == ((1 << 64) - 1, 10)


def test_a_message_of_too_many_fields_is_refused() -> None:
    with pytest.raises(Malformed, match="more than 262144 fields"):
        Message(b"\x08\x00" * ((1 << 18) + 1))
