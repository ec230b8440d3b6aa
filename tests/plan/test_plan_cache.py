"""What is kept is there again, whole or not at all."""

import multiprocessing

import pytest

from tpu_llm.plan.cache import Cache, default

VALUE = {'text': 'ENTRY ' * 5000, 'memory': {'kinds': {'parameters': 3}}, 'seconds': 1.5, 'none': None}


def test_a_value_comes_back(tmp_path):
    cache = Cache(tmp_path / 'not' / 'there yet')
    assert cache.get('key') is None
    cache.put('key', VALUE)
    assert cache.get('key') == VALUE
    assert cache.get('other') is None
    cache.put('key', {'text': ''})
    assert cache.get('key') == {'text': ''}
    assert [path.name for path in cache.folder.iterdir()] == ['key.json.gz']


def test_what_cannot_be_read_is_not_there(tmp_path):
    cache = Cache(tmp_path)
    cache.put('key', VALUE)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = [whole[:size] for size in (0, 1, 5, 20, len(whole) - 4)]
    broken += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(len(whole))]
    broken.append(b'{"text": ""}')
    for bad in broken:
        path.write_bytes(bad)
        assert cache.get('key') in (None, VALUE)  # some bytes of the header say nothing
    path.write_bytes(whole)
    assert cache.get('key') == VALUE


def test_a_folder_in_its_place_is_not_it(tmp_path):
    (tmp_path / 'key.json.gz').mkdir()
    assert Cache(tmp_path).get('key') is None


def write(folder, letter):
    for _ in range(50):
        Cache(folder).put('key', {'text': letter * 100_000})


def test_whoever_reads_while_others_write_gets_one_of_the_values_whole(tmp_path):
    cache = Cache(tmp_path)
    cache.put('key', {'text': 'a' * 100_000})
    spawn = multiprocessing.get_context('spawn')
    writers = [spawn.Process(target=write, args=(tmp_path, letter)) for letter in 'ab']
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        found = cache.get('key')
        assert found is not None
        assert found['text'] in ('a' * 100_000, 'b' * 100_000)
    assert [each.exitcode for each in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ['key.json.gz']


@pytest.mark.parametrize('home', [True, False])
def test_where_it_is(monkeypatch, tmp_path, home):
    monkeypatch.setenv('HOME', str(tmp_path))
    if home:
        monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
        assert default().folder == tmp_path / '.cache' / 'tpu_llm' / 'plans'
    else:
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'mine'))
        assert default().folder == tmp_path / 'mine' / 'tpu_llm' / 'plans'
