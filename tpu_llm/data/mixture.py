"""Which source a lane reads from: weights are shares of tokens, and may change with the step."""

import dataclasses
import hashlib
from collections.abc import Sequence

from tpu_llm.config import ConfigError, nearest
from tpu_llm.data.documents import Source


@dataclasses.dataclass(kw_only=True, slots=True)
class Mixture:
    """Named sources, and the shares of the tokens that they get once so many steps are done.

        Mixture(
            sources={'web': Jsonl(paths=('gs://b/web/*.jsonl',)), 'code': Text(paths=('src/**/*.py',))},
            weights={0: {'web': 0.8, 'code': 0.2}, 9_000: {'web': 0.3, 'code': 0.7}},
        )

    Weights need not sum to one; a source that a stage does not name gets nothing in it. One source needs no weights.
    """

    sources: dict[str, Source]
    weights: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        if not self.sources:
            raise ConfigError('sources is empty; a mixture needs at least one source')
        if not self.weights and len(self.sources) > 1:
            raise ConfigError(
                f'weights is empty; give shares, such as weights={{0: {dict.fromkeys(self.sources, 1.0)}}}'
            )
        if self.weights and min(self.weights) != 0:
            raise ConfigError(f'weights starts at step {min(self.weights)}; the first stage starts at 0')
        for step, shares in self.weights.items():
            for name, share in shares.items():
                if name not in self.sources:
                    raise ConfigError(
                        f'weights[{step}] names {name!r}, which is no source{nearest(name, self.sources)}'
                    )
                if share < 0:
                    raise ConfigError(f'weights[{step}][{name!r}] is {share}; a share cannot be negative')
            if not sum(shares.values()) > 0:
                raise ConfigError(f'weights[{step}] gives no source anything; one share must be above 0')

    def stages(self) -> list[tuple[int, list[float]]]:
        """(first step, weight of each source in the order of `sources`), by step; weights sum to one."""
        weights = self.weights or {0: dict.fromkeys(self.sources, 1.0)}
        return [
            (step, _normalized([weights[step].get(name, 0.0) for name in self.sources])) for step in sorted(weights)
        ]


def _normalized(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def most_behind(emitted: Sequence[float], weights: Sequence[float]) -> int:
    """The source whose tokens so far lag its weight the most: the least `emitted / weight`, the first if equal.

    This is stride scheduling (Waldspurger and Weihl, 1995): shares of tokens approach the weights, and stay within
    a few documents of them.
    """
    return min((e / w, s) for s, (e, w) in enumerate(zip(emitted, weights, strict=True)) if w > 0)[1]


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts and nothing else."""
    return uint64(*parts) / 2**64


def uint64(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256('/'.join(map(str, parts)).encode()).digest()[:8], 'big')
