"""Peak memory of the loss and its gradients against the naive float32 logits, at a vocabulary of 128k.

    JAX_PLATFORMS=cpu python benchmarks/loss_memory.py

Bytes are the compiler's: temporaries and outputs of the program that computes loss and both gradients.
"""

import jax
import jax.numpy as jnp

from tpu_llm.kernels import reference
from tpu_llm.kernels.cross_entropy import Options, cross_entropy

BATCH, LENGTH, WIDTH, VOCAB = 8, 1024, 256, 131_072


def ours(hidden, kernel, targets, weights):
    return cross_entropy(hidden, kernel, targets, weights, Options(vocab_size=VOCAB), jnp.dtype('float32'))[0]


def naive(hidden, kernel, targets, weights):
    options = {'vocab_size': VOCAB, 'softcap': 0.0, 'z_loss': 0.0, 'label_smoothing': 0.0}
    return (reference.cross_entropy(hidden, kernel, targets, **options) * weights).sum()


def peak_bytes(loss) -> int:
    shapes = [(BATCH, LENGTH, WIDTH), (WIDTH, VOCAB), (BATCH, LENGTH), (BATCH, LENGTH)]
    dtypes = ['float32', 'float32', 'int32', 'float32']
    args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    memory = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def main() -> None:
    logits = BATCH * LENGTH * VOCAB * 4
    gradients = (BATCH * LENGTH + VOCAB) * WIDTH * 4
    mine, plain = peak_bytes(ours), peak_bytes(naive)
    print(f'naive float32 logits alone      {logits / 2**30:6.2f} GiB')
    print(f'naive loss and gradients        {plain / 2**30:6.2f} GiB')
    print(f'chunked loss and gradients      {mine / 2**30:6.2f} GiB   ({gradients / 2**30:.2f} of them the gradients)')
    print(f'ratio to the naive logits       {mine / logits:6.3f}')


if __name__ == '__main__':
    main()
