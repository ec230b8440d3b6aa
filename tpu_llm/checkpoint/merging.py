"""A model and an adapter as one model, which nobody need know had an adapter."""

from etils import epath

from tpu_llm.checkpoint import adapters, pretrained
from tpu_llm.config import ConfigError
from tpu_llm.peft import merging


def merge(adapter: str, target: str, *, base: str = '') -> str:
    """Writes the base with the adapter in its kernels as a Hugging Face folder, float32.

    Where no base is given it is the one that the adapter names, which is returned. Raises ConfigError for a target that
    is there, for an adapter that kernels cannot take up (prompts), and what reading either raises.
    """
    if epath.Path(target).exists():
        raise ConfigError(f'{target} is there already; give another place, or remove it')
    base = base or adapters.read(adapter).get('base_model_name_or_path') or ''
    if not base:
        raise ConfigError(f'{adapter} names no base; write --base=FOLDER')
    source = pretrained.open_source(base)
    model, tokenizer = pretrained.read_model(source, 'float32'), source.tokenizer()
    adapters.load(model, adapter)
    merging.merge(model)
    merging.bare(model)
    pretrained.save_pretrained(model, tokenizer, target)
    return base
