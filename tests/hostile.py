"""Bytes and values that somebody hostile, or a broken disk, sends."""

from __future__ import annotations

import random

VALUES = (
    *(b"1e999", b"-1e999", b"NaN", b"Infinity", b"1" * 400, b"-1", b"0", b"1e-400", b"1.5", b"null", b"true", b'""'),
    *(b"[" * 10_000, b'{"a":' * 5_000, b'"\\ud800"', b'"' + b"x" * 70_000 + b'"', b"[]", b"{}", b"\xff", b"\x00"),
    *(b'"9999-12-31T23:59:59Z"', b'"Not/AZone"', b'"a.b.>"', b'"\\u0000"', b'{"a":1,"a":2}', b"1e300", b"1e12"),
    *(b"9223372036854775807", b"-9223372036854775808", b"[[]]", b"false", b'"confirmed"', b'"0001-01-01T00:00:00Z"'),
)


def with_a_value_replaced(data: bytes, rng: random.Random) -> bytes:
    """JSON with the value behind some colon replaced."""
    colons = [i for i, byte in enumerate(data) if byte == ord(":")]
    if not colons:
        return rng.choice(VALUES)
    start = rng.choice(colons) + 1
    ends = [end for end in (data.find(b",", start), data.find(b"}", start)) if end > 0]
    return data[:start] + rng.choice(VALUES) + data[min(ends, default=len(data)) :]


def hurt(data: bytes, rng: random.Random) -> bytes:
    """With a value replaced, a piece lost or doubled, or a byte changed."""
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    match rng.randrange(4):
        case 0:
            return with_a_value_replaced(data, rng)
        case 1:
            return data[:at] + data[min(to, at + 20) :]
        case 2:
            return data[:at] + data[at : at + 20] + data[at:]
        case _:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
