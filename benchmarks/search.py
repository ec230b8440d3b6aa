"""How near a search that compiles a few layouts comes to one that compiles them all.

    JAX_PLATFORMS=cpu python benchmarks/search.py        # a quarter of an hour; pip install -e '.[plan]'

A model of 1B parameters on 64 chips of v6e: four meshes, each with four choices of what the backward pass finds saved.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tpu_llm.command_line import load
from tpu_llm.parallel.chips import find
from tpu_llm.parallel.mesh import Mesh
from tpu_llm.plan.cache import Cache
from tpu_llm.plan.compile import versions
from tpu_llm.plan.search import Tried, best, candidates, varied
from tpu_llm.plan.tell import line

WHERE = find('v6e-64')
MESHES = (Mesh(fsdp=64), Mesh(data=4, fsdp=16), Mesh(fsdp=32, tensor=2), Mesh(fsdp=16, tensor=4))
REMAT = ('none', 'gate+up', 'query+key+value', 'full')
COMPILES = 5


def main(folder: str) -> None:
    run = load(str(Path(__file__).parents[1] / 'configs/pretrain.py') + ':size=1b', ['--config.data.global_batch=512'])
    choices = [{'mesh': mesh, 'model.remat': remat} for mesh, remat in itertools.product(MESHES, REMAT)]
    ranked = candidates(run, WHERE, choices, doubt=float('inf'))
    cache = Cache(Path(folder))
    print(f'{len(ranked)} choices on {WHERE}, {versions()}; the first {COMPILES} guesses compiled:', flush=True)
    few = show(list(best(run, WHERE, varied(candidates(run, WHERE, choices)), COMPILES, cache)))
    print('all of them:', flush=True)
    every = show(list(best(run, WHERE, ranked, len(ranked), cache, skip=False)))
    print(f'the search is within {few / every - 1:.1%} of the best of all')


def show(tried: list[Tried]) -> float:
    """Prints them, and gives the seconds of the fastest that fits."""
    for each in tried:
        print(
            f'  guess {each.candidate.guess.seconds:.3f} s, {each.candidate.guess.bytes / 2**30:5.1f} GiB  {line(each)}'
        )
    return min(each.plan.seconds for each in tried if each.plan is not None and each.fits)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cache', help='a folder that keeps what is compiled')
    folder = parser.parse_args().cache
    with tempfile.TemporaryDirectory() as temporary:
        main(folder or temporary)
