"""Makes the tiny checkpoints of this folder, and what transformers computes with them. Needs the `parity` extra.

    python tests/golden/zoo/make.py                  # all of them; or names: llama mixtral …
    python tests/golden/zoo/make.py --verify FOLDER  # what tests/contract/test_zoo.py --export wrote, loaded again

Each has random weights in every tensor (norms and biases too), saved by transformers itself, and `expected.npz`: tokens
int32[3 T], mask int32[3 T] (a whole row, one padded on the left, one on the right), logits float32[3 T V] and `greedy`
int32[3 8], what `generate` adds to the rows without their padding on the right. Encoders have no greedy, but `types`
int32[3 T] and whatever heads they have; encoder-decoders have a `target` and a `target_mask` too.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from rows_dense import DENSE
from rows_encoders import ENCODER_DECODERS, ENCODERS
from rows_experts import AHEAD, EXPERTS
from rows_ssm import SSM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

HERE = Path(__file__).parent
SMALL = {
    'vocab_size': 61,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'max_position_embeddings': 64,
    'bos_token_id': 1,
    'eos_token_id': None,
    'pad_token_id': 0,
}
ROWS = DENSE | EXPERTS | SSM | ENCODERS | ENCODER_DECODERS


def build(name: str) -> torch.nn.Module:
    kind, changes, *tail = ROWS[name]
    made = getattr(transformers, kind + (tail[0] if tail else 'ForCausalLM'))
    other_names = made.config_class.attribute_map
    known = {field.name for field in dataclasses.fields(made.config_class)} | set(other_names)
    small = {key: value for key, value in SMALL.items() if key in known and other_names.get(key) not in changes}
    config = made.config_class(**small | changes)
    if name in AHEAD:  # first as further layers of the model: see `put_ahead`
        config.num_hidden_layers += config.num_mtp_layers
    torch.manual_seed(0)
    model = made(config).eval()
    if not getattr(config, 'scale_decoder_outputs', True):  # T5 v1.1, which the library would tie nonetheless
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        # To torch a bias that balances experts is no parameter, since it has no gradient, nor is that of BART's head.
        others = [each for each in model.named_buffers() if each[0].endswith(('correction_bias', 'logits_bias'))]
        for _, tensor in sorted([*model.named_parameters(), *others]):
            # Norms around 1, all else around 0: large enough that a wrong layout shows, small enough for float32.
            around = 1.0 if tensor.ndim == 1 and bool((tensor == 1).all()) else 0.0
            tensor.copy_(around + torch.randn_like(tensor) * 0.2)
    return model


def rows(model: torch.nn.Module, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(2, model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    mask[2, -5:] = 0
    return tokens * mask, mask


def logits(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Row by row without padding: what a padded batch must be equal to, whatever the library makes of padding."""
    out = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, (ids, real) in enumerate(zip(tokens, mask.bool(), strict=True)):
            out[row, real] = model(ids[real][None]).logits[0].numpy()
    return out


def greedy(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, count: int = 8) -> np.ndarray:
    out = np.zeros((len(tokens), count), np.int32)
    cached = not model.config.is_encoder_decoder  # its cache has as many layers as the encoder
    with torch.no_grad():
        for row, (ids, real) in enumerate(zip(tokens, mask.bool(), strict=True)):
            prompt = ids[real][None]
            whole = model.generate(
                prompt, do_sample=False, max_new_tokens=count, min_new_tokens=count, use_cache=cached
            )
            out[row] = whole[0, -count:].numpy()
    return out


