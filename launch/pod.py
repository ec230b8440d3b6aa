"""TPU pods, over Google's own command line: every verb is a few calls of gcloud, which --dry-run prints.

    python launch/pod.py create NAME --type=v5e-16 --capacity=spot --zone=us-west4-a
    python launch/pod.py push NAME                           this checkout, without what git ignores, and its packages
    python launch/pod.py run NAME -- python launch/run.py --config=… --workdir=gs://…
    python launch/pod.py status [NAME]                       what there is (and costs), and what runs on it
    python launch/pod.py stop NAME                           the run saves and ends; the pod stays
    python launch/pod.py delete NAME
    python launch/pod.py manifest NAME --type=v6e-256 --image=… -- python launch/run.py …      a JobSet, for GKE
    python launch/pod.py xpk NAME --type=tpu7x-64 --cluster=… --image=… -- python launch/run.py …

Types count chips (v5p-512), or give a topology (v5p:4x8x16). Where --zone and --project are not given, gcloud's own
configuration decides.

`run` starts one command on all workers and shows their logs, each line with its worker's name. The command does not
need the connection: after Ctrl-C, a dropped ssh or a closed laptop the same `run` attaches to it again. With --type it
creates the pod if there is none, and again where it was preempted; the run itself continues from its checkpoint.
Secrets (WANDB_API_KEY) go into a file of mode 600: --env-file=FILE. docs/tpu.md is the tour.
"""

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import cloud
from launch.cloud import Pod, PodError, SetupError
from launch.queued import LOST, Ended, Queued, Wanted, backoff, say
from tpu_llm.config import ConfigError
from tpu_llm.parallel import chips

SETTLE = 30  # seconds after which Cloud admits a preemption that the workers have felt already
MISTAKE = 2  # launch/run.py's exit status for a mistake of the user's
NO_POD = (*LOST, 'SUSPENDING', 'DELETING', 'gone')


