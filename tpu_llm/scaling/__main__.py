"""Scaling laws, from counts of a model to what a pod is best spent on, and the page of a sweep.

    python -m tpu_llm.scaling count --config=configs/pretrain.py:size=1b
    python -m tpu_llm.scaling fit runs/isoflop_stdlib/table.csv --hold-out=1 --json > fit.json
    python -m tpu_llm.scaling fit points.csv --columns='N=Model Size,C=Training FLOP' --drop-highest=5
    python -m tpu_llm.scaling valleys runs/isoflop_stdlib/table.csv
    python -m tpu_llm.scaling envelope curves.csv
    python -m tpu_llm.scaling serve --fit=fit.json --flops=1e22 --served=1e13
    python -m tpu_llm.scaling budget --fit=fit.json --chips=v5e-256 --hours=24
    python -m tpu_llm.scaling coordinates --config=configs/quickstart.py:smoke
    python -m tpu_llm.scaling report runs/isoflop_stdlib

`python -m tpu_llm.scaling COMMAND --help` lists a command's options; docs/scaling.md is the tour.
"""

import os

# Before NumPy is imported: its matrices here are tiny, and BLAS's threads cost far more than they compute.
for _name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS'):
    os.environ.setdefault(_name, '1')
# These commands compute on the host and compile for TPUs that are elsewhere.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import argparse  # noqa: E402
import sys  # noqa: E402

from tpu_llm.config import ConfigError  # noqa: E402
from tpu_llm.scaling import commands  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tpu_llm.scaling', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, (add, _) in commands.COMMANDS.items():
        about = (add.__doc__ or '').splitlines()[0]
        add(parsers.add_parser(name, help=about, description=about, allow_abbrev=False))
    options, options.rest = parser.parse_known_args(argv)
    if options.rest and options.command not in commands.CONFIGURED:
        parser.error(f'unknown: {" ".join(options.rest)}')
    try:
        return commands.COMMANDS[options.command][1](options)
    except BrokenPipeError:
        return 0
    except (ConfigError, OSError) as error:
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
