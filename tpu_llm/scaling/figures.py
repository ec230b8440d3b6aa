"""Figures of many runs, drawn by plotly in the reader's browser: zoomed with the pointer, runs switched off by name.

A figure is JSON in the page, and one copy of plotly's script in the page draws them all, so nothing is fetched. Colours
are said by name (`hue`, `ramp`, `var(--ink)`): they take on the page's values, light or dark, also when those change.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

from tpu_llm.config import ConfigError
from tpu_llm.train.page import page

HUES, SHADES = 7, 9
FLOPS = ('FLOPs', 'budget')  # what is told by powers of ten
LOG_FROM = 4.0  # sizes and rates whose greatest is this many times the least are shown on a logarithmic axis

# Hues differ for the colour-blind, too (a test measures by how much); shades are of matplotlib's plasma, least first.
_LIGHT = {
    'hue': ('#0072b2', '#d55e00', '#00a37a', '#2b1055', '#4fb3ea', '#6b4413', '#e07bb5'),
    'shade': ('#0d0887', '#3f049c', '#6600a7', '#8a09a5', '#aa2395', '#c43e7f', '#da5a6a', '#eb7655', '#f89540'),
}
_DARK = {
    'hue': ('#47b4eb', '#f08c2e', '#1fae84', '#ffe9f5', '#f2c800', '#6f6ae8', '#b8326e'),
    'shade': ('#a11b9b', '#ba3388', '#ce4b75', '#e06363', '#ee7b51', '#f9973f', '#fdb52e', '#fbd724', '#f0f921'),
}


def _named(colors: Mapping[str, Sequence[str]]) -> str:
    return ' '.join(f'--{kind}-{i}: {color};' for kind, values in colors.items() for i, color in enumerate(values))


_STYLE = (
    f"""
:root {{ {_named(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_named(_DARK)} }} }}
"""
    + """
