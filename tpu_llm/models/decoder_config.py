"""Every choice that a decoder is composed of, and which of them go together."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from tpu_llm.config import ConfigError, machine, validate
from tpu_llm.kernels.attention import check_impl, check_sequence, in_zigzag
from tpu_llm.nn.mamba import Mamba
from tpu_llm.nn.mamba2 import Mamba2
from tpu_llm.nn.mla import MLA
from tpu_llm.nn.mlp import MLPKind
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.norm import HeadNormKind, NormKind
from tpu_llm.nn.rope_scaling import NTK, DynamicNTK, Linear, Llama3, LongRope, YaRN
from tpu_llm.nn.stack import check_remat
from tpu_llm.parallel.pipeline import Pipeline
from tpu_llm.parallel.sequence import check

if TYPE_CHECKING:
    from tpu_llm.models.decoder import Decoder

Biased = Literal['qkv', 'out', 'mlp', 'head']
Mixer = Literal['attention', 'ssm']
BIASING = ('alibi', 'relative', 'relative_each', 'transformer_xl')  # positions that add to scores


@dataclasses.dataclass(kw_only=True, slots=True)
class Dropout:
    """Probabilities of zeroing: what a block adds to the residual stream, attention weights, embeddings."""

    residual: float = 0.0
    attention: float = 0.0
    embedding: float = 0.0

    def validate(self) -> None:
        for field in dataclasses.fields(self):
            rate = getattr(self, field.name)
            if not 0.0 <= rate < 1.0:
                raise ConfigError(f'dropout.{field.name} is {rate}; write a probability from 0 to below 1')


@dataclasses.dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """The decoder's config; `make()` builds the (abstract) module."""

    vocab_size: int
    width: int
    layers: int
    heads: int  # this and the next two are 0 where no layer attends
    kv_heads: int
    head_dim: int
    mlp_width: int  # 0: blocks without an MLP (state spaces)
    mlp: MLPKind = 'swiglu'
    norm: NormKind = 'rms'
    norm_place: Literal['pre', 'post', 'both', 'out'] = 'pre'
    # Attention and MLP one after the other, or side by side: from one norm, or each from its own.
    residual: Literal['serial', 'parallel', 'parallel_two_norms'] = 'serial'
    norm_eps: float = 1e-6
    # T5's buckets of distances in one table for all layers ('relative') or one for each ('relative_each').
    position: Literal[
        'rope', 'learned', 'sinusoidal', 'alibi', 'relative', 'relative_each', 'transformer_xl', 'none'
    ] = 'rope'
    rope_theta: float = 10_000.0
    rope_dim: int = 0  # so many numbers of a head turn, its first; 0: all
    rope_layers: tuple[bool, ...] = (True,)  # which layers rope turns, repeating; the others know no positions
    local_rope_theta: float = 0.0  # layers with a window turn by it, unscaled; 0: as the others
    rope_scaling: Linear | NTK | DynamicNTK | YaRN | Llama3 | LongRope | None = None
    max_length: int = 0  # learned positions: how many there are; else the longest text it is made for, 0 if not known
    position_offset: int = 0  # rows before the first in the learned table; no position uses them
    windows: tuple[int, ...] = (0,)  # one a layer, repeating; 0 sees everything before
    mixers: tuple[Mixer, ...] = ('attention',)  # what mixes tokens, one a layer, repeating; 'ssm' is that of `ssm`
    ssm: Mamba | Mamba2 | None = None
    mla: MLA | None = None  # keys and values from a latent, in place of kv_heads of them
    moe: MoE | None = None  # experts in place of the MLP, in the layers it names
    predict_ahead: int = 0  # tokens behind the next that it learns to predict, too (nn/ahead.py)
    tied_embeddings: bool = False
    embed_scale: float = 1.0  # what embeddings of tokens are multiplied by
    embed_norm: bool = False
    embed_width: int = 0  # of embeddings of tokens, which one matrix takes to the width and another back; 0: the width
    alibi_max: float = 8.0  # the least of its slopes is 2 to minus this
    alibi_scale: float = 1.0  # what its slopes are multiplied by
    bias: tuple[Biased, ...] = ()  # which linear maps have one
    logit_scale: float = 1.0  # what logits are multiplied by, before their soft-cap
    logit_softcap: float = 0.0
    attention_softcap: float = 0.0
    attention_scale: float = 0.0  # what scores are multiplied by; 0: 1 / sqrt(the width of a key)
    qk_norm: HeadNormKind = 'none'  # of queries and keys before rope; its kind is that of `norm`
    qkv_clip: float = 0.0  # queries, keys and values are cut to ± it; 0: not at all
    dropout: Dropout | None = None
    dtype: Literal['float32', 'bfloat16'] = 'bfloat16'  # of activations; parameters are float32
    attention: str = machine('auto')  # of kernels.attention.IMPLS, or what suits device and length
    sequence: str = machine('gather')  # how queries meet keys where rows are split (kernels.attention.SEQUENCES)
    remat: str = machine('none')
    unroll: int = machine(1)  # layers a scan step runs; 0: all of them, no loop

    @property
    def turned(self) -> int:
        """How many numbers of a head turn with its position; 0 without rope."""
        if self.position != 'rope':
            return 0
        return self.mla.rope_dim if self.mla else self.rope_dim or self.head_dim

    @property
    def period(self) -> int:
        """So many layers apart they are alike, behind the first ones without experts."""
        every = self.moe.every if self.moe else 1
        return math.lcm(len(self.windows), len(self.rope_layers), len(self.mixers), every)

    @property
    def attends(self) -> bool:
        return 'attention' in self.mixers

    def mixer(self, layer: int) -> Mixer:
        return self.mixers[layer % len(self.mixers)]

    def validate(self) -> None:
        self._check_numbers()
        self._check_blocks()
        self._check_mixers()
        self._check_positions()
        self._check_latent()
        if not self.windows or min(self.windows) < 0:
            raise ConfigError(f'windows = {self.windows}; write one window a layer of the period, 0 for none')
        biased = self.position if self.position in BIASING else ''
        check_impl(self.attention, self.dropout.attention if self.dropout else 0.0, biased)
        if self.moe and not any(map(self.moe.at, range(self.layers))):
            raise ConfigError(
                f'moe.first_dense = {self.moe.first_dense} and every = {self.moe.every} leave none of the '
                f'{self.layers} layers with experts'
            )
        check_sequence(self.sequence, self.attention, biased)
        if self.unroll < 0:
            raise ConfigError(f'unroll = {self.unroll}; it must be at least 0')
        check_remat(self.remat)

    def _check_numbers(self) -> None:
        attention = ('heads', 'kv_heads', 'head_dim')
        for name in ('vocab_size', 'width', 'layers', 'mlp_width', *(attention if self.attends else ())):
            least = 0 if name == 'mlp_width' and self.ssm else 1
            if getattr(self, name) < least:
                raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least {least}')
        if self.attends and self.heads % self.kv_heads:
            raise ConfigError(
                f'heads = {self.heads} is not divisible by kv_heads = {self.kv_heads}; each key-value head serves '
                'heads / kv_heads query heads'
            )
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise ConfigError(f'norm_eps = {self.norm_eps} and rope_theta = {self.rope_theta} must be above 0')
        if self.logit_softcap < 0 or self.attention_softcap < 0:
            raise ConfigError(
                f'logit_softcap = {self.logit_softcap} and attention_softcap = {self.attention_softcap} must not be '
                'negative; 0 is none'
            )
        if self.qkv_clip < 0:
            raise ConfigError(f'qkv_clip = {self.qkv_clip} must not be negative; 0 is none')
        if self.embed_scale <= 0 or self.attention_scale < 0:
            raise ConfigError(
                f'embed_scale = {self.embed_scale} must be above 0, 1 for none, and attention_scale = '
                f'{self.attention_scale} not negative, 0 for 1 / sqrt(the width of a key)'
            )
        if self.predict_ahead < 0 or (self.predict_ahead and self.embed_width):
            raise ConfigError(
                f'predict_ahead = {self.predict_ahead} with embed_width = {self.embed_width}; it counts tokens behind '
                'the next, 0 for none, and predicts them from embeddings of the full width'
            )
        if self.embed_width < 0:
            raise ConfigError(f'embed_width = {self.embed_width} must not be negative; 0 is the width')
        if self.logit_scale <= 0:
            raise ConfigError(f'logit_scale = {self.logit_scale} must be above 0; 1 is none')

    def _check_blocks(self) -> None:
        if self.qk_norm == 'head_biased' and self.norm != 'layer':
            raise ConfigError(
                f"qk_norm = 'head_biased' is a layer norm, and norm = {self.norm!r}; set qk_norm = 'head'"
            )
        if self.residual == 'parallel_two_norms' and self.norm_place not in ('pre', 'both'):
            raise ConfigError(
                "residual = 'parallel_two_norms' norms what attention and MLP take, but norm_place = "
                f"{self.norm_place!r} norms only what they give; set residual = 'parallel', or norm_place = 'pre'"
            )
        if len(set(self.bias)) < len(self.bias):
            raise ConfigError(f'bias = {self.bias} names a place twice; write it once')

    def _check_mixers(self) -> None:
        if ('ssm' in self.mixers) != (self.ssm is not None) or not self.mixers:
            raise ConfigError(
                f"mixers = {self.mixers} with ssm = {self.ssm}; write one mixer a layer of the period, and ssm's sizes "
                "where one of them is 'ssm', only there"
            )
        if self.ssm is None:
            return
        self.ssm.sizes(self.width)
        if not self.attends and (self.heads or self.kv_heads or self.head_dim or self.position != 'none'):
            raise ConfigError(
                "no layer attends: heads, kv_heads and head_dim are 0 then, and position = 'none' "
                f'(they are {self.heads}, {self.kv_heads}, {self.head_dim} and {self.position!r})'
            )
        if not self.mlp_width and (self.moe or self.residual != 'serial' or self.norm_place != 'pre'):
            raise ConfigError(
                "mlp_width = 0 leaves the MLP out: moe = None, residual = 'serial' and norm_place = 'pre' go with it"
            )
        if in_zigzag(self.sequence, self.attention):
            raise ConfigError(
                f'sequence = {self.sequence!r} runs layers on rows in another order, and a state space needs them in '
                "theirs; set sequence = 'gather'"
            )

    def _check_positions(self) -> None:
        if self.position == 'rope' and not self.mla and self.turned % 2:
            name = 'rope_dim' if self.rope_dim else 'head_dim'
            raise ConfigError(f'{name} = {self.turned} is odd; rope turns pairs, so make it even')
        if not 0 <= self.rope_dim <= self.head_dim or (self.rope_dim and self.mla):
            raise ConfigError(
                f'rope_dim = {self.rope_dim}; it is a part of head_dim = {self.head_dim}, 0 for all of it, and 0 with '
                'mla, which has a rope_dim of its own'
            )
        if self.local_rope_theta < 0 or (self.local_rope_theta and not any(self.windows)):
            raise ConfigError(
                f'local_rope_theta = {self.local_rope_theta} is the base of layers with a window, and windows = '
                f'{self.windows}; set it to 0 where it is that of all layers or none has a window'
            )
        if not any(self.rope_layers) or (not all(self.rope_layers) and (self.position != 'rope' or self.mla)):
            raise ConfigError(
                f"rope_layers = {self.rope_layers} names the layers that position = 'rope' turns, at least one of the "
                'period, and all of them with another scheme (which turns none) or with mla'
            )
        if self.position != 'rope' and (self.rope_dim or self.local_rope_theta or self.rope_scaling):
            raise ConfigError(
                f'position = {self.position!r} turns nothing: leave out rope_dim, local_rope_theta and rope_scaling'
            )
        if isinstance(self.rope_scaling, LongRope) and 2 * len(self.rope_scaling.short) != self.turned:
            raise ConfigError(
                f'rope_scaling has {len(self.rope_scaling.short)} factors for the {self.turned // 2} pairs that turn; '
                'write one a pair'
            )
        if min(self.alibi_max, self.alibi_scale) <= 0 or (
            self.position != 'alibi' and (self.alibi_max, self.alibi_scale) != (8.0, 1.0)
        ):
            raise ConfigError(
                f'alibi_max = {self.alibi_max} and alibi_scale = {self.alibi_scale} with position = {self.position!r}; '
                'they are above 0, and 8 and 1 for every scheme but ALiBi'
            )
        if self.position in ('sinusoidal', 'transformer_xl') and self.width % 2:
            raise ConfigError(f'width = {self.width} is odd; the sinusoids of {self.position!r} positions need it even')
        if self.max_length < (self.position == 'learned'):
            raise ConfigError(
                f'max_length = {self.max_length} with position = {self.position!r}; write how many positions there are '
                'to learn, and for every other scheme the longest text the model is made for, or 0'
            )
        if self.position_offset < 0 or (self.position_offset and self.position != 'learned'):
            raise ConfigError(
                f'position_offset = {self.position_offset} with position = {self.position!r}; it is the number of '
                'rows that the table of learned positions has before its first, and 0 for every other scheme'
            )

    def _check_latent(self) -> None:
        if self.mla is None:
            return
        plain = self.qk_norm == 'none' and not self.qkv_clip and not {'qkv', 'out'} & set(self.bias)
        if self.kv_heads != self.heads or self.position != 'rope' or not plain:
            raise ConfigError(
                f'mla makes {self.heads} keys and values from a latent and rotates a part of them: it takes kv_heads = '
                "heads, position = 'rope', and neither qk_norm nor qkv_clip nor a bias of 'qkv' or 'out'"
            )
        if self.mla.value_dim > self.head_dim + self.mla.rope_dim:
            raise ConfigError(
                f'mla.value_dim = {self.mla.value_dim} is wider than a key, head_dim + mla.rope_dim = '
                f'{self.head_dim + self.mla.rope_dim}; make it at most that'
            )

    def check_split(self, length: int, mesh: Mapping[str, int]) -> None:
        """Raises ConfigError where rows of `length` tokens cannot be split over the mesh."""
        if self.ssm and mesh['seq'] > 1:
            raise ConfigError(
                f'mesh.seq = {mesh["seq"]} splits rows, but a state space goes through them from the first token to '
                'the last; set mesh.seq = 1 and split the batch or the channels (mesh.tensor)'
            )
        noise, moe = self.dropout or Dropout(), self.moe
        by_place = {
            'dropout.residual': noise.residual,
            'moe.router.jitter': moe and moe.router.jitter,
            'moe.capacity': moe and moe.capacity,
        }
        check(
            self.sequence,
            mesh,
            length=length,
            heads=self.heads,
            zigzag=in_zigzag(self.sequence, self.attention),
            by_place=[name for name, value in by_place.items() if value],
        )

    def make(self, *, vocab_multiple: int = 128, stages: int = 1, schedule: Pipeline | None = None) -> 'Decoder':
        """The abstract module; `nn.param.initialise(model, seed)` draws its parameters.

        Raises ConfigError for a config that cannot be.
        """
        from tpu_llm.models.decoder import Decoder  # which is built from this file's configs

        validate(self, 'model')
        return Decoder(self, vocab_multiple=vocab_multiple, stages=stages, schedule=schedule)
