"""A config names its mistakes, and its dump, differences and digest follow the marks of its fields."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest

from tpu_llm.config import (
    Change,
    ConfigError,
    Periodic,
    choose,
    diff,
    digest,
    dump,
    flatten,
    leaf_marks,
    load,
    machine,
    nearest,
    parse_arg,
    schedule,
    to_json,
    validate,
)


def config(cls):
    return dataclasses.dataclass(kw_only=True, slots=True)(cls)


@config
class Model:
    width: int = 64
    heads: int = 4
    norm: Literal['rms', 'layer'] = 'rms'

    def validate(self):
        if self.width % self.heads:
            raise ConfigError(f'heads {self.heads} does not divide width {self.width}: choose a divisor')


@config
class Source:
    path: str = 'a'
    weight: float = 1.0
    workers: int = machine(2)


@config
class Mesh:
    data: int = 1
    fsdp: int = 1


@config
class Run:
    model: Model = dataclasses.field(default_factory=Model)
    lora: Model | None = None
    sources: tuple[Source, ...] = (Source(), Source(path='b'))
    by_name: dict[str, Source] = dataclasses.field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    names: list[str] = dataclasses.field(default_factory=list)
    hosts: tuple[int, ...] = machine((0, 1))
    mesh: Mesh = machine(factory=Mesh)
    steps: int = schedule(100)
    rate: float = 1.0
    nest: bool = False
    make: Callable[..., Any] = json.dumps
    window: int | None = None
    anything: Any = None


# ---------------------------------------------------------------------------------------------------- the arg


def test_the_arg_takes_the_types_of_the_defaults():
    arg = parse_arg('size=1b, smoke,steps=5,rate=3e-4,shuffle=false', **DEFAULTS)
    assert vars(arg) == {
        'size': '1b',
        'smoke': True,
        'steps': 5,
        'rate': 3e-4,
        'shuffle': False,
        'path': None,
    }


DEFAULTS = {'size': '125m', 'smoke': False, 'steps': 10, 'rate': 1.0, 'shuffle': True, 'path': None}


@pytest.mark.parametrize('arg', [None, '', ' ', ','])
def test_no_arg_gives_the_defaults(arg):
    assert vars(parse_arg(arg, **DEFAULTS)) == DEFAULTS


def test_a_value_may_hold_an_equals_sign():
    assert parse_arg('path=gs://b/x=1', path=None).path == 'gs://b/x=1'


@pytest.mark.parametrize(
    ('arg', 'message'),
    [
        ('sise=1b', r"config arg 'sise' is unknown \(did you mean 'size'\?\); this config takes size=125m, "),
        ('steps=many', "config arg steps='many' is not of type int"),
        ('smoke=perhaps', "config arg smoke='perhaps' is not true or false"),
        ('size', 'config arg size needs a value: size=…'),
        ('steps=1,steps=2', "config arg steps is given twice in 'steps=1,steps=2'"),
    ],
)
def test_a_wrong_arg_is_named(arg, message):
    with pytest.raises(ConfigError, match=message):
        parse_arg(arg, **DEFAULTS)


def test_nearest_is_silent_without_a_near_name():
    assert nearest('widht', ['width', 'heads']) == " (did you mean 'width'?)"
    assert nearest('zzz', ['width', 'heads']) == ''


def test_choose():
    assert choose('preset', 'b', {'a': 1, 'b': 2}) == 2
    with pytest.raises(ConfigError, match=r"unknown size '1g' \(did you mean '1b'\?\); there are 1b, 3b"):
        choose('size', '1g', {'1b': 1, '3b': 3})


# ------------------------------------------------------------------------------------------------- validation


def test_defaults_are_valid_and_stay_as_they_are():
    run = Run()
    validate(run)
    assert run == Run()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'steps': 1.5}, 'config.steps is 1.5; expected int'),
        ({'steps': True}, 'config.steps is True; expected int'),
        ({'rate': '1'}, "config.rate is '1'; expected float"),
        ({'rate': False}, 'config.rate is False; expected float'),
        ({'nest': 1}, 'config.nest is 1; expected bool'),
        ({'window': 'a'}, "config.window is 'a'; expected int | None"),
        ({'model': None}, 'config.model is None; expected Model'),
        ({'betas': (0.9,)}, 'config.betas is (0.9,); expected tuple[float, float]'),
        ({'betas': 0.9}, 'config.betas is 0.9; expected tuple[float, float]'),
        ({'hosts': (0, 'b')}, "config.hosts is (0, 'b'); expected tuple[int, ...]"),
        ({'names': [1]}, 'config.names is [1]; expected list[str]'),
        ({'by_name': {1: Source()}}, 'config.by_name is {1: Source('),
        ({'make': 3}, 'config.make is 3; expected collections.abc.Callable[..., Any]'),
        ({'model': Model(norm='batch')}, "config.model.norm is 'batch'; expected one of 'rms', 'layer'"),
        ({'sources': (Source(), Source(weight='x'))}, "config.sources[1].weight is 'x'; expected float"),
        ({'by_name': {'web': Source(weight='x')}}, "config.by_name.web.weight is 'x'; expected float"),
        ({'model': Model(heads=5)}, 'config.model: heads 5 does not divide width 64: choose a divisor'),
        ({'lora': Model(heads=5)}, 'config.lora: heads 5 does not divide width 64: choose a divisor'),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ConfigError) as caught:
        validate(Run(**change))
    assert str(caught.value).startswith(message)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'change',
    [{'rate': 1}, {'window': 3}, {'betas': [0.9, 1]}, {'lora': Model()}, {'by_name': {'a': Source()}}],
)
def test_a_right_field_is_accepted_as_it_is(change):
    run = Run(**change)
    validate(run)
    assert run == Run(**change)


def test_one_is_not_true():
    @config
    class Node:
        level: Literal[1, 2] = 1

    with pytest.raises(ConfigError, match=r'config\.level is True; expected one of 1, 2'):
        validate(Node(level=True))


@pytest.mark.parametrize(
    ('said', 'message'),
    [
        ('config.batch 6 is not a multiple of 4', 'config.batch 6 is not a multiple of 4'),
        ('configuration is odd', 'config: configuration is odd'),
    ],
)
def test_a_nodes_own_message_gets_its_path_once(said, message):
    @config
    class Node:
        def validate(self):
            raise ValueError(said)

    with pytest.raises(ConfigError) as caught:
        validate(Node())
    assert str(caught.value) == message


# -------------------------------------------------------------------------------------- dump, diff and digest


def test_the_dump_survives_json_and_names_types():
    run = Run(by_name={'web': Source()}, lora=Model())
    assert json.loads(to_json(run)) == dump(run)
    assert dump(run)['model']['type'] == f'{__name__}.Model'
    assert dump(run)['make'] == 'json.dumps'
    assert dump(run)['betas'] == [0.9, 0.95]
    assert dump(run)['window'] is None


@pytest.mark.parametrize('value', [lambda x: x, {1, 2}, object()])
def test_what_no_file_can_name_again_is_refused(value):
    with pytest.raises(ConfigError, match=r'^config\.lora\.norm is .*; a config holds'):
        dump(Run(lora=Model(norm=value)))


def test_flatten_names_every_leaf():
    leaves = flatten(dump(Run(by_name={'web': Source()})))
    assert leaves['config.sources[1].path'] == 'b'
    assert leaves['config.by_name.web.weight'] == 1.0
    assert leaves['config.hosts[0]'] == 0
    assert leaves['config.lora'] is None


def test_every_leaf_has_a_mark():
    run = Run(by_name={'web': Source()}, lora=Model(), anything=((Source(),), {'k': Mesh()}))
    marks = leaf_marks(run)
    assert set(marks) == set(flatten(dump(run)))
    expected = {
        'config.model.width': 'maths',
        'config.type': 'maths',
        'config.steps': 'schedule',
        'config.hosts[1]': 'machine',
        'config.mesh.data': 'machine',  # the mark of the node covers what is below
        'config.mesh.type': 'machine',
        'config.sources[0].weight': 'maths',
        'config.sources[0].workers': 'machine',
        'config.by_name.web.workers': 'machine',
        'config.anything[0][0].workers': 'machine',
    }
    assert {path: marks[path] for path in expected} == expected


def saved(run):
    return json.loads(to_json(run))


def test_equal_configs_have_no_difference():
    assert diff(saved(Run(lora=Model())), Run(lora=Model())) == []


def test_a_change_says_path_values_and_mark():
    changes = diff(saved(Run()), Run(model=Model(width=128), steps=200, mesh=Mesh(fsdp=2)))
    assert changes == [
        Change('config.model.width', 64, 128, 'maths'),
        Change('config.mesh.fsdp', 1, 2, 'machine'),
        Change('config.steps', 100, 200, 'schedule'),
    ]
    assert str(changes[0]) == 'config.model.width: 64 → 128'


def test_what_is_gone_keeps_the_mark_of_what_held_it():
    old = saved(Run(hosts=(0, 1, 2), lora=Model(), sources=(Source(), Source(path='b'), Source())))
    marks = {change.path: change.mark for change in diff(old, Run())}
    assert marks['config.hosts[2]'] == 'machine'
    assert marks['config.lora.width'] == 'maths'
    assert marks['config.sources[2].path'] == 'maths'
    assert marks['config.sources[2].workers'] == 'maths'  # nobody knows any more that it was not
    old['mesh']['gone'] = 3
    old['gone.with[dots]'] = 3
    marks = {change.path: change.mark for change in diff(old, Run())}
    assert marks['config.mesh.gone'] == 'machine'
    assert marks['config.gone.with[dots]'] == 'maths'


def test_only_maths_changes_the_digest():
    same = [Run(), Run(steps=5), Run(mesh=Mesh(data=8)), Run(hosts=()), Run(rate=1), Run(betas=[0.9, 0.95])]
    other = [Run(rate=2.0), Run(model=Model(width=128)), Run(sources=()), Run(make=json.loads), Run(window=0)]
    assert {digest(run) for run in same} == {digest(Run())}
    assert len({digest(run) for run in [Run(), *other]}) == 1 + len(other)
    assert len(digest(Run())) == 10


def test_the_type_of_a_node_is_maths():
    @config
    class Model2:
        width: int = 64

    assert digest(Run(anything=Model())) != digest(Run(anything=Model2()))


def test_marked_fields_without_a_default_are_required():
    @config
    class Node:
        workers: int = machine()

    with pytest.raises(TypeError, match='workers'):
        Node()
    assert leaf_marks(Node(workers=2))['config.workers'] == 'machine'


# --------------------------------------------------------------------------------------------- load, periodic


def test_a_dumped_config_comes_back():
    @config
    class Holder:
        hook: Periodic
        many: tuple[Periodic, ...]
        named: dict[str, Any]

    holder = Holder(hook=Periodic(every=3), many=(Periodic(),), named={'a': Periodic(last=False), 'b': 1.5})
    fields = {name: value for name, value in saved(holder).items() if name != 'type'}
    assert Holder(**load(fields)) == holder


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('os.system', 'os.system is not a config of tpu_llm; it cannot be loaded'),
        ('tpu_llm.config.nearest', 'cannot load the config tpu_llm.config.nearest: it is not a config'),
        ('tpu_llm.config.Gone', "cannot load the config tpu_llm.config.Gone: module 'tpu_llm.config' has no"),
        ('tpu_llm.gone.Gone', "cannot load the config tpu_llm.gone.Gone: No module named 'tpu_llm.gone'"),
        ('tpu_llm.config.Periodic', "unexpected keyword argument 'name'"),
    ],
)
def test_what_is_no_config_of_this_version_is_not_loaded(kind, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load({'type': kind, 'name': 'x'})


@pytest.mark.parametrize(
    ('every', 'last', 'steps'), [(0, True, [10]), (4, True, [4, 8, 10]), (5, False, [5, 10]), (0, False, [])]
)
def test_periodic(every, last, steps):
    periodic = Periodic(every=every, last=last)
    assert [step for step in range(1, 11) if periodic.due(step, 10)] == steps
