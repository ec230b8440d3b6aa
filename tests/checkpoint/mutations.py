"""Damages files, the same way each time: what readers of files from anywhere must live through."""

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence

from tpu_llm.checkpoint.weight_file import FileError

HUGE = (2**64 - 1, 2**63 - 1, 2**63, 2**32, 2**31 - 1, 2**20, 0)


def mutations(seeds: Sequence[bytes], count: int, texts: Sequence[bytes] = ()) -> Iterator[bytes]:
    """`count` damaged copies; the first 400 bytes, where headers are, are hit more often. `texts` are spliced in."""
    rng = random.Random(7)
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if data:
                _damage(data, rng, texts)
        yield bytes(data)


def _damage(data: bytearray, rng: random.Random, texts: Sequence[bytes]) -> None:
    at = rng.randrange(min(len(data), rng.choice((8, 30, 400, len(data)))))
    what = rng.randrange(8 if texts else 7)
    if what == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif what == 1:
        del data[at:]
    elif what == 2:
        size = rng.choice((4, 8))
        data[at : at + size] = (rng.choice(HUGE) % 2 ** (8 * size)).to_bytes(size, 'little')
    elif what == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif what == 4:
        del data[at : at + rng.randrange(1, 20)]
    elif what == 5:
        data[at:at] = data[at : at + rng.randrange(1, 200)]
    elif what == 6:
        other = rng.randrange(len(data))
        data[at : at + 8] = data[other : other + 8]
    else:
        text = rng.choice(texts)
        data[at : at + rng.choice((0, 1, len(text)))] = text


def survive(path, cases: Iterator[bytes], read: Callable[[], None], memory: int) -> tuple[int, int]:
    """(files read, files refused): each at once, within `memory` bytes, and refused only by a FileError of one line."""
    done, refused = 0, 0
    tracemalloc.start()
    try:
        for data in cases:
            path.write_bytes(data)
            message, seconds, size = _watch(read)
            if seconds > 1 or size > memory:  # A table of the interpreter may have grown just then; it won't again.
                message, seconds, size = _watch(read)
            assert seconds <= 1, f'{seconds} s for {data[:200]}'
            assert size <= memory, f'{size} bytes for {data[:200]}'
            if message is None:
                done += 1
                continue
            refused += 1
            assert message.startswith(f'{path}: ')
            assert message.isprintable()
            assert len(message) < 600
    finally:
        tracemalloc.stop()
    return done, refused


def _watch(read: Callable[[], None]) -> tuple[str | None, float, int]:
    """What `read` was refused with, its seconds of processor time, and the most memory that it held, in bytes."""
    tracemalloc.reset_peak()
    before, start, message = tracemalloc.get_traced_memory()[0], time.process_time(), None
    try:
        read()
    except FileError as error:
        message = str(error)
    return message, time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