.charts + .panel { margin-top: 16px; }
.panel > .scroll + .scroll { margin-top: 14px; }
.chart.whole { grid-column: span 6; }
.drawing { height: 340px; margin-top: 8px; }
.whole .drawing { height: 460px; }
.third .drawing { height: 240px; }
.picks { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 8px 0 2px; font-size: 13px; }
.picks label { color: var(--soft); }
.picks select {
  font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
  padding: 3px 6px; margin-left: 4px; max-width: 100%;
}
.picks input { width: auto; margin: 0 4px 0 0; vertical-align: -1px; }
.chart .legend { max-height: 104px; overflow-y: auto; gap: 2px 12px; }
.legend button {
  font: inherit; color: inherit; background: none; border: 0; padding: 2px 0; cursor: pointer; text-align: left;
  overflow-wrap: anywhere;
}
.legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.runs .scroll { max-height: 75vh; overflow: auto; }
.runs thead th { position: sticky; top: 0; background: var(--card); cursor: pointer; user-select: none; }
.runs th[aria-sort=ascending]::after { content: ' ↑'; }
.runs th[aria-sort=descending]::after { content: ' ↓'; }
.runs small { display: block; max-width: 340px; color: var(--soft); white-space: normal; }
.card small { overflow-wrap: anywhere; }
.prose { margin-top: 20px; }
.prose td { white-space: normal; min-width: 92px; }
.prose > p, .prose > ul { max-width: 84ch; margin: 0 0 12px; }
.prose > ul { padding-left: 22px; }
.prose h2 { margin: 26px 0 10px; }
.prose .scroll { margin: 0 0 14px; }
.prose pre { overflow-x: auto; margin: 0 0 12px; padding: 10px 12px; background: var(--paper); border-radius: 7px; }
.prose code { font: 13px/1.5 ui-monospace, monospace; }
.prose :not(pre, td) > code { overflow-wrap: anywhere; }
.prose a { color: var(--color-1); }
@media (max-width: 500px) { .drawing, .whole .drawing { height: 300px; } .third .drawing { height: 220px; } }
"""
)

_SCRIPT = """
const painted = text => {
  const style = getComputedStyle(document.documentElement);
  return JSON.parse(text.replace(/var\\((--[\\w-]+)\\)/g, (_, name) => style.getPropertyValue(name).trim()));
};
const exponents = value => value.toExponential().replace('e+', 'e');
const compact = new Intl.NumberFormat('en', {notation: 'compact', maximumSignificantDigits: 3});
const fewTicks = (axis, values) => {  // round numbers on a logarithmic axis, where plotly's own are one or many
  const low = 0.95 * Math.min(...values), high = 1.05 * Math.max(...values), powers = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) powers.push(power);
  for (const steps of [[1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const all = powers.flatMap(power => steps.map(step => Number(`${step}e${power}`)));
    axis.tickvals = all.filter(value => low <= value && value <= high);
    if (axis.tickvals.length <= 6) break;
  }
  const short = value => compact.format(value).replace('K', 'k');
  axis.ticktext = axis.tickvals.map(axis.exponentformat === 'power' ? exponents : short);
};
const ends = (trace, side) => {  // values, and where their bars of error end
  const values = trace[side], {array, arrayminus} = trace['error_' + side] || {};
  return array ? values.flatMap((value, i) => [value - arrayminus[i], value, value + array[i]]) : values;
};
const drawings = [...document.querySelectorAll('.drawing')].map(canvas => {
  const text = canvas.nextElementSibling.textContent, off = new Set();
  const figure = canvas.closest('figure'), legend = figure.querySelector('.legend');
  const picks = [...document.querySelectorAll('[data-pick]')].filter(pick => (
    figure.contains(pick) || figure.dataset.follows && pick.dataset.pick === figure.dataset.follows));
  const picked = Object.fromEntries(picks.map(pick => [pick.name, pick]));
  const follow = (spec) => {  // the curves that are picked, in place of data that are there from the start
    const {metrics, flops, groups} = spec.curves, axis = picked.axis.value, tracks = metrics[picked.metric.value];
    spec.data.forEach((trace, i) => {
      const [steps, tokens, values] = tracks[i] || [[], [], []];
      trace.x = axis === 'steps' ? steps : axis === 'tokens' ? tokens : tokens.map(seen => seen * flops[i]);
      trace.y = values;
      trace.mode = values.length > 12 ? 'lines' : 'lines+markers';
      [trace.legendgroup, trace.line.color, trace.line.dash] = groups[picked.color.value][i];
      trace.marker = {color: trace.line.color, size: 5};
    });
    spec.layout.xaxis.title.text = axis;
    spec.layout.xaxis.exponentformat = axis === 'FLOPs' ? 'power' : 'B';
    spec.layout.xaxis.type = picked.logx.checked ? 'log' : 'linear';
    spec.layout.yaxis.type = picked.logy.checked ? 'log' : 'linear';
  };
  const list = (data) => {
    const looks = new Map();
    for (const {legendgroup, line, marker} of data) {
      const color = line?.color || marker?.color;
      if (legendgroup && color && !looks.has(legendgroup)) looks.set(legendgroup, [color, line?.dash]);
    }
    legend.replaceChildren(...(looks.size < 2 ? [] : [...looks]).map(([group, [color, dash]]) => {
      const item = document.createElement('li'), button = document.createElement('button');
      const swatch = document.createElement('i');
      if (!dash || dash === 'solid') swatch.style.background = color;
      else swatch.style.border = `3px ${dash === 'dash' ? 'dashed' : 'dotted'} ${color}`;
      button.type = 'button';
      button.ariaPressed = !off.has(group);
      button.append(swatch, group);
      button.onclick = () => { off.delete(group) || off.add(group); draw(); };
      button.ondblclick = () => {
        const others = [...looks.keys()].filter(name => name !== group), alone = others.every(name => off.has(name));
        off.clear();
        if (!alone) others.forEach(name => off.add(name));
        draw();
      };
      item.append(button);
      return item;
    }));
  };
  const draw = () => {
    const spec = painted(text);
    if (spec.curves) follow(spec);
    if (spec.choices) [spec.data, spec.layout.yaxis.range] = spec.choices[picked.metric.value] || [[], null];
    for (const trace of spec.data) trace.visible = !off.has(trace.legendgroup);
    const focus = legend.contains(document.activeElement) && document.activeElement.textContent;
    list(spec.data);
    [...legend.querySelectorAll('button')].find(button => button.textContent === focus)?.focus();
    figure.hidden = !spec.data.length;
    if (figure.hidden) return;
    for (const side of 'xy') {
      const axis = spec.layout[side + 'axis'];
      const values = spec.data.flatMap(trace => ends(trace, side)).filter(value => value > 0);
      if (axis.type === 'log' && !axis.tickvals && values.length) fewTicks(axis, values);
    }
    spec.layout.uirevision = ['zoom', ...picks.map(pick => pick.value + pick.checked)].join();  // what keeps the zoom
    // A finger that drags on a figure scrolls the page.
    spec.layout.dragmode = matchMedia('(pointer: coarse)').matches ? false : 'zoom';
    Plotly.react(canvas, spec.data, spec.layout, {displayModeBar: false, responsive: true});
  };
  for (const pick of picks) pick.addEventListener('change', () => { if (pick.name === 'color') off.clear(); draw(); });
  draw();
  return draw;
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => drawings.forEach(draw => draw()));
for (const head of document.querySelectorAll('.runs thead th')) {
  const row = head.parentElement, body = row.closest('table').tBodies[0], at = [...row.cells].indexOf(head);
  const key = line => line.cells[at].querySelector('data')?.value ?? line.cells[at].textContent;
  head.tabIndex = 0;
  const sort = () => {
    const sign = head.ariaSort === 'ascending' ? -1 : 1;
    for (const other of row.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? 'ascending' : 'descending';
    const order = (a, b) => a === b ? 0 : a === '' ? 1 : b === '' ? -1 : sign * (
      a - b || a.localeCompare(b, 'en', {numeric: true}));
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
}
"""


def plotly() -> Any:
    """plotly.graph_objects, which checks every name of a trace and of a layout as it is made."""
    try:
        from plotly import graph_objects
    except ImportError:
        raise ConfigError("a page of many runs is drawn by plotly: pip install -e '.[report]'") from None
    return graph_objects


def drawn_page(title: str, header: str, main: str) -> str:
    """A page, with plotly's script where there are figures in it."""
    plotly()
    from plotly.offline import get_plotlyjs

    style, said = f'<style>{_STYLE}</style>', 'Written by tpu_llm.'
    if '<div class="drawing"' not in main:
        return page(title, header, main, said, style)
    scripts = f'<script>{get_plotlyjs()}</script>\n<script>{_SCRIPT}</script>'
    hint = (
        'Drag in a figure to zoom, double-click to go back. A click on a name in a legend hides it, a double click '
        'leaves it alone.'
    )
    return page(title, header, f'{main}\n{scripts}', f'{hint} {said}', style)


def hue(i: int) -> str:
    """The colour of the i-th of several that have no order."""
    return f'var(--hue-{i % HUES})'


def shade(i: int, count: int) -> str:
    """The colour of the i-th of `count` in order."""
    return f'var(--shade-{round((SHADES - 1) * i / max(count - 1, 1))})'


def colors(values: Sequence[Any]) -> list[str]:
    """Of values in order: shades of three numbers or more, else hues."""
    ordered = len(values) > 2 and all(is_number(value) for value in values)
    return [shade(i, len(values)) if ordered else hue(i) for i in range(len(values))]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def axis(title: str = '', values: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    """An axis for these values: logarithmic for numbers that spread far, of names where they are no numbers."""
    found: dict[str, Any] = {
        'title': {'text': title, 'standoff': 6},
        'automargin': True,
        'gridcolor': 'var(--grid)',
        'linecolor': 'var(--line)',
        'zeroline': False,
        'exponentformat': 'power' if title in FLOPS else 'B',
    }
    if not all(is_number(value) for value in values):
        found['type'] = 'category'
    elif spreads(values):
        found['type'] = 'log'
    return found | more


def spreads(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) >= LOG_FROM * min(values)


def drawing(traces: Iterable[Any], xaxis: dict[str, Any], yaxis: dict[str, Any]) -> Any:
    go = plotly()
    clear = 'rgba(0,0,0,0)'
    layout = go.Layout(
        template='none',
        xaxis=xaxis,
        yaxis=yaxis,
        showlegend=False,
        hovermode='closest',
        margin={'l': 6, 'r': 14, 't': 10, 'b': 6},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        font={'family': 'system-ui, sans-serif', 'size': 12, 'color': 'var(--soft)'},
        hoverlabel={
            'bgcolor': 'var(--ink)',
            'bordercolor': 'var(--ink)',
            'font': {'color': 'var(--paper)'},
            'align': 'left',
            'namelength': -1,
        },
    )
    return go.Figure(list(traces), layout)


def figure(
    title: str, unit: str, drawn: Any, *, look: str = '', picks: str = '', follows: str = '', **more: Any
) -> str:
    """A `<figure>` with its legend, which the script fills; `more` is what the script takes beside data and layout.

    `follows` names picks elsewhere in the page that it obeys.
    """
    spec = json.loads(drawn.to_json()) | more
    told = json.dumps(spec, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
    names = list(dict.fromkeys(trace.name for trace in drawn.data if trace.name))
    spoken = escape(f'{title}, {unit}: {", ".join(names)}' if names else f'{title}, {unit}')
    return (
        f'<figure class="chart {look}" data-follows="{escape(follows)}">\n'
        f'<figcaption><h3>{escape(title)}</h3> <span class="unit">{escape(unit)}</span>{picks}'
        f'<ul class="legend"></ul></figcaption>\n'
        f'<div class="drawing" role="img" aria-label="{spoken}"></div>'
        f'<script type="application/json">{told}</script>\n</figure>'
    )


def choice(name: str, label: str, options: Sequence[str], chosen: str = '', pick: str = '') -> str:
    """A select; of `pick`, those figures whose `follows` says so obey it, else its own."""
    items = ''.join(f'<option{" selected" if option == chosen else ""}>{escape(option)}</option>' for option in options)
    return f'<label>{escape(label)}<select name="{name}" data-pick="{pick}">{items}</select></label>'


def box(name: str, label: str, checked: bool = False) -> str:
    state = ' checked' if checked else ''
    return f'<label><input type="checkbox" name="{name}" data-pick=""{state}>{escape(label)}</label>'


def charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def words(text: str) -> str:
    """Text for plotly's labels, which read a few tags of HTML."""
    return escape(text, quote=False)
