"""200 quickstart steps under five layouts of 8 devices, beside one device: where each ends.

    python benchmarks/convergence.py      # about 15 minutes on 2 cores

The devices are pretended ones of the CPU, the runs are `launch/run.py`'s. Layouts differ by the order of sums, and the
difference grows as training goes on; three seeds on one device show how much a run's end means at all.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 200
LAYOUTS = {
    'fsdp 8': {'mesh.fsdp': 8},
    'data 4 x tensor 2': {'mesh.data': 4, 'mesh.fsdp': 1, 'mesh.tensor': 2},
    'stage 2 x fsdp 4': {'mesh.stage': 2, 'mesh.fsdp': 4, 'pipeline.microbatches': 2},
    'fsdp 4 x seq 2, ring': {'mesh.fsdp': 4, 'mesh.seq': 2, 'model.sequence': 'ring'},
    'stage 2 x fsdp 2 x tensor 2': {'mesh.stage': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2},
}


def train(devices: int, **fields: object) -> dict[str, float]:
    """The summary of a run."""
    flags = [f'--config.{name}={value}' for name, value in fields.items()]
    pretended = f'--xla_force_host_platform_device_count={devices}'
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, str(ROOT / 'launch/run.py'), f'--config={ROOT}/configs/quickstart.py']
        subprocess.run(
            [*command, f'--workdir={workdir}', f'--config.steps={STEPS}', *flags],
            env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': pretended},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads((Path(workdir) / 'summary.json').read_text())


def show(name: str, summary: dict[str, float], reference: float | None = None) -> None:
    bits = summary['bits_per_byte']
    apart = '' if reference is None else f'{bits - reference:+10.5f}'
    print(f'{name:32}{bits:9.5f} bits per byte{apart}', flush=True)


def main() -> None:
    ends = []
    for seed in range(3):
        ends.append(train(1, seed=seed))
        show(f'one device, seed {seed}', ends[-1], ends[0]['bits_per_byte'] if seed else None)
    worst = 0.0
    for name, fields in LAYOUTS.items():
        summary = train(8, **fields)
        show(name, summary, ends[0]['bits_per_byte'])
        worst = max(worst, abs(summary['bits_per_byte'] - ends[0]['bits_per_byte']))
    spread = max(end['bits_per_byte'] for end in ends) - min(end['bits_per_byte'] for end in ends)
    print(f'furthest layout {worst:.5f}; spread of the seeds {spread:.5f}')


if __name__ == '__main__':
    main()
