"""Regular expressions over what models write, matched in a process that can be ended.

Some patterns backtrack for years, with Python's lock held: no thread could notice. A process is killed.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

_MATCH = """
import json, re, sys
pattern, texts, anywhere = json.load(sys.stdin)
compiled = re.compile(pattern, re.DOTALL)
match = compiled.search if anywhere else compiled.fullmatch
json.dump([match(text) is not None for text in texts], sys.stdout)
"""


def match(pattern: str, texts: Sequence[str], *, anywhere: bool = False, seconds: float = 10.0) -> list[bool]:
    """Which texts the pattern matches, whole or `anywhere`; `.` matches line feeds.

    Raises ValueError where that takes longer than `seconds`.
    """
    asked = json.dumps([pattern, [text.strip() for text in texts], anywhere])
    command = [sys.executable, '-I', '-S', '-c', _MATCH]
    try:
        told = subprocess.run(command, input=asked, capture_output=True, text=True, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f'the pattern {pattern!r} was not done after {seconds:g} s: it backtracks; use possessive quantifiers (a++)'
        ) from None
    return json.loads(told.stdout)
