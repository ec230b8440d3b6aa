"""The commands of `python -m tpu_llm.scaling`: for each what it takes, and what it does."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.text import Text

from tpu_llm import command_line
from tpu_llm.config import ConfigError
from tpu_llm.parallel import chips
from tpu_llm.plan.cache import default
from tpu_llm.scaling import fit as fits
from tpu_llm.scaling import printed, saved
from tpu_llm.scaling.allocate import allocate, no_optimum
from tpu_llm.scaling.coordinates import add_coordinates, coordinates
from tpu_llm.scaling.counts import count
from tpu_llm.scaling.envelope import curves, envelope
from tpu_llm.scaling.laws import Chinchilla, Law, Repeats
from tpu_llm.scaling.points import Points, Table, drop_highest, hold_out, read
from tpu_llm.scaling.report import write_report
from tpu_llm.scaling.serving import optimal, trade
from tpu_llm.scaling.spend import MFU, choices, flops_of, guess, spend
from tpu_llm.scaling.valleys import Profiles, profiles

Options = argparse.Namespace


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _table(parser: argparse.ArgumentParser, about: str = "a sweep's table.csv, or any table") -> None:
    parser.add_argument('csv', metavar='CSV', help=about)
    parser.add_argument('--columns', default='', help="what other tables call theirs: 'N=Model Size,C=FLOP,loss=L'")
    parser.add_argument('--at-least', default='', help='leaves out runs whose column holds less: steps=200')
    parser.add_argument('--bootstraps', type=int, default=1000, help='default 1000')
    parser.add_argument('--seed', type=int, default=0, help='of the bootstraps')


def _read(options: Options) -> Table:
    limits = _pairs('--at-least', options.at_least, 'COLUMN=NUMBER')
    least = {name: number('--at-least', text) for name, text in limits.items()}
    return read(options.csv, _pairs('--columns', options.columns, 'N=COLUMN,D=COLUMN'), least)


def _pairs(flag: str, text: str, form: str) -> dict[str, str]:
    pairs = [part.partition('=') for part in text.split(',') if part.strip()]
    for name, equals, value in pairs:
        if not equals or not value:
            raise ConfigError(f'{flag}: {name!r} is no pair; write {form}')
    return {name.strip(): value.strip() for name, _, value in pairs}


# ------------------------------------------------------------------------------------------------------------ fit


def add_fit(parser: argparse.ArgumentParser) -> None:
    """fits a law to runs, with intervals, and predicts the runs that are held out"""
    _table(parser)
    parser.add_argument('--law', choices=list(saved.LAWS), default='chinchilla')
    parser.add_argument('--base', help='of --law=repeats: the fit of runs that saw each token once, as JSON')
    parser.add_argument('--drop-highest', type=int, default=0, metavar='COUNT', help='leaves out runs of highest loss')
    parser.add_argument('--hold-out', default='0', help='how many runs of most FLOPs are not fitted, or their names')
    parser.add_argument('--budgets', default='', help='FLOPs to allocate; default: what ran, and 10 times the most')
    parser.add_argument('--json', action='store_true', help='prints the fit as JSON, for --fit=…')


def fit(options: Options) -> int:
    table = _read(options)
    runs = drop_highest(table.points, options.drop_highest) if options.drop_highest else table.points
    fitted, held = hold_out(runs, _held(options.hold_out))
    law = _law(options)
    try:
        fits.check_enough(law, fitted)
    except ConfigError as error:
        raise ConfigError(f'{error}: {printed.there(table, fitted, held)}') from None
    found = fits.fit(law, fitted, bootstraps=options.bootstraps, seed=options.seed)
    valleys = _valleys(fitted, options) if table.budgets else None
    if options.json:
        print(json.dumps(saved.plain(found, held, table.left_out, valleys), indent=1, allow_nan=False))
        return 0
    cost = float(np.median(fitted.flops / fitted.parameters / fitted.tokens))
    console = _console()
    console.print(printed.fit(found, table, fitted, held, _budgets(options.budgets, fitted), cost))
    if valleys is not None:
        console.print()
        console.print(printed.profiles(valleys))
    return 0


def _law(options: Options) -> Law:
    if options.law != 'repeats':
        if options.base:
            raise ConfigError('--base is for --law=repeats; take it out')
        return saved.LAWS[options.law]()
    if not options.base:
        raise ConfigError('--law=repeats weighs repeats in the law of runs without them; give that: --base=FIT.json')
    base = saved.load(options.base)
    if not isinstance(base.law, Chinchilla):
        raise ConfigError(f'--base={options.base} is a fit of {type(base.law).__name__}; it is to be of chinchilla')
    e, a, b, alpha, beta = map(float, base.constants)
    return Repeats(base=(e, a, b, alpha, beta))


def _held(text: str) -> int | list[str]:
    return int(text) if text.isdigit() else [name.strip() for name in text.split(',')]


def _valleys(runs: Points, options: Options) -> Profiles | None:
    """Of a table that has them: without, the law is all there is to say."""
    try:
        return profiles(runs, bootstraps=options.bootstraps, seed=options.seed)
    except ConfigError:
        return None


def _budgets(text: str, runs: Points) -> list[float]:
    if text:
        return [number('--budgets', part) for part in text.split(',')]
    there = np.geomspace(runs.budget.min(), runs.budget.max(), 3)
    return [*there.tolist(), 10 * float(there[-1])]


def number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f'{name} = {text!r}; write a number above 0, such as 1e21')
    return value


# ------------------------------------------------------------------------------------------- valleys, envelope, count


def add_valleys(parser: argparse.ArgumentParser) -> None:
    """parabolas through the runs of each budget, and how their minima move"""
    _table(parser)


def valleys(options: Options) -> int:
    table = _read(options)
    console = _console()
    console.print(Text(str(table)))
    console.print(printed.profiles(profiles(table.points, bootstraps=options.bootstraps, seed=options.seed)))
    return 0


def add_envelope(parser: argparse.ArgumentParser) -> None:
    """the least loss of training curves at each number of FLOPs; a row is one moment of the run in column `name`"""
    _table(parser, 'a table of moments, or the folder of a sweep, whose runs logged theirs')


def show_envelope(options: Options) -> int:
    logged = epath.Path(options.csv).is_dir()
    if logged and (options.columns or options.at_least):
        raise ConfigError(f'--columns and --at-least are for a table, and {options.csv} is a folder; take them out')
    moments = curves(options.csv) if logged else _read(options).points
    _console().print(printed.envelope(envelope(moments, bootstraps=options.bootstraps, seed=options.seed)))
    return 0


def add_count(parser: argparse.ArgumentParser) -> None:
    """parameters and FLOPs of a config's model, exactly and as 6 N D has them"""
    parser.add_argument('--config', required=True, help='FILE.py or FILE.py:arg; --config.model.width=… as for a run')


