"""A sweep of configs that train nothing: what a run can do to the sweep it is in, in milliseconds."""

import dataclasses
import os
import pathlib
import signal
import time

from tpu_llm.config import ConfigError, machine, parse_arg, schedule
from tpu_llm.scaling.combinators import name, product
from tpu_llm.train.watch import Diverged


@dataclasses.dataclass(kw_only=True, slots=True)
class Toy:
    """`ends` is how, `seconds` how long it takes; each start adds a line to `starts`."""

    ends: str = 'well'
    seconds: float = machine(0.0)
    rate: float = 0.1
    steps: int = schedule(1)

    def validate(self):
        if self.rate < 0:
            raise ConfigError(f'rate = {self.rate} is negative')

    def main(self, workdir):
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'starts', 'a') as file:
            file.write(f'{os.getpid()} {sorted(os.sched_getaffinity(0))}\n')
        first = len((folder / 'starts').read_text().splitlines()) == 1
        print(f'{self.ends} begins')
        time.sleep(self.seconds)
        if self.ends == 'diverged':
            raise Diverged('stopped at step 4: the loss is nan')
        if self.ends == 'refused':
            raise ConfigError('seq_len is odd')
        if self.ends == 'failed':
            raise KeyError('a fault')
        if self.ends == 'killed' or (self.ends == 'killed once' and first):
            os.kill(os.getpid(), signal.SIGKILL)


def sweep(arg=None):
    args = parse_arg(arg, ends='well', seconds=0.0, rates=3)
    for point in product(ends=args.ends.split('+'), rate=[float(i + 1) for i in range(args.rates)]):
        yield name({'ends': point['ends'].replace(' ', '-'), 'rate': point['rate']}), Toy(seconds=args.seconds, **point)
