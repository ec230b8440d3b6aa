"""Says, without a TPU, whether a run fits a slice of TPUs, how fast it would be and what holds it up.

    python launch/plan.py --config=configs/pods/llama2_7b_v5e_256.py
    python launch/plan.py --config=configs/pods/llama31_8b_grpo_v6e_64.py
    python launch/plan.py --config=configs/pretrain.py:size=1b --topology=v6e-64 --config.model.remat=full
    python launch/plan.py --config=configs/pretrain.py:size=1b --topology=v6e-64 --search
    python launch/plan.py --config=configs/pretrain.py:size=8b --topologies=v5e-256,v6e-64,v5p-64

It compiles the very step that launch/run.py would run, and of a policy's run rollout and scoring too, for the real
topology, on the CPU (pip install -e '.[plan]'), in a minute or two; the second time it takes seconds. All that it says
is predicted: nothing runs.

--config     FILE.py or FILE.py:arg, and --config.… as for launch/run.py
--topology   v5e-256 or v5e:16x16, 2xv4-3072 for two slices; default: the SLICE of the config's page
--topologies several, joined by commas: a line each, and what the run would cost on them
--fix        where it does not fit: tries what saves memory, each with a compile
--search     tries other meshes, microbatches and remat, the most promising with a compile; prints the best as flags
--compiles   how many compiles --search may take; default 5
--workdir    writes plan.json there, with which the run compares itself
--html       writes the plan as a page to this file
--json       prints the plan as JSON, and nothing else
--dump       writes program.hlo.txt, memory.json and plan.json, and what the compiler notes, to this folder
--cache      where compiled programs are kept; default ~/.cache/tpu_llm/plans, an empty --cache= keeps none
--debug      shows the traceback of a mistake, too
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

# Before jax is imported: planning needs no accelerator and must not take one that a run has.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpu_llm.command_line import find, load, unknown  # noqa: E402
from tpu_llm.config import ConfigError, RunError  # noqa: E402
from tpu_llm.plan.prices import PRICES  # noqa: E402


def main(argv: list[str]) -> int:
    try:
        return plan(argv)
    except (ConfigError, RunError, flags.Error, OSError) as error:
        if '--debug' in argv:
            raise
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130


def plan(argv: list[str]) -> int:
    """Returns 0 where it fits, 3 where it does not."""
    options = _flags()
    overrides = options(argv, known_only=True)[1:]
    if options['help'].value:
        print(__doc__)
        return 0
    names = [f'--{name}' for name in options]
    if options['config'].value is None:
        raise ConfigError(
            unknown(overrides[0], None, names) if overrides else 'no config given: --config=FILE.py[:arg]'
        )
    _together(options)
    spec = options['config'].value
    run = load(spec, overrides, names)
    spec = ' '.join([spec, *overrides])

    from rich.console import Console

    from tpu_llm.models.encoder import EncoderConfig
    from tpu_llm.models.encoder_decoder import EncoderDecoderConfig
    from tpu_llm.plan.cache import Cache, default

    if isinstance(getattr(run, 'model', None), (EncoderConfig, EncoderDecoderConfig)):
        raise ConfigError(f'{spec} trains a model of type {type(run.model).__name__}; only decoders can be planned')

    folder = options['cache'].value
    cache = default() if folder is None else Cache(Path(folder)) if folder else None
    console = Console() if sys.stdout.isatty() else Console(width=120)  # piped, nothing is cut at 80
    if options['topologies'].value:
        from tpu_llm.plan.tell import compare

        return compare(run, spec, options['topologies'].value.split(','), cache, console, PRICES)
    where = _slice(options['topology'].value, options['config'].value)
    if options['search'].value:
        from tpu_llm.plan.tell import search

        return search(run, spec, where, int(options['compiles'].value or 1), cache, console)
    return _one(run, spec, where, cache, console, options)


def _one(run: Any, spec: str, where: Any, cache: Any, console: Any, options: flags.FlagValues) -> int:
    from tpu_llm.plan import plan as plans
    from tpu_llm.plan.page import write_page
    from tpu_llm.plan.show import show

    dump = Path(options['dump'].value) if options['dump'].value else None
    quiet = options['json'].value
    with console.status(f'compiling for {where}') if not quiet else contextlib.nullcontext():
        made = plans.make_plan(run, where, config=spec, cache=cache, dump=dump)
    price, text = PRICES.get(where.chip.name), json.dumps(plans.plain(made), indent=1)
    print(text) if quiet else console.print(show(made, price))
    if options['workdir'].value:
        from etils import epath

        workdir = epath.Path(options['workdir'].value)
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'plan.json').write_text(text)
    if options['html'].value:
        write_page(made, Path(options['html'].value), price)
    if dump:
        (dump / 'plan.json').write_text(text)
        (dump / 'memory.json').write_text(json.dumps(plans.plain(made)['memory'], indent=1))
    if options['fix'].value and not made.fits and not quiet:
        from tpu_llm.plan.tell import fix

        return fix(run, spec, where, cache, console)
    return 0 if made.fits else 3


def _flags() -> flags.FlagValues:
    options = flags.FlagValues()
    for name in ('config', 'topology', 'topologies', 'workdir', 'html', 'dump', 'cache'):
        flags.DEFINE_string(name, None, '', flag_values=options)
    for name in ('search', 'fix', 'json', 'debug'):
        flags.DEFINE_bool(name, False, '', flag_values=options)
    flags.DEFINE_integer('compiles', 5, '', lower_bound=1, flag_values=options)
    flags.DEFINE_bool('help', False, '', short_name='h', flag_values=options)
    return options


# Beside a search or several slices there is no single plan to write, and JSON comes alone.
_NOT_BESIDE = {
    'search': ('topologies', 'fix', 'json', 'html', 'dump', 'workdir'),
    'topologies': ('topology', 'fix', 'json', 'html', 'dump', 'workdir'),
    'json': ('fix',),
}


def _together(options: flags.FlagValues) -> None:
    """Raises ConfigError for flags of which one would do nothing."""
    for name, others in _NOT_BESIDE.items():
        for other in others:
            if options[name].value and options[other].value:
                raise ConfigError(f'--{name} does not go with --{other}; leave one of them out')


def _slice(topology: str | None, spec: str) -> Any:
    """The slice asked for, or the one that the config's page is for."""
    from tpu_llm.parallel import chips

    if topology:
        return chips.find(topology)
    page = find(spec.partition(':')[0])
    slices = [getattr(module, 'SLICE', None) for module in list(sys.modules.values())
              if getattr(module, '__file__', None) == str(page)]  # fmt: skip
    if not any(slices):
        raise ConfigError(f'{spec} names no slice; give one: --topology=v5e-256')
    return chips.find(next(filter(None, slices)))


if __name__ == '__main__':
    sys.exit(main(sys.argv))
