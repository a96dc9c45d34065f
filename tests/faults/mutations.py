"""Faults of storage, of transfer and of writers, put into a whole shard by a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from seed_shards import Extent, Seed

BLOCK = 512
TYPES = b"01234567xgLKSVMDNA\0 z"


class Fault(NamedTuple):
    """A mutated shard.

    Args:
        kind: key of `KINDS`, or "several".
        data: the bytes of the tar.
        spans: what was touched, as offsets in the whole shard.
        small: one fault of at most 512 bytes, or in one header: at most two samples may be lost.
        forged: headers or payloads were exchanged for others that are valid: only an index made before can tell.
    """

    kind: str
    data: bytes
    spans: list[tuple[int, int]]
    small: bool = False
    forged: bool = False


def mutate(seed: Seed, rng: random.Random) -> Fault:
    """Return the shard with one fault, or several."""
    if rng.random() < 0.08:
        return _several(seed, rng)
    kind = rng.choice(list(KINDS))
    fault = KINDS[kind](seed, rng)
    return fault._replace(kind=kind)


def _several(seed: Seed, rng: random.Random) -> Fault:
    faults = []
    data = seed.data
    for _ in range(rng.randrange(2, 5)):
        kind = rng.choice(["flip", "zeros", "noise", "long zeros", "size", "remove", "insert"])
        fault = KINDS[kind](seed._replace(data=data), rng)
        data = fault.data
        faults.append(fault)
    spans = [span for fault in faults for span in fault.spans]
    return Fault("several", data, spans, forged=True)


def _overwrite(seed: Seed, place: int, new: bytes, **told: bool) -> Fault:
    new = new[: len(seed.data) - place]
    data = seed.data[:place] + new + seed.data[place + len(new) :]
    return Fault("", data, [(place, place + len(new))], **told)


def _splice(seed: Seed, start: int, stop: int, new: bytes, **told: bool) -> Fault:
    return Fault("", seed.data[:start] + new + seed.data[stop:], [(start, max(stop, start + 1))], **told)


def _end(seed: Seed) -> int:
    """Return where the members end; behind are only zeros, in which a fault has no effect or is noise after the end."""
    return min(len(seed.data), seed.extents[-1].stop + 2 * BLOCK)


def _place(seed: Seed, rng: random.Random) -> int:
    """Return a place anywhere, more often at the edges of headers."""
    if rng.random() < 0.4:
        extent = rng.choice(seed.extents)
        edge = rng.choice([extent.start, extent.data - BLOCK, extent.data, extent.data + extent.size, extent.stop])
        return max(0, min(_end(seed) - 1, edge + rng.randrange(-40, 40) * rng.choice([0, 1, 13])))
    return rng.randrange(_end(seed))


def _flip(seed: Seed, rng: random.Random) -> Fault:
    place = _place(seed, rng)
    return _overwrite(seed, place, bytes([seed.data[place] ^ 1 << rng.randrange(8)]), small=True)


def _flip_in_header(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    place = rng.randrange(extent.start, extent.data)
    return _overwrite(seed, place, bytes([seed.data[place] ^ 1 << rng.randrange(8)]), small=True)


def _byte_in_name(seed: Seed, rng: random.Random) -> Fault:
    """Change a letter of a name in the data of a long-name or pax header, which no checksum covers."""
    long = [extent for extent in seed.extents if extent.data - extent.start > BLOCK]
    if not long:
        return _flip_in_header(seed, rng)
    extent = rng.choice(long)
    place = rng.randrange(extent.start + BLOCK, extent.data - BLOCK)
    letter = rng.choice([b"0", b"1", b"?", b"/", b".", b"\0", b" ", b"=", b"\n", bytes([rng.randrange(256)])])
    return _overwrite(seed, place, letter, small=True, forged=True)


def _zeros(seed: Seed, rng: random.Random) -> Fault:
    return _overwrite(seed, _place(seed, rng), bytes(rng.choice([1, 16, 100, 511, 512])), small=True)


def _noise(seed: Seed, rng: random.Random) -> Fault:
    return _overwrite(seed, _place(seed, rng), rng.randbytes(rng.choice([1, 2, 16, 100, 511, 512])), small=True)


def _long_zeros(seed: Seed, rng: random.Random) -> Fault:
    return _overwrite(seed, _place(seed, rng), bytes(rng.choice([513, 1024, 4096, 20_000])))


def _long_noise(seed: Seed, rng: random.Random) -> Fault:
    return _overwrite(seed, _place(seed, rng), rng.randbytes(rng.choice([513, 1024, 4096, 20_000])))


def _cut(seed: Seed, rng: random.Random) -> Fault:
    place = _place(seed, rng)
    return Fault("", seed.data[:place], [(place, len(seed.data))])


def _cut_at_member(seed: Seed, rng: random.Random) -> Fault:
    place = rng.choice(seed.extents).stop
    return Fault("", seed.data[:place], [(place, len(seed.data))])


def _remove(seed: Seed, rng: random.Random) -> Fault:
    place = _place(seed, rng)
    return _splice(seed, place, place + rng.choice([1, 2, 100, 511, 512]), b"", small=True)


def _remove_long(seed: Seed, rng: random.Random) -> Fault:
    place, size = _place(seed, rng), rng.choice([513, 1024, 4096, 5000])
    return _splice(seed, place, place + size, b"", forged=size % BLOCK == 0)  # whole blocks: what is left can fit


def _remove_block(seed: Seed, rng: random.Random) -> Fault:
    place = _place(seed, rng) // BLOCK * BLOCK
    return _splice(seed, place, place + BLOCK * rng.choice([1, 1, 2, 4]), b"", forged=True)


def _insert(seed: Seed, rng: random.Random) -> Fault:
    size = rng.choice([1, 2, 100, 511, 512])
    copied = rng.randrange(len(seed.data) - size)
    new = rng.choice([bytes(size), rng.randbytes(size), seed.data[copied : copied + size]])
    place = _place(seed, rng)
    return _splice(seed, place, place, new, small=True)


def _insert_block(seed: Seed, rng: random.Random) -> Fault:
    copied = rng.randrange(len(seed.data) // BLOCK) * BLOCK
    place = _place(seed, rng) // BLOCK * BLOCK
    return _splice(seed, place, place, seed.data[copied : copied + BLOCK * rng.choice([1, 2, 3])], forged=True)


def _swap_blocks(seed: Seed, rng: random.Random) -> Fault:
    a, b = sorted(rng.randrange(_end(seed) // BLOCK) * BLOCK for _ in range(2))
    data = bytearray(seed.data)
    data[a : a + BLOCK], data[b : b + BLOCK] = seed.data[b : b + BLOCK], seed.data[a : a + BLOCK]
    return Fault("", bytes(data), [(a, a + BLOCK), (b, b + BLOCK)], forged=True)


def _swap_members(seed: Seed, rng: random.Random) -> Fault:
    a, b = sorted(rng.sample(seed.extents, 2), key=lambda extent: extent.start)
    data = seed.data
    new = data[b.start : b.stop] + data[a.stop : b.start] + data[a.start : a.stop]
    return Fault("", data[: a.start] + new + data[b.stop :], [(a.start, b.stop)])


def _swap_contents(seed: Seed, rng: random.Random) -> Fault:
    a, b = sorted(rng.sample(seed.extents, 2), key=lambda extent: extent.start)
    size = min(a.size, b.size)
    data = bytearray(seed.data)
    data[a.data : a.data + size] = seed.data[b.data : b.data + size]
    data[b.data : b.data + size] = seed.data[a.data : a.data + size]
    return Fault("", bytes(data), [(a.data, a.data + size), (b.data, b.data + size)], forged=True)


def _double_member(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    place = rng.choice([extent.stop, rng.choice(seed.extents).start, seed.extents[-1].stop])
    return _splice(seed, place, place, seed.data[extent.start : extent.stop], small=True)


def _double_with_other_content(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    member = bytearray(seed.data[extent.start : extent.stop])
    if extent.size:
        member[extent.data - extent.start + rng.randrange(extent.size)] ^= 1 + rng.randrange(255)
    place = rng.choice([extent.stop, rng.choice(seed.extents).start, seed.extents[-1].stop])
    return _splice(seed, place, place, bytes(member), small=True, forged=True)


def _remove_member(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    return _splice(seed, extent.start, extent.stop, b"", small=True, forged=True)


def _two_tars(seed: Seed, rng: random.Random) -> Fault:
    end = len(seed.data) if rng.random() < 0.5 else seed.extents[-1].stop + BLOCK
    return Fault("", seed.data[:end] + seed.data, [(end, end)])


def _no_end_mark(seed: Seed, rng: random.Random) -> Fault:
    return Fault("", seed.data[: seed.extents[-1].stop + rng.choice([0, 0, 100, 511])], [(seed.extents[-1].stop,) * 2])


def _noise_after_end(seed: Seed, rng: random.Random) -> Fault:
    return Fault("", seed.data + rng.randbytes(rng.choice([1, 100, 512, 3000])), [(len(seed.data),) * 2])


def forge_header(data: bytes, header: int, at: int, new: bytes) -> bytes:
    """Return a tar in which a field of a header is another, and the checksum right."""
    block = bytearray(data[header : header + BLOCK])
    block[at : at + len(new)] = new
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + BLOCK :]


def _forged(seed: Seed, extent: Extent, header: int, at: int, new: bytes, forged: bool = True) -> Fault:
    data = forge_header(seed.data, header, at, new)
    return Fault("", data, [(extent.start, extent.data)], small=True, forged=forged)


def _name(seed: Seed, rng: random.Random) -> Fault:
    """Give a member another name: of another member of the same field, of none, or in a form that is refused."""
    extent = rng.choice(seed.extents)
    field = extent.name.rsplit(".", 1)[1]
    others = [other.name for other in seed.extents if other.name.rsplit(".", 1)[1] == field]
    odd = ["new." + field, "new", extent.name + "x", "../" + field, "/a." + field, "a.b.c"]
    encoded = rng.choice([rng.choice(others), *odd]).encode()[:100]
    return _forged(seed, extent, extent.data - BLOCK, 0, encoded + bytes(100 - len(encoded)))


def _size(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    header = rng.choice([extent.start, extent.data - BLOCK])
    later = [other.stop - extent.data for other in seed.extents if other.stop > extent.stop]
    size = rng.choice(
        [
            max(0, extent.size + rng.choice([-600, -512, -100, -1, 1, 100, 512, 600])),
            0,
            rng.choice(later or [0]),  # takes in the members after it, exactly
            rng.choice(later or [0]) - rng.randrange(BLOCK),
            rng.randrange(len(seed.data)),
            rng.randrange(8**11),
            rng.randrange(2**64),
        ]
    )
    field = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + abs(size).to_bytes(11)
    if rng.random() < 0.1:
        field = rng.choice([b"-0000000100\0", b"0x000000010\0", b"0000000_100\0", b"\xff" * 12, bytes(12), b"9" * 12])
    return _forged(seed, extent, header, 124, field)


def _type(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    header = rng.choice([extent.start, extent.data - BLOCK])
    return _forged(seed, extent, header, 156, bytes([rng.choice(TYPES)]))


def _other_field(seed: Seed, rng: random.Random) -> Fault:
    """Change a field that does not matter: mode, owner, time, version, names, device numbers."""
    extent = rng.choice(seed.extents)
    at, size = rng.choice([(100, 8), (108, 8), (136, 12), (157, 100), (263, 2), (265, 32), (329, 8)])
    return _forged(seed, extent, extent.data - BLOCK, at, rng.randbytes(size), forged=False)


def _prefix(seed: Seed, rng: random.Random) -> Fault:
    extent = rng.choice(seed.extents)
    return _forged(seed, extent, extent.data - BLOCK, rng.choice([257, 345]), rng.randbytes(rng.randrange(1, 20)))


KINDS: dict[str, Callable[[Seed, random.Random], Fault]] = {
    "flip": _flip,
    "flip in a header": _flip_in_header,
    "letter of a long name": _byte_in_name,
    "zeros": _zeros,
    "noise": _noise,
    "long zeros": _long_zeros,
    "long noise": _long_noise,
    "cut": _cut,
    "cut at a member": _cut_at_member,
    "remove": _remove,
    "remove long": _remove_long,
    "remove blocks": _remove_block,
    "insert": _insert,
    "insert blocks": _insert_block,
    "swap blocks": _swap_blocks,
    "swap members": _swap_members,
    "swap contents": _swap_contents,
    "double": _double_member,
    "double, other content": _double_with_other_content,
    "remove a member": _remove_member,
    "two tars in one": _two_tars,
    "no end mark": _no_end_mark,
    "noise after the end": _noise_after_end,
    "name": _name,
    "size": _size,
    "type": _type,
    "other header field": _other_field,
    "magic or prefix": _prefix,
}
