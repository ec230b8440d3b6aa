"""State space models and hybrids of them with attention: Mamba, Mamba-2, Jamba."""

from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.fact import Fact, Facts
from tpu_llm.nn.mamba import Mamba
from tpu_llm.nn.mamba2 import Mamba2
from tpu_llm.nn.moe import MoE
from tpu_llm.nn.router import Router


def _bare(width: int, layers: int, ssm: Mamba | Mamba2, *, vocab_size: int, tied: bool = True) -> DecoderConfig:
    """No layer attends and none has an MLP."""
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=0,
        kv_heads=0,
        head_dim=0,
        mlp_width=0,
        norm_eps=1e-5,
        position='none',
        mixers=('ssm',),
        ssm=ssm,
        tied_embeddings=tied,
    )


def _mamba(width: int, layers: int) -> DecoderConfig:
    """Gu and Dao, 2023, arXiv 2312.00752, table 12, and the model cards of state-spaces."""
    return _bare(width, layers, Mamba(), vocab_size=50_280)


def _mamba2(width: int, layers: int) -> DecoderConfig:
    """Dao and Gu, 2024, arXiv 2405.21060, table 9, and the model cards of state-spaces."""
    return _bare(width, layers, Mamba2(), vocab_size=50_288)


def _codestral() -> DecoderConfig:
    """The model card of mistralai/Mamba-Codestral-7B-v0.1, 2024."""
    return _bare(4096, 64, Mamba2(groups=8), vocab_size=32_768, tied=False)


def _jamba(width: int, layers: int, heads: int, mlp_width: int) -> DecoderConfig:
    """Lieber et al., 2024, arXiv 2403.19887, §3, and the model cards of ai21labs; 1.5: arXiv 2408.12570, §2."""
    experts = MoE(experts=16, chosen=2, expert_width=mlp_width, every=2, router=Router(choice='softmax_then_topk'))
    return DecoderConfig(
        vocab_size=65_536,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
        position='none',
        max_length=262_144,
        mixers=('ssm', 'ssm', 'ssm', 'ssm', 'attention', 'ssm', 'ssm', 'ssm'),
        ssm=Mamba(norms=True),
        moe=experts,
    )


_MAMBA = {
    'mamba-130m': Fact(lambda: _mamba(768, 24), 129_135_360, '130M'),
    'mamba-370m': Fact(lambda: _mamba(1024, 48), 371_516_416, '370M'),
    'mamba-790m': Fact(lambda: _mamba(1536, 48), 793_204_224, '790M'),
    'mamba-1.4b': Fact(lambda: _mamba(2048, 48), 1_372_178_432, '1.4B'),
    'mamba-2.8b': Fact(lambda: _mamba(2560, 64), 2_768_345_600, '2.8B'),
}
_MAMBA2 = {
    'mamba2-130m': Fact(lambda: _mamba2(768, 24), 128_989_632, '130M'),
    'mamba2-370m': Fact(lambda: _mamba2(1024, 48), 368_346_624, '370M'),
    'mamba2-780m': Fact(lambda: _mamba2(1536, 48), 780_161_280, '780M'),
    'mamba2-1.3b': Fact(lambda: _mamba2(2048, 48), 1_343_757_312, '1.3B'),
    'mamba2-2.7b': Fact(lambda: _mamba2(2560, 64), 2_702_599_680, '2.7B'),
    'mamba-codestral-7b': Fact(_codestral, 7_285_403_648, '7.29B'),
}
_JAMBA = {
    'jamba-v0.1': Fact(lambda: _jamba(4096, 32, 32, 14_336), 51_570_323_328, '52B'),
    'jamba-1.5-mini': Fact(lambda: _jamba(4096, 32, 32, 14_336), 51_570_323_328, '52B'),
    'jamba-1.5-large': Fact(lambda: _jamba(8192, 72, 64, 24_576), 398_555_145_696, '398B'),
}
FACTS = (
    Facts('Mamba', _MAMBA, 'MambaForCausalLM'),
    Facts('Mamba-2', _MAMBA2, 'Mamba2ForCausalLM'),
    Facts('Jamba', _JAMBA, 'JambaForCausalLM'),
)
