"""A config whose run only joins the other hosts, and gathers and sums over them for some seconds.

The host `fails` then raises an error, the host `dies` is killed.
It dies as of the out-of-memory killer: the count of such kills, in the file EVENTS, goes up, and SIGKILL comes. The
kernel does both by itself where a limit on memory can be set, which a test may not.
"""

import dataclasses
import os
import pathlib
import signal
import time

import jax
from jax.experimental import multihost_utils

from tpu_llm.config import parse_arg
from tpu_llm.parallel import handshake


@dataclasses.dataclass(kw_only=True, slots=True)
class Meeting:
    seconds: float
    dies: int
    fails: int
    steps: int = 12

    def main(self, workdir):
        print('met at', handshake.start(), flush=True)
        begun = time.monotonic()
        while self.seconds:
            multihost_utils.process_allgather(jax.numpy.ones(()))
            multihost_utils.broadcast_one_to_all(jax.numpy.ones(()))  # by an all-reduce
            if time.monotonic() - begun > self.seconds and jax.process_index() == self.dies:
                pathlib.Path(os.environ['EVENTS']).write_text('oom 1\noom_kill 1\n')
                print('died at', time.time(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if time.monotonic() - begun > self.seconds and jax.process_index() == self.fails:
                raise OSError('no such disk')
            time.sleep(0.05)


def get_config(arg=None):
    arg = parse_arg(arg, seconds=0.0, dies=-1, fails=-1)
    return Meeting(seconds=arg.seconds, dies=arg.dies, fails=arg.fails)
