"""Bars as plain HTML and SVG: a waterfall of what adds up to a whole, and a tower of what fills a limited room.

As in `train/chart.py`, drawings are stretched to the room that there is and all text is HTML.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from html import escape

_LABELLED = 1 / 22  # of a tower's height: what is lower has no room for a line of text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A bar: so much of the whole."""

    name: str
    size: float
    color: int  # the page defines --color-1, --color-2 …
    note: str = ''


def waterfall(parts: Sequence[Part], total: str, show: Callable[[float], str]) -> str:
    """A list with a line for each part, which begins where the one before it ended; a negative one goes back. The last
    line, named `total`, is the sum.
    """
    ends = list(itertools.accumulate((part.size for part in parts), initial=0.0))
    whole, low, high = ends[-1], min(ends), max(ends)

    def across(size: float) -> float:
        return 1000 * (size - low) / ((high - low) or 1.0)

    lines = [
        _line(part, show(part.size), part.size / (whole or 1.0), across(start), across(end), first=number == 0)
        for number, (part, (start, end)) in enumerate(zip(parts, itertools.pairwise(ends), strict=True))
    ]
    last = Part(name=total, size=whole, color=6)
    lines.append(_line(last, show(whole), 1.0, across(0.0), across(whole), first=False, last=True))
    return f'<ol class="fall">{"".join(lines)}</ol>'


def _line(part: Part, size: str, share: float, start: float, end: float, *, first: bool, last: bool = False) -> str:
    """The threads above and below lead from the end of one bar to the start of the next."""
    left, width = min(start, end), max(abs(end - start), 2.0)
    above = '' if first else f'M{end if last else start:.1f} 0V2'
    below = '' if last else f'M{end:.1f} 8V10'
    note = f'<small>{escape(part.note)}</small>' if part.note else ''
    bar = f'<rect x="{left:.1f}" y="2" width="{width:.1f}" height="6" style="fill:var(--color-{part.color})"/>'
    return (
        f'<li{" class=total" if last else ""}><span>{escape(part.name)}{note}</span>'
        f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<path d="{above}{below}"/>{bar}</svg><b>{escape(size)}</b><em>{share:.1%}</em></li>'
    )


def tower(parts: Sequence[Part], limit: float, show: Callable[[float], str]) -> str:
    """Parts on each other, the first at the bottom, in a room of the size `limit`: the names of the large ones beside
    them, what is left above them, and what is beyond the limit in a colour of its own.
    """
    used = sum(part.size for part in parts)
    height = max(used, limit)

    def down(size: float) -> float:
        return 1000 * (1 - size / height)

    tops = list(itertools.accumulate((part.size for part in parts), initial=0.0))
    rects, names = [], []
    for part, (bottom, top) in zip(parts, itertools.pairwise(tops), strict=True):
        rects.append(_rect(down(top), down(bottom), f'fill:var(--color-{part.color})'))
        if part.size >= _LABELLED * height:
            names.append(_label('name', down((top + bottom) / 2), f'<b>{show(part.size)}</b> {escape(part.name)}'))
    marks = [(0.0, show(0.0)), (used, show(used)), (limit, show(limit))]
    if abs(used - limit) < _LABELLED * height:
        marks.remove((used, show(used)))
    if used > limit:
        rects.append(_rect(down(used), down(limit), 'fill:var(--color-9);opacity:.82'))
        beyond = f'{show(used - limit)} too much'
        if used - limit >= 2 * _LABELLED * height:
            names.append(_label('beyond', down((used + limit) / 2), beyond))
    else:
        beyond = f'{show(limit - used)} to spare'
        if limit - used >= _LABELLED * height:
            names.append(_label('name', down((used + limit) / 2), beyond))
    ticks = [_label('y', down(size), text) for size, text in marks]
    spoken = '; '.join(
        [f'{show(used)} of {show(limit)}, {beyond}', *(f'{part.name} {show(part.size)}' for part in parts)]
    )
    return f"""<div class="tower" role="img" aria-label="{escape(spoken)}">
<svg viewBox="0 0 10 1000" preserveAspectRatio="none" aria-hidden="true">
{''.join(rects)}<path d="M0 {down(limit):.1f}h10"/></svg>
<div class="axes" aria-hidden="true">{''.join([*ticks, *names])}</div>
</div>"""


def _rect(top: float, bottom: float, style: str) -> str:
    return f'<rect y="{top:.1f}" width="10" height="{bottom - top:.1f}" style="{style}"/>'


def _label(kind: str, down: float, html: str) -> str:
    return f'<span class="{kind}" style="top:{down / 10:.2f}%">{html}</span>'


def strip(parts: Sequence[Part], whole: float) -> str:
    """A thin bar for a cell of a table: as wide as its parts are of the whole."""
    edges = list(itertools.accumulate((part.size for part in parts), initial=0.0))
    rects = [
        f'<rect x="{1000 * start / whole:.1f}" width="{1000 * (end - start) / whole:.1f}" height="10"'
        f' style="fill:var(--color-{part.color})"/>'
        for part, (start, end) in zip(parts, itertools.pairwise(edges), strict=True)
    ]
    return (
        f'<svg class="strip" viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true">{"".join(rects)}</svg>'
    )