def show_count(options: Options) -> int:
    run = command_line.load(options.config, options.rest)
    if not hasattr(run, 'model') or not hasattr(run, 'data'):
        raise ConfigError(f'{options.config} describes a {type(run).__name__}, which has no model and data to count')
    target = getattr(run.data.form, 'target_len', 0)
    counts = count(run.model, run.data.seq_len, target)
    rows = {
        'parameters': f'{counts.parameters:,}',
        'active': f'{counts.active:,}' + ('' if counts.active < counts.parameters else ' (all)'),
        'embeddings': f'{counts.embeddings:,} of them, {counts.embeddings / counts.parameters:.1%}',
        'FLOPs a token': f'{counts.flops:,.0f}, training on full rows of {counts.seq_len}',
        'of attention': ''
        if counts.attention is None
        else f'{counts.attention:,.0f}, {counts.attention / counts.flops:.1%}',
        '6 N': f'{counts.six:,.0f}, which is {counts.six / counts.flops - 1:+.1%}',
    }
    console = _console()
    console.print(Text(options.config))
    console.print(printed.pairs({name: value for name, value in rows.items() if value}))
    return 0


# ---------------------------------------------------------------------------------------------------- serve, budget


def _saved(options: Options) -> fits.Fit:
    """A fit that says where a budget goes."""
    fit = saved.load(options.fit)
    if problem := no_optimum(fit):
        raise ConfigError(f'{options.fit} has {problem}')
    return fit


