"""Damaged inputs, the same ones for the same seed: of bytes, and of JSON values. A reader takes them or says why not.

More of them with `pytest --fuzz N` (the fixture `fuzz` is N, by default 1).
"""

import copy
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

ODD_TEXTS = (
    "",
    " ",
    "\ud800",
    "\udfffx",
    "\x00",
    "\ufeff",
    "\u2028",
    "\u202ea",
    "e\u0301" * 9,
    "😀",
    "../..",
    "{{ x }}",
)
ODD_NUMBERS = (0, -1, 1, 2**31, -(2**63) - 1, 2**64, 10**400, 1e308, -0.0, float("nan"), float("inf"), 0.5)
ODD_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [None], [[]], {"": None}, ["a", 1])
LONGEST_WAIT = 60  # seconds for one input: far more than any needs, and less than for ever


def mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged copies of `data`: bits flipped, stretches cut, put in, doubled or swapped, no end."""
    chance = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            chance.choice((flip, cut, insert, duplicate, swap, truncate))(damaged, chance)
        yield bytes(damaged)


def stretch(data: bytearray, chance: random.Random) -> slice:
    start = chance.randrange(len(data) + 1)
    return slice(start, start + chance.choice((1, 2, 8, 64, 1024)))


def flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[stretch(data, chance)]


def insert(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    odd = (b"\x00", b"\n", b"\r\n", b'"', b"{", b"]", b"\xff", b"\xef\xbb\xbf", b"\\ud800", chance.randbytes(8))
    data[at:at] = chance.choice(odd)


def duplicate(data: bytearray, chance: random.Random) -> None:
    piece = stretch(data, chance)
    data[piece.start : piece.start] = data[piece]


def swap(data: bytearray, chance: random.Random) -> None:
    first, second = sorted((stretch(data, chance), stretch(data, chance)), key=lambda piece: piece.start)
    size = min(second.start - first.start, len(data) - second.start, 64)
    one, other = slice(first.start, first.start + size), slice(second.start, second.start + size)
    data[one], data[other] = data[other], data[one]


def truncate(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def json_mutations(value: Any, seed: int, count: int) -> Iterator[Any]:
    """`count` changed copies of a JSON value, in one or two places of it each: keys dropped or renamed, other types,
    null, nesting, huge numbers, odd text. `json.dumps` writes lone surrogates as escapes, and NaN as it is.
    """
    chance = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(value)
        for _ in range(chance.choice((1, 1, 2))):
            changed = change(changed, chance)
        yield changed


def change(value: Any, chance: random.Random) -> Any:
    """A change at some place of the value; the whole of it is one of the places."""
    places = list(containers(value))
    if not places or chance.random() < 0.05:
        return other(value, chance)
    inside = chance.choice(places)
    key = chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    match chance.randrange(6):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[chance.choice((key.upper(), f"{key} ", *ODD_TEXTS))] = inside.pop(key)
        case 1:
            inside.insert(key, copy.deepcopy(inside[key]))
        case _:
            inside[key] = other(inside[key], chance)
    return value


def containers(value: Any) -> Iterator[Any]:
    """All dictionaries and lists in a value that hold something."""
    if isinstance(value, dict | list) and value:
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from containers(each)


def other(value: Any, chance: random.Random) -> Any:
    """Something else in the place of a value: nested, spelled out, or nothing like it."""
    kinds = (ODD_TEXTS, ODD_NUMBERS, ODD_VALUES, ([value], {"a": value}, {"a": [[value]]}, str(value), nested(value)))
    return copy.deepcopy(chance.choice(chance.choice(kinds)))


def nested(value: Any) -> Any:
    for _ in range(80):
        value = [value]
    return value


def refusal(attempt: Callable[[], Any], naming: str) -> str | None:
    """What an attempt is refused with, None where it succeeds. Anything but one line of a ValueError that says `naming`
    (the file, say) is a failure, and so is to wait for ever."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"still not read after {LONGEST_WAIT} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_WAIT)
    try:
        attempt()
    except ValueError as error:
        line = str(error)
        assert naming in line and "\n" not in line, f"not one line that names {naming}: {line!r}"
        return line
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None
