"""What the commands print: tables of a fit, of valleys, of an envelope, of counts and of a budget."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpu_llm.parallel.chips import Slice
from tpu_llm.scaling.allocate import Allocation, Estimate, allocate, exponents, no_optimum
from tpu_llm.scaling.envelope import Envelope
from tpu_llm.scaling.fit import Fit, quantiles
from tpu_llm.scaling.laws import Chinchilla, Kaplan, Repeats
from tpu_llm.scaling.points import Points
from tpu_llm.scaling.points import Table as Runs
from tpu_llm.scaling.spend import Choice, Guess, Spending
from tpu_llm.scaling.valleys import PowerLaw, Profiles

_KNOWN = 1e3  # a standard error of more times its constant says nothing
_FORMS = {
    Chinchilla: 'L = E + A / N^alpha + B / D^beta',
    Kaplan: 'L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D',
    Repeats: "L = E + A / N'^alpha + B / D'^beta, R_D and R_N being how many repeats are worth something",
}


def table(*columns: str) -> Table:
    """The first column is of words, the others of numbers."""
    made = Table(box=None, pad_edge=False, header_style='bold')
    for number, column in enumerate(columns):
        made.add_column(column, justify='right' if number else 'left', no_wrap=True)
    return made


def short(value: float) -> str:
    """Three digits, with k, M, B or T from a thousand to a thousand billions."""
    for unit, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if unit <= abs(value) < 1000 * unit:
            return f'{value / unit:.3g}{letter}'
    return f'{value:.3g}'


def between(low: float, high: float) -> str:
    """`2.1M to 2.3M`; nothing where there is no interval."""
    return f'{short(low)} to {short(high)}' if np.isfinite(low) and np.isfinite(high) else ''


def told(each: Estimate) -> str:
    interval = between(each.low, each.high)
    return f'{short(each.value)} ({interval})' if interval else short(each.value)


def there(runs: Runs, fitted: Points, held: Points) -> str:
    """How many runs a table has, and how many of them are not fitted."""
    dropped = len(runs.points) - len(fitted) - len(held)
    also = [f'{dropped} of highest loss dropped'] if dropped else []
    also += [f'{len(held)} held out'] if len(held) else []
    return ', '.join([str(runs), *also])


def fit(found: Fit, runs: Runs, fitted: Points, held: Points, budgets: Sequence[float], cost: float) -> RenderableType:
    """Constants with errors and intervals, where the law puts these budgets, and how it does on what was held out."""
    return Group(*_fit(found, runs, fitted, held, budgets, cost))


def _fit(
    found: Fit, runs: Runs, fitted: Points, held: Points, budgets: Sequence[float], cost: float
) -> Iterator[RenderableType]:
    yield Text(there(runs, fitted, held))
    yield Text(f'{_FORMS[type(found.law)]}, by Huber loss of ln L over {found.runs} runs')
    rows = table('constant', 'value', 'standard error', '95% of bootstraps')
    for i, label in enumerate(found.law.labels):
        draws = found.draws[:, i]
        value, error = found.constants[i], found.standard_errors[i]
        said = f'{error:.3g}' if error <= _KNOWN * abs(value) else '–'
        rows.add_row(label, f'{value:.5g}', *([said, between(*quantiles(draws))] if len(draws) else ['', '']))
    yield rows
    yield Text(f'error of L: {found.spread:.2%} (root mean square)')
    if problem := no_optimum(found):
        yield Text(problem)
    elif not isinstance(found.law, Repeats):
        size, tokens = exponents(found)
        yield Text(f'compute-optimal: N as C^{told(size)}, D as C^{told(tokens)}')
        yield _budgets(found, budgets, cost)
    if len(held):
        yield Text('')
        yield _held(found, held)
    yield from (Text(f'warning: {line}') for line in found.warnings)


def _budgets(found: Fit, budgets: Sequence[float], cost: float) -> Table:
    rows = table('FLOPs', 'N', 'D', 'D / N', 'loss')
    for flops in budgets:
        best = allocate(found, flops, cost)
        ratio = best.tokens.value / best.parameters.value
        loss = f'{best.loss.value:.4f}'
        if np.isfinite(best.loss.low):
            loss += f' ({best.loss.low:.4f} to {best.loss.high:.4f})'
        rows.add_row(f'{flops:.3g}', told(best.parameters), told(best.tokens), f'{ratio:.3g}', loss)
    return rows


def _held(found: Fit, held: Points) -> Table:
    predicted = found.predict(held)
    bounds = found.interval(held) if len(found.draws) else None
    rows = table('held out', 'N', 'D', 'FLOPs', 'loss', 'predicted', '95% of bootstraps', 'error')
    for i, name in enumerate(held.names):
        interval = f'{bounds[0, i]:.4f} to {bounds[1, i]:.4f}' if bounds is not None else ''
        sizes = [short(held.parameters[i]), short(held.tokens[i]), f'{held.flops[i]:.3g}']
        error = f'{predicted[i] / held.loss[i] - 1:+.2%}'
        rows.add_row(name, *sizes, f'{held.loss[i]:.4f}', f'{predicted[i]:.4f}', interval, error)
    return rows


def profiles(found: Profiles) -> RenderableType:
    rows = table('isoFLOP valley', 'sizes', 'N at its minimum', 'D', 'loss')
    for valley in found.valleys:
        numbers = ['', '', ''] if valley.problem else [told(valley.parameters), told(valley.tokens)]
        if not valley.problem:
            loss = f'{valley.loss.value:.4f}'
            if np.isfinite(valley.loss.low):
                loss += f' ({valley.loss.low:.4f} to {valley.loss.high:.4f})'
            numbers.append(loss)
        rows.add_row(f'{valley.flops:.3g}', f'{len(valley.near)} of {len(valley.runs)}', *numbers)
    lines = [Text(f'warning: {line}') for line in found.warnings]
    return Group(rows, *_laws(found.parameters, found.tokens), *lines)


def _laws(size: PowerLaw | None, tokens: PowerLaw | None) -> Iterator[Text]:
    for letter, law in (('N', size), ('D', tokens)):
        if law is not None:
            yield Text(f'{letter} = {law.scale.value:.3g} C^{told(law.power)}')


def envelope(found: Envelope) -> RenderableType:
    rows = table('FLOPs from', 'lowest run', 'N', 'D', 'loss')
    changes = np.flatnonzero(np.diff(found.lowest, prepend=-1))
    for i in changes:
        rows.add_row(
            f'{found.flops[i]:.3g}',
            found.names[found.lowest[i]],
            short(found.parameters[i]),
            short(found.tokens[i]),
            f'{found.loss[i]:.4f}',
        )
    lines = [Text(f'warning: {line}') for line in found.warnings]
    return Group(rows, *_laws(found.size_law, found.token_law), *lines)


def budget(where: Slice, hours: float, mfu: float, best: Allocation, about: Guess) -> RenderableType:
    """The law's answer, whatever sizes there are."""
    rows = {
        'FLOPs': f'{best.flops:.3g}: {where.chips} chips for {hours:g} hours at {mfu:.0%} of the peak (a guess)',
        'parameters': told(best.parameters),
        'tokens': f'{told(best.tokens)}, {best.tokens.value / best.parameters.value:.3g} a parameter',
        'loss': f'{best.loss.value:.4f} ({best.loss.low:.4f} to {best.loss.high:.4f})',
        'chip-hours': f'{where.chips * hours:,.0f}',
        'batch': f'{short(about.batch_tokens)} tokens, rate {about.learning_rate:.2g}: guesses by the laws of DeepSeek '
        'LLM (arXiv 2401.02954)',
    }
    return Group(Text(f'{where}, {hours:g} hours'), pairs(rows))


