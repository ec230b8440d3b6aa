"""Google's own command lines, as lists of words: what launch/pod.py runs. Nothing here runs anything.

Sources: `gcloud compute tpus queued-resources --help`, docs.cloud.google.com/tpu/docs (runtimes, each
generation's configurations) and docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

from tpu_llm.config import ConfigError
from tpu_llm.parallel.chips import Slice, find

# docs.cloud.google.com/tpu/docs/runtimes; queued resources end at v6e, what comes later is GKE's alone.
RUNTIMES = {
    'v4': 'tpu-ubuntu2204-base',
    'v5e': 'v2-alpha-tpuv5-lite',
    'v5p': 'v2-alpha-tpuv5',
    'v6e': 'v2-alpha-tpuv6e',
}
GKE = {
    'v4': 'tpu-v4-podslice',
    'v5e': 'tpu-v5-lite-podslice',
    'v5p': 'tpu-v5p-slice',
    'v6e': 'tpu-v6e-slice',
    'tpu7x': 'tpu7x',
}


class PodError(ConfigError):
    """One line: what went wrong, and the mend."""


class SetupError(PodError):
    """A setting or a right is missing: no further try mends it."""


# Slices, Jobs and their pods append to a name, and Kubernetes ends at 63 characters.
RULES = {
    'name': ('[a-z]([-a-z0-9]{0,37}[a-z0-9])?', 'lower-case letters, digits and hyphens, at most 39, a letter first'),
    'zone': (r'[a-z]+-[a-z]+\d+-[a-z0-9]+', 'such as us-west4-a: gcloud compute tpus locations list'),
    'project': (r'([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]', 'the project id: gcloud projects list'),
    'cluster': ('[a-z]([-a-z0-9]{0,38}[a-z0-9])?', 'gcloud container clusters list'),
    'slices': (r'[1-9]\d*', '1 or more'),
    'retries': (r'\d+', '0 or more'),
    'duration': (r'\d+[smhd]', 'such as 24h'),
}
SECRET = re.compile(r'[A-Z0-9_]*(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)[A-Z0-9_]*=.')


def check(kind: str, value: str | None) -> None:
    rule, words = RULES[kind]
    if value is not None and not re.fullmatch(rule, value):
        raise PodError(f'{kind} {value!r} cannot be: {words}')


def check_command(command: Sequence[str]) -> None:
    if not command:
        raise PodError('no command to run: put it last, after --, such as -- python launch/run.py --config=…')
    if '--dry-run' in command:
        raise PodError('--dry-run after the -- would go to the command: put it before the --')
    for word in command:
        if found := SECRET.match(word.lstrip('-')):
            name = found[0].partition('=')[0]
            raise PodError(f'{name} on a command line is seen by everyone: put it into a file, push --env-file=FILE')


# ------------------------------------------------------------------------------------------- queued resources


@dataclasses.dataclass(frozen=True)
class Pod:
    """A queued resource by its address. Zone and project may be left to `gcloud config`."""

    name: str
    zone: str | None = None
    project: str | None = None

    def __post_init__(self) -> None:
        for kind in ('name', 'zone', 'project'):
            check(kind, getattr(self, kind))

    @property
    def where(self) -> list[str]:
        return [f'--{kind}={value}' for kind in ('zone', 'project') if (value := getattr(self, kind))]

    def gcloud(self, verb: str, *words: str) -> list[str]:
        return ['gcloud', 'compute', 'tpus', 'queued-resources', verb, *words, *self.where, '--quiet']

    def create(
        self, shape: Slice, *, slices: int, capacity: str, wait: str, account: str | None = None, also: str = ''
    ) -> list[str]:
        check('duration', wait)
        if shape.chip.name not in RUNTIMES:
            raise PodError(f'{shape} is offered by GKE alone: use `pod.py manifest` or `pod.py xpk`')
        nodes = [f'--node-id={self.name}'] if slices == 1 else [f'--node-count={slices}', f'--node-prefix={self.name}']
        words = [f'--accelerator-type={shape.accelerator_type}']
        if shape != find(shape.name):  # not as cubic as can be
            words = [f'--type={shape.chip.cloud}', f'--topology={shape.topology}']
        words += [f'--runtime-version={RUNTIMES[shape.chip.name]}']
        words += [f'--{capacity}'] if capacity != 'on-demand' else []
        words += [f'--service-account={account}'] if account else []
        return self.gcloud('create', self.name, *nodes, *words, f'--valid-until-duration={wait}', *shlex.split(also))

    def describe(self) -> list[str]:
        return self.gcloud('describe', self.name, '--format=json')

    def delete(self) -> list[str]:
        return self.gcloud('delete', self.name, '--force')

    def ssh(self, command: str) -> list[str]:
        """The same command on every worker of every slice, all at once: a run that waits for the others would hang in
        batches. The flags make ssh notice a connection that is gone."""
        alive = [f'--ssh-flag=-o{flag}' for flag in ('ServerAliveInterval=30', 'ServerAliveCountMax=4')]
        everywhere = ['--worker=all', '--node=all', '--batch-size=all']
        return self.gcloud('ssh', self.name, *everywhere, *alive, f'--command={command}')

    def scp(self, files: Sequence[str]) -> list[str]:
        """Files into ~/pod of every worker."""
        return self.gcloud('scp', *files, f'{self.name}:pod/', '--worker=all', '--node=all')


def worker(*words: str) -> str:
    """A verb of launch/worker.py, for `ssh`."""
    return shlex.join(['python3', 'pod/code/launch/worker.py', *words])


PREPARE = 'install -d -m 700 pod pod/job pod/code'
BUSY = 'echo "a command runs here: pod.py stop ends it"; exit 3'


def unpack(extras: str) -> str:
    """Replaces the checkout that was pushed before (what git ignores, such as runs/, stays) and installs it.

    uv brings its own Python, since the images' is older than 3.11.
    """
    steps = [
        'cd pod',
        f'{{ flock -n job/lock true || {{ {BUSY}; }}; }}',
        '{ chmod 600 env 2>/dev/null || true; }',
        'touch files',
        "(cd code && xargs -r -d '\\n' rm -f -- < ../files && tar xzf ../code.tgz && tar tzf ../code.tgz > ../files)",
        'python3 -m pip install --quiet --user uv',
        '{ test -x venv/bin/python || python3 -m uv venv --quiet --python 3.12 venv; }',
        f'python3 -m uv pip install --quiet --python venv/bin/python -e {shlex.quote(f"code[{extras}]")}',
    ]
    return ' && '.join(steps)


# ------------------------------------------------------------------------------------------------- Kubernetes


def xpk(name: str, shape: Slice, *, slices: int, cluster: str, image: str, command: Sequence[str], tries: int,
        where: Sequence[str] = (), env_file: str | None = None) -> list[str]:  # fmt: skip
    check('name', name)
    check('cluster', cluster)
    words = [
        f'--workload={name}',
        f'--cluster={cluster}',
        f'--tpu-type={shape.accelerator_type}',
        f'--num-slices={slices}',
    ]
    words += [f'--docker-image={image}', f'--command={shlex.join(command)}', f'--max-restarts={tries}']
    words += [f'--env-file={env_file}'] if env_file else []
    return ['xpk', 'workload', 'create', *words, *where]


def jobset(name: str, shape: Slice, *, slices: int, image: str, command: Sequence[str], tries: int, spot: bool = False,
           account: str | None = None, secret: str | None = None) -> dict[str, Any]:  # fmt: skip
    """A JobSet: one Job a slice, one pod a host, all started again together when one is lost.

    A run that ends with 2 (a mistake in its config) is not started again. `secret` names a Kubernetes secret whose
    entries become environment variables. GKE tells every pod of a slice its hosts' names, and JobSet its slice.
    """
    check('name', name)
    chips = min(shape.chips, 4)  # a host
    hosts = shape.chips // chips
    selector = {'gke-tpu-accelerator': GKE[shape.chip.name], 'gke-tpu-topology': shape.topology}
    container = {
        'name': 'run',
        'image': image,
        'command': list(command),
        'ports': [{'containerPort': port} for port in (8471, 8080, 8431, 8482)],  # libtpu's, slices', metrics, jax's
        'resources': {'requests': {'google.com/tpu': chips}, 'limits': {'google.com/tpu': chips}},
        **({'envFrom': [{'secretRef': {'name': secret}}]} if secret else {}),
    }
    pod = {
        **({'serviceAccountName': account} if account else {}),
        'restartPolicy': 'Never',
        'hostNetwork': True,
        'dnsPolicy': 'ClusterFirstWithHostNet',
        'terminationGracePeriodSeconds': 120,  # to save in
        'nodeSelector': {
            **{f'cloud.google.com/{label}': value for label, value in selector.items()},
            **({'cloud.google.com/gke-spot': 'true'} if spot else {}),
        },
        'containers': [container],
    }
    on_mistake = {'action': 'FailJob', 'onExitCodes': {'containerName': 'run', 'operator': 'In', 'values': [2]}}
    job = {
        'parallelism': hosts,
        'completions': hosts,
        'backoffLimit': 0,
        'podFailurePolicy': {'rules': [on_mistake]},
        'template': {'spec': pod},
    }
    give_up = {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': {
            'name': name,
            'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'},
        },
        'spec': {
            'failurePolicy': {'maxRestarts': tries, 'rules': [give_up]},
            'replicatedJobs': [{'name': 'slice', 'replicas': slices, 'template': {'spec': job}}],
        },
    }


# -------------------------------------------------------------------------------------------- their complaints

SETUP = {
    r'has not been used in project|SERVICE_DISABLED|API .*not enabled': 'gcloud services enable tpu.googleapis.com',
    r'PERMISSION_DENIED|does not have permission|forbidden': (
        'this account needs roles/tpu.admin and roles/iam.serviceAccountUser in the project: gcloud auth list'
    ),
    r'reauthentic|invalid_grant|no active account': 'gcloud auth login',
    r'compute/zone': 'give --zone, or gcloud config set compute/zone ZONE',
    r'core/project|\[project\]': 'give --project, or gcloud config set project PROJECT',
}
MENDS = SETUP | {
    r'quota': 'ask for more at console.cloud.google.com/iam-admin/quotas, or delete what was forgotten: pod.py status',
    r'no more capacity|insufficient|stockout|resource_pool_exhausted|not available within': (
        'wait longer (--wait=48h), take another zone or capacity, or fewer chips'
    ),
    r'gcloud auth login|credentials': 'gcloud auth login',  # which gcloud says of a broken network, too
    r'ssh-add|ssh-agent': 'eval "$(ssh-agent)"; ssh-add ~/.ssh/google_compute_engine (made at the first ssh)',
    r'ALREADY_EXISTS|already exists': 'take another name, or delete it: pod.py delete NAME',
    r'accelerator.?type.*(not found|invalid)|location.*(not found|invalid)': (
        'not every zone has every type: gcloud compute tpus accelerator-types list --zone=ZONE'
    ),
}


def explain(said: str) -> str:
    """What gcloud said, in one line, and what to do about it where that is known."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    begins = next((i for i, line in enumerate(lines) if line.startswith('ERROR')), max(0, len(lines) - 3))
    text = re.sub(r'^ERROR:( \([\w.-]+\))?\s*', '', ' '.join(lines[begins:])) or 'it failed without a word'
    mends = [mend for pattern, mend in MENDS.items() if re.search(pattern, text, re.IGNORECASE)]
    return f'{text.rstrip(".")}; {mends[0]}' if mends else text


def refusal(said: str) -> PodError:
    """What to raise for it."""
    missing = any(re.search(pattern, said, re.IGNORECASE) for pattern in SETUP)
    return (SetupError if missing else PodError)(explain(said))
