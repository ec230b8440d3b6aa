"""Published models by name: `published('llama-3.1-8b')` is the config of that size.

The facts are beside this file, by descent: `facts_gpt.py`, `facts_llama.py`, `facts_google.py`, `facts_experts.py`;
of state spaces, `facts_ssm.py`; of encoders and encoder-decoders, `facts_encoders.py`. A family there is one function,
which says where its shapes are written down, and one line a size. What is published but cannot be said in a config is
in ABSENT, with the reason. docs/models.md is made of all this.
"""

from typing import Any

from tpu_llm.config import ConfigError, nearest
from tpu_llm.models import facts_encoders, facts_experts, facts_google, facts_gpt, facts_llama, facts_ssm
from tpu_llm.models.fact import Fact, Facts

FAMILIES: dict[str, Facts] = {
    facts.family: facts
    for facts in (*facts_gpt.FACTS, *facts_llama.FACTS, *facts_google.FACTS, *facts_experts.FACTS, *facts_ssm.FACTS)
}
# Those that are no decoders.
ENCODERS: dict[str, Facts] = {facts.family: facts for facts in facts_encoders.FACTS}
FACTS: dict[str, Fact] = {name: fact for facts in FAMILIES.values() for name, fact in facts.sizes.items()}
ABSENT = {
    'phi-3-small': 'its attention sees blocks by a pattern of its own',
}


def published(name: str) -> Any:
    """A fresh config of that model: a DecoderConfig, EncoderConfig or EncoderDecoderConfig.

    Raises ConfigError on an unknown name, with the nearest and the families there are, and for one in ABSENT.
    """
    if name in ABSENT:
        raise ConfigError(f'{name} is not implemented: {ABSENT[name]}')
    known = {size: fact for facts in (FAMILIES | ENCODERS).values() for size, fact in facts.sizes.items()}
    if name not in known:
        raise ConfigError(
            f'unknown model {name!r}{nearest(name, known)}; there are sizes of {", ".join(FAMILIES | ENCODERS)}, all '
            'in docs/models.md'
        )
    return known[name].make()
