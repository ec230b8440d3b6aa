"""The looks of a report: one HTML page with its style and its script inside, and nothing fetched from
anywhere.
"""

from collections.abc import Sequence
from html import escape
from typing import Literal

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
"""

_STYLE = """
:root {
  --paper: #f6f7f9; --card: #ffffff; --ink: #16191f; --soft: #5a6270; --line: #e3e6eb; --grid: #eceef2;
  --good: #177245; --color-1: #2563c9; --color-2: #c2570c; --color-3: #0d7d74; --color-4: #8741b8;
  --color-5: #b3265e; --color-6: #6b7686; --color-7: #4d7c0f; --color-8: #a16207; --color-9: #c81e1e;
  --color-10: #9aa3af; --color-11: #0e7490; --color-12: #7c5e3b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1216; --card: #171b21; --ink: #e8eaee; --soft: #9aa4b2; --line: #2a3039; --grid: #222831;
    --good: #5cc98e; --color-1: #6ea8fe; --color-2: #f0a25f; --color-3: #4fc6ba; --color-4: #c490ec;
    --color-5: #f08cb4; --color-6: #98a2b0; --color-7: #a3cf5c; --color-8: #e2b93b; --color-9: #f47c7c;
    --color-10: #5d6774; --color-11: #67d0e8; --color-12: #c9a77c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 32px; }
header p { margin: 6px 0 0; overflow-wrap: anywhere; }
footer { padding-top: 36px; padding-bottom: 36px; font-size: 13px; }
header p, footer, .unit, .note { color: var(--soft); }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0; display: inline; }
.card, .chart, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }

.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0;
}
.card { padding: 14px 16px; }
.card dt { color: var(--soft); font-size: 13px; }
.card dd { margin: 0; font-size: 25px; font-weight: 650; line-height: 1.3; letter-spacing: -.01em; }
.card small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.card small.good { color: var(--good); }
.card small.bad { color: var(--color-9); }

