"""Counts the parameters of every published size that transformers has a class for. Needs the `parity` extra.

    python tests/golden/families/make.py             # writes counts.json beside this file

The config of each is that of `tpu_llm.models.families`, said in the words of the architecture that the published files
name; transformers builds the model from it without memory ('meta') and counts. So counts.json holds, by name,
`parameters`, `config` as it was used, and under 'transformers' the version.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tpu_llm.checkpoint import huggingface
from tpu_llm.models.families import FAMILIES

HERE = Path(__file__).parent


def count(config: dict) -> int:
    said = {key: value for key, value in config.items() if key not in ('architectures', 'model_type')}
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config['model_type'], **said))
    # A bias that balances experts learns without a gradient: to torch it is no parameter.
    balancing = [each for name, each in model.named_buffers() if name.endswith('correction_bias')]
    return sum(tensor.numel() for tensor in (*model.parameters(), *balancing))


def main() -> None:
    lines = [f'"transformers": {json.dumps(transformers.__version__)}']
    for facts in FAMILIES.values():
        if facts.architecture not in huggingface.ARCHITECTURES:
            continue
        for name, fact in facts.sizes.items():
            _, config = huggingface.expressible(fact.make(), facts.architecture)
            parameters = count(config)
            lines.append(f'"{name}": {json.dumps({"parameters": parameters, "config": config})}')
            print(
                f'{name:20} {parameters:>18,}'
                + ('' if parameters == fact.parameters else f' is not {fact.parameters:,}')
            )
    (HERE / 'counts.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
    main()
