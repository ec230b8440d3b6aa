"""Next tokens of several tasks in one batch: each row with the soft prompt of its own."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from tpu_llm.arrays import Array, Batch, Float, Key, TaskBatch
from tpu_llm.nn.context import Routing
from tpu_llm.objectives.next_token import NextToken
from tpu_llm.peft import rows


@dataclasses.dataclass(kw_only=True, slots=True)
class EachTask(NextToken):
    """`NextToken` of rows that choose, by their task, among `SoftPrompts(tasks=…)`."""

    reads: ClassVar[type[Batch]] = TaskBatch

    def read(
        self, model: Any, batch: Batch, key: Key[Array, ''] | None
    ) -> tuple[Float[Array, 'B T D'], Routing | None]:
        assert isinstance(batch, TaskBatch)
        with rows.choose(jnp.asarray(batch.tasks)):
            return NextToken.read(self, model, batch, key)