def main(argv: Sequence[str]) -> int:
    own = list(argv).index('--') if '--' in argv else len(argv)
    try:
        args = _parser().parse_args(argv[:own])
        args.command = list(argv[own + 1 :])
        for kind in ('slices', 'retries'):
            cloud.check(kind, str(getattr(args, kind, 1)))
        return args.verb(args) or 0
    except ConfigError as error:
        print('error:', error, file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        say('left; what was started goes on: the same command attaches, `stop` ends it')
        return 130


def create(args: argparse.Namespace) -> None:
    _queued(args).ensure(_wanted(args), args.retries)


def push(args: argparse.Namespace) -> None:
    _queued(args).push(args.env_file, args.extras)


def run(args: argparse.Namespace) -> int:
    """Ends with the command's exit status; raises PodError where there is no more to try."""
    cloud.check_command(args.command)
    pod = _queued(args)
    _make(pod, args) if args.type else None
    token, pauses = secrets.token_hex(4), backoff()
    for left in reversed(range(args.retries + 1)):
        ended = pod.attend(token, args.command)
        if ended.stopped or (ended.code == 0 and not ended.preempted):
            return ended.code
        state = _settle(pod, ended)
        if ended.code == MISTAKE and not ended.exits:
            raise PodError(
                f'no worker answered: pod.py push {args.name} first, or gcloud is old: gcloud components update'
            )
        if state == 'ACTIVE' and ended.failed and not ended.preempted:
            worker, code = next(iter(ended.failed.items()))
            say(f'{worker} ended with exit {code}, and the pod is well: its log is above')
            return code
        if state in NO_POD and not args.type:
            raise PodError(f'{args.name} is {state}: with --type=… and --capacity=… this command creates it again')
        if not left:
            break
        say(f'{args.name} is {state}; trying again ({left} left)')
        sleep(next(pauses))
        if state in NO_POD:
            _make(pod, args)
        if state in NO_POD or ended.preempted:
            token = secrets.token_hex(4)  # a new start; otherwise there may be one to attach to
    raise PodError(f'gave up after {args.retries + 1} tries, {args.name} being {state}; the same command continues')


def _make(pod: Queued, args: argparse.Namespace) -> None:
    if pod.ensure(_wanted(args), args.retries):
        pod.push(args.env_file, args.extras)


def _settle(pod: Queued, ended: Ended) -> str:
    """The pod's state once it can be trusted: a preemption is felt by the workers before Cloud tells of it."""
    try:
        state = pod.state()
        if state == 'ACTIVE' and MISTAKE not in ended.failed.values():
            sleep(SETTLE)
            state = pod.state()
        return state
    except SetupError:
        raise
    except PodError as error:  # often what broke ssh broke this, too
        say(str(error))
        return 'out of reach'


def status(args: argparse.Namespace) -> None:
    if args.name is None:
        args.name = 'any'
        print((pod := _queued(args)).call(pod.pod.gcloud('list')), end='')
        return
    pod = _queued(args)
    state = pod.state()
    if not args.dry_run:
        print(f'{args.name}: {state}')
    if state == 'ACTIVE' or args.dry_run:
        print(pod.call(pod.pod.ssh(cloud.worker('status'))), end='')


def stop(args: argparse.Namespace) -> None:
    print((pod := _queued(args)).call(pod.pod.ssh(cloud.worker('stop'))), end='')


def delete(args: argparse.Namespace) -> None:
    (pod := _queued(args)).call(pod.pod.delete())
    if not args.dry_run:
        say(f'{args.name} is deleted; `pod.py status` lists what is left')


def manifest(args: argparse.Namespace) -> None:
    import yaml

    cloud.check_command(args.command)
    more = {'account': args.service_account, 'secret': args.secret, 'spot': args.capacity == 'spot'}
    text = yaml.safe_dump(cloud.jobset(args.name, _shape(args), **_workload(args), **more), sort_keys=False)
    print(_queued(args).call(['kubectl', 'apply', '-f', '-'], text) if args.apply else text, end='')


def xpk(args: argparse.Namespace) -> None:
    cloud.check_command(args.command)
    pod = _queued(args)
    more = {'cluster': args.cluster, 'where': pod.pod.where, 'env_file': args.env_file}
    print(pod.call(cloud.xpk(args.name, _shape(args), **_workload(args), **more)), end='')


def _queued(args: argparse.Namespace) -> Queued:
    return Queued(Pod(args.name, args.zone, args.project), args.dry_run)


def _workload(args: argparse.Namespace) -> dict:
    return {'slices': args.slices, 'image': args.image, 'command': args.command, 'tries': args.retries}


def _wanted(args: argparse.Namespace) -> Wanted:
    more = {'account': args.service_account, 'also': args.create_flags}
    return Wanted(shape=_shape(args), slices=args.slices, capacity=args.capacity, wait=args.wait, **more)


def _shape(args: argparse.Namespace) -> chips.Slice:
    shape = chips.find(args.type)
    if shape.count > 1:
        single = args.type.partition('x')[2]
        raise PodError(f'{args.type} is {shape.count} slices: --type={single} --slices={shape.count}')
    return shape


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as of all other mistakes."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f'{message}; {self.prog} --help lists the options')


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar='VERB')
    for verb in (create, push, run, status, stop, delete, manifest, xpk):
        of = verbs.add_parser(verb.__name__)
        of.set_defaults(verb=verb)
        of.add_argument('name', nargs='?' if verb is status else None, help='of the pod')
        of.add_argument('--zone')
        of.add_argument('--project')
        of.add_argument('--dry-run', action='store_true', help='print the calls instead of making them')
        if verb in (create, run, manifest, xpk):
            of.add_argument('--type', required=verb is not run, help='generation and chips: v5e-16, v5p-512 …')
            of.add_argument('--slices', type=int, default=1, help='several slices of that type')
            of.add_argument('--retries', type=int, default=5, help='how often to start again after a preemption')
        if verb in (create, run, manifest):
            of.add_argument('--capacity', choices=('on-demand', 'spot', 'reserved'), default='on-demand')
            of.add_argument('--service-account', help='whose rights the workers have')
        if verb in (create, run):
            of.add_argument('--wait', default='24h', help='how long the request may wait in the queue')
            of.add_argument('--create-flags', default='', help="more for gcloud's create, such as '--network=…'")
        if verb in (push, run, xpk):
            of.add_argument('--env-file', help='NAME=value lines, of mode 600: the environment of the run')
        if verb in (push, run):
            of.add_argument('--extras', default='tpu,gcs', help='of the package')
        if verb in (manifest, xpk):
            of.add_argument('--image', required=True, help='a container image with this checkout in it')
        if verb is manifest:
            of.add_argument('--secret', help='a Kubernetes secret that becomes environment variables')
            of.add_argument('--apply', action='store_true', help='hand it to kubectl')
        if verb is xpk:
            of.add_argument('--cluster', required=True)
    return parser


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
