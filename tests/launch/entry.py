"""Where the entry is, and what it says of a mistake."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def one_line(stderr):
    """The message of a run that ended as a user's mistake does."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith('error: ')
    return lines[0].removeprefix('error: ')
