"""What a program costs, as a small JSON that one can keep and compare: what changed, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

from tpu_llm.plan.plan import Plan

_NOISE = 0.005  # differences below this share are none
_NAMES = {'cycles': 'cycles without kernels', 'kernel_cycles': 'cycles charged for kernels', 'flops': 'executed FLOPs'}

_OTHERS = ('rollout', 'scoring')  # programs that some runs have besides their step


def of(plan: Plan) -> dict[str, Any]:
    """Of a plan that fits."""
    cost = plan.cost
    assert cost is not None, plan.reason
    sums: dict[str, dict[str, int]] = {}
    for each in cost.traffic:
        entry = sums.setdefault(f'{each.part} {each.kind} over {", ".join(each.axes)}', {'bytes': 0, 'count': 0})
        entry['bytes'] += round(each.bytes)
        entry['count'] += each.count
    return {
        'slice': plan.slice,
        'mesh': dict(plan.mesh),
        'versions': plan.versions,
        'peak_bytes': plan.memory.allocated,
        'flops': round(cost.flops),
        'cycles': cost.cycles,
        'kernel_cycles': round(cost.kernel_cycles),
        'seconds': _short(plan.seconds),
        'tokens_per_second_per_chip': round(plan.tokens_per_second),
        'collectives': {name: sums[name] for name in sorted(sums) if sums[name]['bytes'] > 1e6},
        'gathered_while_computing': round(sum(each.hidden for each in cost.traffic if each.kind == 'all-gather')),
        'kernels': dict(sorted(cost.kernels.items())),
        **{each.name: {'peak_bytes': each.memory.allocated, 'seconds': _short(each.seconds)} for each in plan.others},
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """'mlp all-gather over tensor appeared: +1.20 GB a step', from an older budget to a newer one."""
    for name in ('slice', 'mesh', 'kernels'):
        if old[name] != new[name]:
            yield f'{name}: {old[name]} became {new[name]}'
    for name, words in _NAMES.items():
        if _differ(old[name], new[name]):
            was, now = old[name], new[name]
            yield f'{words}: {was / 1e9:,.3f}e9 became {now / 1e9:,.3f}e9 ({now / was - 1:+.1%})'
    if _differ(old['peak_bytes'], new['peak_bytes']):
        yield f'peak HBM: {_gib(old["peak_bytes"])} became {_gib(new["peak_bytes"])}'
    before, after = old['collectives'], new['collectives']
    for name in sorted({*before, *after}):
        was, now = (each.get(name, {'bytes': 0, 'count': 0}) for each in (before, after))
        change = f'{(now["bytes"] - was["bytes"]) / 1e9:+.2f} GB a step'
        if not was['bytes']:
            yield f'{name} appeared: {change}'
        elif not now['bytes']:
            yield f'{name} disappeared: {change}'
        elif _differ(was['bytes'], now['bytes']):
            yield f'{name}: {change} ({was["count"]} times became {now["count"]})'
    hidden = 'gathered_while_computing'
    if _differ(old[hidden], new[hidden]):
        yield f'gathered while computing: {old[hidden] / 1e9:.2f} GB became {new[hidden] / 1e9:.2f}'
    for name in _OTHERS:
        was, now = (each.get(name, {'peak_bytes': 0, 'seconds': 0.0}) for each in (old, new))
        if _differ(was['peak_bytes'], now['peak_bytes']):
            yield f'peak HBM of the {name}: {_gib(was["peak_bytes"])} became {_gib(now["peak_bytes"])}'
        if _differ(was['seconds'], now['seconds']):
            yield f'seconds of the {name}: {was["seconds"]:.3g} became {now["seconds"]:.3g}'


def _differ(old: float, new: float) -> bool:
    return abs(new - old) > _NOISE * max(abs(old), abs(new))


def _short(seconds: float) -> float:
    return float(f'{seconds:.4g}')


def _gib(size: float) -> str:
    return f'{size / 2**30:.2f} GiB'
