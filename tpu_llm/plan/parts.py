"""Which part of the model an instruction is of, and which pass: from the names that JAX hands on to the compiler.

Modules and losses run in a `jax.named_scope` of their part; JAX adds what it does to them:
'jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/BTD,DF->BTF/dot_general'.
"""

import re

PARTS = ('embed', 'norm', 'attention', 'ssm', 'mlp', 'experts', 'head', 'loss', 'optimizer')
PASSES = ('forward', 'remat', 'backward', 'update')

_SCOPE = re.compile(rf'(?:^|[/(])({"|".join(PARTS)})(?=[/)]|$)')


def part(op_name: str) -> str:
    """The outermost scope of `PARTS`, or 'other': what blocks and steps do between them."""
    found = _SCOPE.search(op_name)
    if found is None:
        return 'other'
    # Of the loss, what has the width of the model is the head's: logits, and the gradients made of them.
    return 'head' if found[1] == 'loss' and op_name.endswith('dot_general') else found[1]


def pass_of(op_name: str) -> str:
    """One of `PASSES`: what is computed once more for the backward pass is remat, what is not differentiated update."""
    if 'rematted_computation' in op_name:
        return 'remat'
    if 'transpose(' in op_name:
        return 'backward'
    return 'forward' if 'jvp(' in op_name else 'update'
