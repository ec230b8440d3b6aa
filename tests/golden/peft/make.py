"""Adapters of a tiny Llama as the `peft` library saves them, and what the model says with each. Needs torch and peft.

    python tests/golden/peft/make.py                    # writes base/, a folder a kind and logits.npz beside this file
    python tests/golden/peft/make.py --verify FOLDER    # loads an adapter that we saved, beside our logits.npy

Every adapter's numbers are random, none of them zero.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TOKENS = (np.arange(16).reshape(2, 8) * 5) % 48
ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
KINDS = {
    'lora': peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=['q_proj', 'v_proj', 'down_proj'], rank_pattern={'down_proj': 2}
    ),
    'rslora': peft.LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, use_rslora=True),
    'dora': peft.LoraConfig(r=2, lora_alpha=5, target_modules=['k_proj', 'o_proj', 'up_proj'], use_dora=True),
    'ia3': peft.IA3Config(target_modules=['k_proj', 'v_proj', 'down_proj'], feedforward_modules=['down_proj']),
    'prompt': peft.PromptTuningConfig(num_virtual_tokens=3),
    'prefix': peft.PrefixTuningConfig(num_virtual_tokens=3),
}


def base() -> LlamaForCausalLM:
    if (HERE / 'base').exists():
        return LlamaForCausalLM.from_pretrained(HERE / 'base').eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(HERE / 'base')
    return model


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits[:, -TOKENS.shape[1] :].numpy()


def main() -> None:
    said = {'base': logits(base())}
    for name, config in KINDS.items():
        config.task_type = 'CAUSAL_LM'
        model = peft.get_peft_model(base(), config).eval()
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.peft_config['default'].base_model_name_or_path = 'base'
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE / name)
        (HERE / name / 'README.md').unlink(missing_ok=True)
        said[name] = logits(model)
        print(name, np.abs(said[name] - said['base']).max())
    np.savez_compressed(HERE / 'logits.npz', versions=f'peft {peft.__version__}, torch {torch.__version__}', **said)


def verify(folder: Path) -> None:
    ours, theirs = np.load(folder / 'logits.npy'), logits(peft.PeftModel.from_pretrained(base(), folder).eval())
    far = np.abs(ours - theirs).max()
    print(f'{folder}: at most {far:.1e} apart')
    assert far < 2e-5


if __name__ == '__main__':
    verify(Path(sys.argv[2])) if sys.argv[1:2] == ['--verify'] else main()
