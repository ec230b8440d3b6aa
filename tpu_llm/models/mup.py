"""A decoder whose learning rate was found on a smaller one: maximal update parametrisation (muP), in width and depth.

Yang et al., 2022 (arXiv 2203.03466, tables 3 and 8) for width; Yang et al., 2023 (arXiv 2310.02244) and Dey et al.,
2025 (CompleteP, arXiv 2505.01618, table 1) for depth. The papers multiply logits, scores and what a layer adds by
numbers. Here all of that lies in how parameters are drawn and in their learning rates: an optimizer whose steps do not
depend on the size of gradients cannot tell the two apart. What was trained is a plain decoder.
"""

import copy
import dataclasses
import math
from typing import Any

from flax import nnx

from tpu_llm.config import ConfigError, dump, flatten, leaf_marks, nearest, validate
from tpu_llm.models.decoder import Decoder
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.nn.param import Constant, Normal, named_params
from tpu_llm.optim.params import ParamInfo
from tpu_llm.parallel.pipeline import Pipeline

# The fields that may differ between a model and its base: widths, and how many layers there are.
SIZES = ('width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp_width')
SIZES += ('moe.expert_width', 'mla.kv_rank', 'mla.query_rank')


@dataclasses.dataclass(kw_only=True, slots=True)
class MuPConfig(DecoderConfig):
    """A decoder that trains at its base's learning rate; as large as the base it is the base, bit for bit.

    Weights of a plain decoder fit, and its weights fit a plain decoder.
    """

    base: dict[str, int]  # the sizes of the model whose learning rate was swept
    depth: float = 1.0  # what a layer adds shrinks by layers^-depth: 1 is CompleteP, 0.5 depth-muP

    @classmethod
    def of(cls, model: DecoderConfig, base: DecoderConfig, depth: float = 1.0) -> 'MuPConfig':
        """`model` with what was found on `base`. Raises ConfigError where they differ in more than sizes."""
        marks, before, after = leaf_marks(model), flatten(dump(base)), flatten(dump(model))
        differ = [
            name.removeprefix('config.')
            for name in {**before, **after}
            if before.get(name) != after.get(name) and marks.get(name) != 'machine' and name != 'config.dtype'
        ]
        for name in differ:
            if name not in SIZES:
                raise ConfigError(
                    f'model.{name} is {after.get(f"config.{name}")!r} and {before.get(f"config.{name}")!r} in the '
                    f'base: learning rates transfer over {", ".join(SIZES)}; make the others equal'
                )
        own = {field.name: getattr(model, field.name) for field in dataclasses.fields(DecoderConfig)}
        return cls(**own, base={name: _get(base, name) for name in SIZES if _has(base, name)}, depth=depth)

    def plain(self) -> DecoderConfig:
        """The same in the standard parametrisation."""
        return DecoderConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderConfig)})

    def smaller(self) -> DecoderConfig:
        """The base."""
        base = copy.deepcopy(self.plain())
        for name, size in self.base.items():
            path, _, last = name.rpartition('.')
            setattr(getattr(base, path) if path else base, last, size)
        return base

    def validate(self) -> None:
        DecoderConfig.validate(self)
        wanted = [name for name in SIZES if _has(self, name)]
        for name in {**self.base, **dict.fromkeys(wanted)}:
            if name not in wanted:
                raise ConfigError(f'base has {name!r}{nearest(name, wanted)}; it has {", ".join(wanted)} of this model')
            if name not in self.base:
                raise ConfigError(f'base lacks {name!r}; write all sizes of the model whose learning rate was swept')
        if not 0.5 <= self.depth <= 1.0:
            raise ConfigError(f'depth = {self.depth}; it is a power from 0.5 (depth-muP) to 1 (CompleteP)')
        self._check_rules()
        validate(self.smaller(), 'model.base')

    def _check_rules(self) -> None:
        """Raises ConfigError for what no rule is known for."""
        if self.ssm or self.predict_ahead or self.embed_width:
            raise ConfigError(
                'the rules of width are for attention and MLPs: ssm, predict_ahead and embed_width have none; train '
                'this model without a base'
            )
        if self.layers != self.base['layers'] and self.norm_place != 'pre':
            raise ConfigError(
                f'layers = {self.layers} and {self.base["layers"]} in the base: the rules of depth are for '
                f"norm_place = 'pre', and it is {self.norm_place!r}; give the base as many layers"
            )
        scored = self.mla or self.qk_norm != 'none' or self.attention_scale or self.position == 'transformer_xl'
        if self.head_dim != self.base['head_dim'] and scored:
            raise ConfigError(
                f'head_dim = {self.head_dim} and {self.base["head_dim"]} in the base: with mla, qk_norm, '
                'attention_scale or transformer_xl queries cannot be scaled for it; widen by more heads instead'
            )
        if self.tied_embeddings and (self.norm_place == 'post' or self.norm == 'layer_fixed'):
            raise ConfigError(
                'tied embeddings leave the scale of logits to the last norm, and this model has none with a scale; set '
                'tied_embeddings = False'
            )

    def make(self, *, vocab_multiple: int = 128, stages: int = 1, schedule: Pipeline | None = None) -> Decoder:
        validate(self, 'model')
        base = self.smaller()
        base.layers = self.layers  # parameters then have the same names
        model, like = (
            each.make(vocab_multiple=vocab_multiple, stages=stages, schedule=schedule) for each in (self.plain(), base)
        )
        likes = dict(named_params(like))
        graph, state = nnx.split(model)
        # A layer's maps into the stream; their biases go with them.
        writers = {path.removesuffix('.kernel') for path, leaf in likes.items() if _writes(path, leaf)}
        changed = []
        for path, leaf in nnx.to_flat_state(state):
            name = '.'.join(map(str, path))
            changed.append((path, self._transferred(name, leaf, likes[name], name.rpartition('.')[0] in writers)))
        return nnx.merge(graph, nnx.from_flat_state(changed))

    def _transferred(self, name: str, leaf: nnx.Param, like: nnx.Param, writes: bool) -> nnx.Variable:
        """The parameter with the standard deviation, `rate` and `gain` that follow from its `like` in the base.

        All the factors are products of powers of how much it has grown. Were a map's numbers multiplied by `fold` in
        use, they could as well be drawn that much larger, with steps that much longer and gradients that much smaller.
        """
        rows, columns = _growth(leaf, like)
        deeper = self.layers / self.base['layers']
        std, rate, gain, fold = _width_of_draw(rows, columns), 1 / rows, columns, 1.0
        if name.startswith('stack.'):
            rate, gain = rate * deeper ** (self.depth - 1), gain * deeper**self.depth
        if writes:
            fold = deeper**-self.depth
            std *= deeper**0.5  # the decoder itself draws it by layers^-0.5
        if self.tied_embeddings and name in ('norm.scale', 'norm.bias'):
            fold = 1 / columns  # what the head would do, were it a map of its own
        if '.attention.query.' in name:
            fold = (self.head_dim / self.base['head_dim']) ** -0.5
        init = like.get_metadata('init')
        if isinstance(init, Normal):
            init = Normal(init.std * std * fold)
        elif fold != 1.0 and name.endswith('.scale'):
            init = Constant(init.value + fold - 1.0)  # it may be what is added to 1
        return leaf.replace(leaf.get_value(), init=init, rate=rate * fold, gain=gain * fold)