def given(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model is asked."""
    tokens, mask = rows(model)
    asked = {'tokens': tokens, 'mask': mask}
    if model.config.is_encoder_decoder:
        target, target_mask = rows(model, length=13)
        asked |= {'target': target.flip(0), 'target_mask': target_mask.flip(0)}
    if kinds := getattr(model.config, 'type_vocab_size', 0):
        asked['types'] = torch.arange(tokens.shape[1])[None].repeat(3, 1) * kinds // tokens.shape[1]
    return asked


def answers(model: torch.nn.Module, asked: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    if 'target' in asked:
        return {'logits': of_targets(model, **asked)}
    if 'types' in asked:
        return of_encoder(model, **asked)
    return {'logits': logits(model, **asked)}


def of_targets(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    target: torch.Tensor,
    target_mask: torch.Tensor,
) -> np.ndarray:
    out = np.zeros((*target.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, (seen, real) in enumerate(zip(mask.bool(), target_mask.bool(), strict=True)):
            said = model(input_ids=tokens[row, seen][None], decoder_input_ids=target[row, real][None])
            out[row, real] = said.logits[0].numpy()
    return out


# An encoder's answers, by what transformers calls them.
HEADS = {
    'logits': 'logits',
    'prediction_logits': 'logits',
    'seq_relationship_logits': 'next_sentence',
    'last_hidden_state': 'hidden',
    'pooler_output': 'pooled',
}


def of_encoder(
    model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor, types: torch.Tensor
) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for row, real in enumerate(mask.bool()):
            said = model(tokens[row, real][None], token_type_ids=types[row, real][None])
            for key, name in HEADS.items():
                if key not in said:
                    continue
                value = said[key][0].numpy()
                each = name in ('logits', 'hidden')
                shape = (*tokens.shape, value.shape[-1]) if each else (len(tokens), value.shape[-1])
                out.setdefault(name, np.zeros(shape, np.float32))[(row, real) if each else row] = value
    return out


def put_ahead(folder: Path) -> None:
    """Makes the last layers of a checkpoint those that predict further tokens, with what these have besides."""
    said = json.loads((folder / 'config.json').read_text())
    said['num_hidden_layers'] -= said['num_nextn_predict_layers']
    (folder / 'config.json').write_text(json.dumps(said, indent=2) + '\n')
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    width, first = said['hidden_size'], said['num_hidden_layers']
    for layer in range(first, first + said['num_nextn_predict_layers']):
        at = f'model.layers.{layer}'
        for name in ('enorm', 'hnorm', 'shared_head.norm'):
            tensors[f'{at}.{name}.weight'] = 1.0 + torch.randn(width) * 0.2
        tensors[f'{at}.eh_proj.weight'] = torch.randn(width, 2 * width) * 0.2
        tensors[f'{at}.embed_tokens.weight'] = tensors['model.embed_tokens.weight'].clone()
        tensors[f'{at}.shared_head.head.weight'] = tensors['lm_head.weight'].clone()
    safetensors.torch.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})


def with_ahead(folder: Path) -> type:
    """The class of its architecture. Which tensors are those of layers ahead that knows by the numbers that they have
    in the published sizes, so it is told.
    """
    said = json.loads((folder / 'config.json').read_text())
    made, first = getattr(transformers, said['architectures'][0]), said.get('num_hidden_layers')
    if folder.name in AHEAD:
        numbers = range(first, first + said['num_nextn_predict_layers'])
        made._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.{number}\..*' for number in numbers]
    return made


def ahead(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """float32[depths 3 T V]: of each depth k the logits of the token k behind the next, 0 where there is none."""
    count = model.config.num_mtp_layers
    further = MtpModel.from_pretrained(model).eval()
    out = np.zeros((count, *tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for row, (ids, real) in enumerate(zip(tokens, mask.bool(), strict=True)):
            prompt, places = ids[real][None], torch.nonzero(real)[:, 0]
            hidden = model.model(prompt).last_hidden_state
            cache = MtpCache(config=model.config.get_mtp_config())
            for k in range(count):
                prompt, at = prompt[:, 1:], torch.arange(k + 1, len(places))[None]
                hidden = further.forward_layer(k, hidden[:, :-1], at, cache, input_ids=prompt)
                out[k, row, places[: hidden.shape[1]]] = model.lm_head(hidden)[0].numpy()
    return out


def make(name: str) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = build(name)
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)
    if name in AHEAD:
        put_ahead(folder)
    model = with_ahead(folder).from_pretrained(folder).eval()
    asked = given(model)
    said = answers(model, asked)
    if name in AHEAD:
        said['ahead'] = ahead(model, **asked)
    if name not in ENCODERS:
        said['greedy'] = greedy(model, asked['tokens'], asked['mask'])
    np.savez_compressed(
        folder / 'expected.npz', **{key: value.numpy().astype(np.int32) for key, value in asked.items()}, **said
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f'{name}: {sum(p.numel() for p in model.parameters())} parameters, {size / 1000:.0f} kB')


def verify(folder: Path) -> None:
    """A folder that we wrote gives transformers the logits of the one that it wrote itself."""
    model, seen = with_ahead(folder).from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in seen.items() if value}
    assert not problems, f'{folder.name}: {problems}'
    expected = np.load(HERE / folder.name / 'expected.npz')
    inputs = ('tokens', 'mask', 'target', 'target_mask', 'types')
    asked = {key: torch.tensor(expected[key], dtype=torch.long) for key in inputs if key in expected}
    said = answers(model.eval(), asked)
    if folder.name in AHEAD:
        said['ahead'] = ahead(model, **asked)
    off = max(np.abs(value - expected[key]).max() for key, value in said.items())
    print(f'{folder.name}: {type(model).__name__}, largest difference {off:.1e}')
    assert off < 1e-5


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*')
    parser.add_argument('--verify', type=Path)
    args = parser.parse_args()
    if args.verify:
        for folder in sorted(args.verify.iterdir()):
            verify(folder)
    for name in args.names or ([] if args.verify else ROWS):
        make(name)
