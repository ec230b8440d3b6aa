"""Names as JAX hands them to the compiler, and the part of the model and the pass that they tell."""

import jax
import jax.numpy as jnp
import pytest

from tpu_llm.plan import hlo, program
from tpu_llm.plan.parts import part, pass_of

LAYER = 'while/body/closed_call'
BACKWARD = f'jit(step)/transpose(jvp())/{LAYER}/checkpoint'


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        (f'jit(step)/jvp()/{LAYER}/mlp/BTD,DF->BTF/dot_general', ('mlp', 'forward')),
        (f'{BACKWARD}/rematted_computation/mlp/BTD,DF->BTF/dot_general', ('mlp', 'remat')),
        (f'{BACKWARD}/mlp/jit(silu)/mul', ('mlp', 'backward')),
        (f'{BACKWARD}/attention/shard_map/vmap(static_sparsity_splash)/jit(_splash)', ('attention', 'backward')),
        (f'{BACKWARD}/rematted_computation/norm/rsqrt', ('norm', 'remat')),
        (f'{BACKWARD}/rematted_computation/experts/shard_map/jit(gmm)/jit(_take)/gather', ('experts', 'remat')),
        ('jit(step)/jvp(embed)/gather', ('embed', 'forward')),
        ('jit(step)/transpose(jvp(embed))/scatter-add', ('embed', 'backward')),
        ('jit(step)/jvp(norm)/mul', ('norm', 'forward')),
        ('jit(step)/jvp(loss)/shard_map/while/body/closed_call/eq', ('loss', 'forward')),
        ('jit(step)/jvp(loss)/shard_map/while/body/closed_call/BTD,DV->BTV/dot_general', ('head', 'forward')),
        ('jit(step)/optimizer/sqrt', ('optimizer', 'update')),
        ('jit(step)/jit(_where)/select_n', ('other', 'update')),
        (f'jit(step)/jvp()/{LAYER}/add', ('other', 'forward')),
        # Parts are whole words of a path: neither a parameter's name nor a function that is called alike.
        ("state.params['stack.period.0.mlp.up.kernel']", ('other', 'update')),
        ('jit(step)/jvp()/jit(normalize)/loss_of/mul', ('other', 'forward')),
        ('', ('other', 'update')),
    ],
)  # fmt: skip
def test_names(name, expected):
    assert (part(name), pass_of(name)) == expected


def test_the_names_are_what_jax_gives():
    """A scope, differentiated and rematerialised: every pass of it has matmuls of the part."""

    def layer(x, kernel):
        with jax.named_scope('mlp'):
            return jnp.tanh(jnp.tanh(x @ kernel) @ kernel), None

    def step(x, kernels):
        return jax.grad(lambda k: jax.lax.scan(jax.checkpoint(layer), x, k)[0].sum())(kernels)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16), (3, 16, 16))]
    done = program.walk(hlo.parse(jax.jit(step).lower(*shapes).compile().as_text()))
    flops = {}
    for each in done.executed:
        if each.flops:
            key = part(each.op_name), pass_of(each.op_name)
            flops[key] = flops.get(key, 0) + each.flops
    one = 3 * 2 * 8 * 16 * 16
    assert flops == {('mlp', 'forward'): 2 * one, ('mlp', 'remat'): 2 * one, ('mlp', 'backward'): 4 * one}
