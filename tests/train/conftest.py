import pytest


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """A folder of small documents, ours: bytes of every kind of line."""
    folder = tmp_path_factory.mktemp('text')
    for i in range(6):
        lines = [f'{i} times {n} is {i * n}, and the next is {i * n + i}.' for n in range(10 + 7 * i)]
        (folder / f'{i}.txt').write_text('\n'.join(lines))
    return folder