def _width_of_draw(rows: float, columns: float) -> float:
    """How much the standard deviation changes: by 1 / sqrt(fan-in) within the network, by 1 / fan-in out of it, to so
    many numbers whatever the width; not at all into it.
    """
    return rows**-0.5 if columns != 1.0 else 1 / rows


def _growth(leaf: nnx.Param, like: nnx.Param) -> tuple[float, float]:
    """How many times the base's are the numbers that a map reads and that it gives. A vector or table reads none."""
    meta = leaf.get_metadata()
    dims, info = meta['dims'], ParamInfo(meta['dims'], meta['summed'])
    read = 'D' if dims == 'DV' else info.summed  # the head, which is no linear map to Muon
    ratios = [(dims[i] in read, leaf.shape[i] / like.shape[i]) for i in range(info.stack, len(dims))]
    rows, columns = (math.prod(ratio for reads, ratio in ratios if reads is which) for which in (True, False))
    return rows, columns


def _writes(path: str, leaf: nnx.Param) -> bool:
    """Whether it is a map of a layer into the stream."""
    meta = leaf.get_metadata()
    info = ParamInfo(meta['dims'], meta['summed'])
    axes = info.linear_map
    return path.startswith('stack.') and axes is not None and [info.dims[i] for i in axes.columns] == ['D']


def _get(config: Any, name: str) -> Any:
    for part in name.split('.'):
        config = getattr(config, part)
    return config


def _has(config: Any, name: str) -> bool:
    """Whether a model has that size: those of `moe` and `mla` only where it has them."""
    part, dot, _ = name.partition('.')
    return not dot or getattr(config, part) is not None
