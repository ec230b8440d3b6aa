"""What a model's experts are doing: the worst layer's numbers for the log, and an alarm where a layer uses few of them.

A layer's effective number of experts is exp(entropy of the load): all of them where the load is even, 1 where one
gets every token. A router that has collapsed rarely recovers by itself, and the loss curve does not show it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.flops_encoder import ModelConfig

FROM_STEP = 50  # a router needs some steps to spread its tokens
QUIET_STEPS = 1000  # between two alarms of one layer


def effective_number(load: Any) -> float:
    """exp(entropy) of one layer's load: shares that sum to 1."""
    shares = np.asarray(load, np.float64)
    shares = shares[shares != 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def worst_layer(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the worst layer (each its own), as scalars; none for a model without experts."""
    if 'expert_load' not in metrics:
        return {}
    return {
        'experts_used': min(map(effective_number, metrics['expert_load'])),
        'expert_entropy_min': min(metrics['expert_entropy']),
        'expert_dropped_max': max(metrics['expert_dropped']),
    }


class CollapseAlarm:
    """Warns of layers that use less than half of their experts, by the load averaged since it was last asked."""

    def __init__(self, model: ModelConfig):
        moe, layers = (model.moe, model.layers) if isinstance(model, DecoderConfig) else (None, 0)
        self._layers = [layer for layer in range(layers) if moe and moe.at(layer)]
        if isinstance(model, DecoderConfig) and moe and moe.at(layers - 1):  # those ahead are of the last one's kind
            self._layers += range(layers, layers + model.predict_ahead)
        self._router = moe.router if moe else None
        self._load: Any = 0.0
        self._warned: dict[int, int] = {}

    def add(self, load: Sequence[Sequence[float]]) -> None:
        """The load of one step, [L, E]; one that is not finite is passed over."""
        if np.isfinite(load).all():
            self._load = self._load + np.asarray(load, np.float64)

    def due(self, step: int) -> list[str]:
        """A line for every layer to warn of at `step`."""
        load, self._load = self._load, 0.0
        if step < FROM_STEP or not np.any(load):
            return []
        return [line for layer, row in zip(self._layers, load, strict=True) if (line := self._judge(step, layer, row))]

    def _judge(self, step: int, layer: int, load: np.ndarray) -> str:
        used, experts = effective_number(load / load.sum()), len(load)
        if used >= experts / 2 or step < self._warned.get(layer, -QUIET_STEPS) + QUIET_STEPS:
            return ''
        self._warned[layer] = step
        assert self._router is not None
        return (
            f'warning: step {step:,}: layer {layer} uses {used:.1f} of its {experts} experts; raise '
            f'router.balance_loss (now {self._router.balance_loss:g}) or router.bias_rate (now '
            f'{self._router.bias_rate:g}), or lower the learning rate'
        )