def add_serve(parser: argparse.ArgumentParser) -> None:
    """how much smaller and longer to train a model that will serve so many tokens"""
    parser.add_argument('--fit', required=True, metavar='FIT.json')
    parser.add_argument('--flops', required=True, help='of a compute-optimal training, whose loss is to be reached')
    parser.add_argument('--served', required=True, help='tokens, prompts and answers, over the life of the model')
    parser.add_argument('--price', default='1', help='of a FLOP of serving over one of training; default 1')


def serve(options: Options) -> int:
    fit = _saved(options)
    served, price = number('--served', options.served), number('--price', options.price)
    first, _ = optimal(fit, number('--flops', options.flops), served, price)
    best = trade(fit, first.loss, served, price)
    rows = printed.table('', 'N', 'D', 'D / N', 'training', 'serving', 'in all')
    for name, each in (('compute-optimal', first), (f'for {printed.short(served)} tokens served', best)):
        sizes = [printed.short(each.parameters), printed.short(each.tokens), f'{each.tokens / each.parameters:.3g}']
        rows.add_row(name, *sizes, *(f'{value:.3g}' for value in (each.training, each.serving, each.total)))
    console = _console()
    console.print(Text(f'loss {first.loss:.4f}; FLOPs of serving count {price:g} each'))
    console.print(rows)
    console.print(Text(f'saved: {1 - best.total / first.total:.1%} of all FLOPs'))
    return 0


def add_budget(parser: argparse.ArgumentParser) -> None:
    """the size, tokens, batch and layout that chips and hours are best spent on"""
    parser.add_argument('--fit', required=True, metavar='FIT.json')
    parser.add_argument('--chips', required=True, help='a slice: v5e-256, 2xv4-3072')
    parser.add_argument('--hours', required=True)
    parser.add_argument('--mfu', default=str(MFU), help=f'the share of the peak to count on; default {MFU}')
    parser.add_argument('--config', action='append', default=[], help='a candidate; once for each size there is')
    parser.add_argument('--compiles', type=int, default=0, help='layouts to compile (needs libtpu); default: none')


def budget(options: Options) -> int:
    fit, where = _saved(options), chips.find(options.chips)
    hours, mfu = number('--hours', options.hours), number('--mfu', options.mfu)
    if options.compiles < 0 or (options.compiles and not options.config):
        raise ConfigError('--compiles is how many layouts of a candidate are compiled; name one or more: --config=…')
    best = allocate(fit, flops_of(where, hours, mfu))
    console = _console()
    console.print(printed.budget(where, hours, mfu, best, guess(best.flops)))
    if options.config:
        runs = {spec: command_line.load(spec, options.rest) for spec in options.config}
        console.print()
        console.print(printed.choices(choices(fit, runs, best.flops)))
        spent = spend(fit, runs, where, hours, mfu, compiles=options.compiles, cache=default())
        console.print()
        console.print(printed.spending(spent, where, hours))
    return 0


# ----------------------------------------------------------------------------------------------------------- report


def add_report(parser: argparse.ArgumentParser) -> None:
    """a sweep's runs on one page: curves, settings, valleys, a law, the table"""
    parser.add_argument('workdir', metavar='WORKDIR', help='the folder of a sweep')
    parser.add_argument('--metric', default='loss', metavar='COLUMN', help='of table.csv, such as final.bits_per_byte')
    parser.add_argument('--highest', action='store_true', help='more of the metric is better; default: less')


def report(options: Options) -> int:
    print(write_report(options.workdir, options.metric, highest=options.highest))
    return 0


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[Options], Any]]] = {
    'fit': (add_fit, fit),
    'valleys': (add_valleys, valleys),
    'envelope': (add_envelope, show_envelope),
    'count': (add_count, show_count),
    'serve': (add_serve, serve),
    'budget': (add_budget, budget),
    'coordinates': (add_coordinates, coordinates),
    'report': (add_report, report),
}
CONFIGURED = ('count', 'budget', 'coordinates')  # these take --config.field=value, too