def choices(found: Sequence[Choice]) -> RenderableType:
    rows = table('candidate', 'N', 'D', 'D / N', 'predicted loss')
    for each in found:
        ratio = f'{each.tokens / each.parameters:.3g}'
        rows.add_row(each.spec, short(each.parameters), short(each.tokens), ratio, f'{each.loss:.4f}')
    return rows


def spending(found: Spending, where: Slice, hours: float) -> RenderableType:
    laid, best = found.layout, found.choice
    how = 'predicted from the compiled step' if laid.compiled else 'a guess in closed form; --compiles=3 compiles'
    rows = {
        'candidate': f'{best.spec}, {short(best.parameters)} parameters',
        'layout': ' '.join(laid.changes),
        'a step': f'{laid.seconds:.3g} s, {laid.mfu:.0%} of the peak ({how})',
        'batch': f'{found.batch_tokens:,} tokens',
        'steps': f'{found.steps:,}, {short(found.steps * found.batch_tokens)} tokens in '
        f'{found.steps * laid.seconds / 3600:.3g} of {hours:g} hours',
        'chip-hours': f'{found.steps * laid.seconds / 3600 * where.chips:,.0f}',
        'loss': f'{best.loss:.4f}',
    }
    return pairs(rows)


def pairs(values: Mapping[str, str]) -> Table:
    made = table('', '')
    made.show_header = False
    made.columns[1].justify = 'left'
    made.columns[1].no_wrap = False
    for name, value in values.items():
        made.add_row(name, value)
    return made