.charts { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 16px; }
.chart { grid-column: span 3; margin: 0; padding: 14px 16px 12px; min-width: 0; }
.chart.third { grid-column: span 2; }
.unit { font-size: 13px; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 4px 0 0; padding: 0;
  font-size: 13px;
}
.legend i, .swatch {
  display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px;
}
.plot, .heat { position: relative; height: 270px; margin: 14px 0 22px 44px; touch-action: pan-y; }
.third .plot { height: 190px; }
.plot:focus-visible { outline: 2px solid var(--color-1); outline-offset: 3px; }
.heat path { fill: var(--color-2); }
.plot svg, .heat svg {
  position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; clip-path: inset(-1px -5px);
}
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-width: 2px; }
.plot path.faint { opacity: .3; stroke-width: 1px; }
.plot path.thread { opacity: .5; stroke-width: 1.5px; }
.plot path.dots { stroke-width: 7px; stroke-linecap: round; }
.axes span { position: absolute; font-size: 12px; line-height: 1; color: var(--soft); white-space: nowrap; }
.axes i { position: absolute; left: 0; right: 0; border-top: 1px solid var(--grid); }
.axes .y { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.axes .x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
.axes .mark {
  left: 0; right: 0; border-top: 1.5px dashed var(--color-6); text-align: right; padding-top: 4px;
}
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.readout {
  position: absolute; top: 4px; padding: 6px 10px; border-radius: 7px; font-size: 12.5px; white-space: nowrap;
  background: var(--ink); color: var(--paper); pointer-events: none; z-index: 1;
}
.readout b { display: block; }

.panel { padding: 16px; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; margin-bottom: 14px; gap: 1px; }
.panel > p { margin: 0 0 10px; }
.panel > :last-child { margin-bottom: 0; }
.panel > .note { margin-top: 12px; font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td {
  text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
}
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
.number { text-align: right; }
.number, thead + tbody td { white-space: nowrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.sample { margin: 0; }
.sample figcaption { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
.sample pre {
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, monospace;
}
.sample mark { background: none; color: var(--color-1); font-weight: 700; }
.fall { list-style: none; margin: 0; padding: 0; }
.fall li {
  display: grid; grid-template-columns: minmax(0, 290px) minmax(0, 1fr) 76px 60px; gap: 0 14px; align-items: center;
}
.fall svg { width: 100%; height: 100%; min-height: 48px; overflow: visible; }
.fall path { stroke: var(--soft); stroke-width: 1px; stroke-dasharray: 2 2; vector-effect: non-scaling-stroke; }
.fall b, .fall em { text-align: right; font-style: normal; white-space: nowrap; }
.fall b { font-weight: 500; }
.fall em { color: var(--soft); }
.fall small { display: block; font-size: 13px; line-height: 1.35; color: var(--soft); }
.fall .total span, .fall .total b { font-weight: 650; }
.tower { position: relative; height: 400px; margin: 12px 0 12px 76px; }
.tower svg {
  position: absolute; width: 27%; height: 100%; overflow: visible;
  outline: 1px dashed var(--soft); outline-offset: -1px;
}
.tower rect { stroke: var(--card); stroke-width: 1px; vector-effect: non-scaling-stroke; }
.tower path { stroke: var(--ink); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.tower .name {
  left: calc(27% + 14px); right: 0; transform: translateY(-50%); overflow: hidden; text-overflow: ellipsis;
  font-size: 13px; line-height: 17px;
}
.tower .name b { color: var(--ink); font-weight: 600; }
.tower .beyond {
  width: 27%; padding: 0 6px; transform: translateY(-50%); color: var(--card); text-align: center;
  font-size: 13px; font-weight: 650; line-height: 17px; white-space: normal;
}
.strip { display: block; width: 110px; height: 12px; margin-top: 5px; }
.strip rect { stroke: none; }
details { margin-top: 12px; }
.panel > details { margin-top: 0; }
summary { cursor: pointer; font-weight: 500; padding: 4px 0; }
input {
  font: inherit; color: inherit; width: 100%; max-width: 420px; padding: 7px 11px; margin: 8px 0;
  background: var(--paper); border: 1px solid var(--line); border-radius: 7px;
}
.config td { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.config td:first-child { width: 45%; color: var(--soft); }

@media (min-width: 760px) { .columns.uneven { grid-template-columns: minmax(0, 21fr) minmax(0, 19fr); } }
@media (max-width: 1000px) { .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
@media (max-width: 640px) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .fall li { grid-template-columns: minmax(0, 1fr) auto 56px; padding: 8px 0 0; }
  .fall svg { grid-row: 2; grid-column: 1 / 4; min-height: 26px; height: 26px; }
}
@media (max-width: 900px) { .chart, .chart.third { grid-column: span 6; } }
@media (max-width: 500px) {
  main, header, footer { padding-left: 12px; padding-right: 12px; }
  header { padding-top: 20px; }
  .cards { gap: 8px; }
  .card { padding: 11px 12px; }
  .card dd { font-size: 21px; }
  .chart, .panel { padding: 12px; }
  .plot, .third .plot { height: 210px; }
  .tower { margin-left: 62px; }
}
@media print { body { background: none; } .chart, .panel, .card { break-inside: avoid; } }
"""

_SCRIPT = """
for (const plot of document.querySelectorAll('.plot')) {
  const data = JSON.parse(plot.querySelector('script').textContent);
  const cursor = plot.querySelector('.cursor'), readout = plot.querySelector('.readout');
  const all = data.lines.flatMap(line => line.points.map(point => point[0]));
  const steps = [...new Set(all)].sort((a, b) => a - b);
  let at = steps.length - 1;
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle + 1; else high = middle;
    }
    const before = points[low - 1];
    return before && x - before[0] < points[low][0] - x ? before : points[low];
  };
  const show = x => {
    const share = (x - data.left) / (data.right - data.left);
    readout.replaceChildren(Object.assign(document.createElement('b'), {
      textContent: 'step ' + x.toLocaleString('en')}));
    for (const line of data.lines) {
      const [step, value] = nearest(line.points, x);
      const here = step === x ? '' : ' (step ' + step.toLocaleString('en') + ')';
      readout.append(line.name + ' ' + Number(value.toPrecision(5)) + here, document.createElement('br'));
    }
    cursor.hidden = readout.hidden = false;
    cursor.style.left = 100 * share + '%';
    const room = plot.clientWidth - readout.offsetWidth;
    readout.style.left = Math.max(-40, Math.min(room, share * plot.clientWidth + 10)) + 'px';
  };
  const hide = () => { cursor.hidden = readout.hidden = true; };
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect();
    const x = data.left + (event.clientX - box.left) / box.width * (data.right - data.left);
    const step = nearest(steps.map(step => [step]), x)[0];
    at = steps.indexOf(step);
    show(step);
  });
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9}[event.key];
    if (event.key === 'Escape') hide();
    if (move === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(steps.length - 1, at + move));
    show(steps[at]);
  });
}
for (const filter of document.querySelectorAll('input[data-filters]')) {
  const rows = document.querySelectorAll('#' + filter.dataset.filters + ' tr');
  filter.addEventListener('input', () => {
    const words = filter.value.toLowerCase().split(/\\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}
"""


def page(title: str, header: str, main: str, footer: str, head: str = '') -> str:
    """The whole document around three pieces of HTML; `title` is plain text, `head` further HTML for `<head>`."""
    return (
        f'{_HEAD}<title>{escape(title)}</title>\n<style>{_STYLE}</style>{head}\n</head>\n<body>\n'
        f'<header>\n{header}\n</header>\n<main>\n{main}\n</main>\n<footer>{footer}</footer>\n'
        f'<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


def section(title: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2>\n{body}</section>'


def card(name: str, value: str, note: str, look: Literal['', 'good', 'bad'] = '') -> str:
    """A number that one asks for first; they stand in a `<dl class="cards">`."""
    kind = f' class="{look}"' if look else ''
    small = f'<small{kind}>{escape(note)}</small>'
    return f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Cells are HTML; all columns after the first `words` hold numbers."""
    kinds = [*[''] * words, *[' class="number"'] * (len(head) - words)]
    top = ''.join(f'<th scope="col"{kind}>{name}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = [''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    body = ''.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
