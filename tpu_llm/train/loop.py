"""The training loop: mesh → data → state → step → hooks, then one `for`."""

import dataclasses
import logging
from contextlib import closing

from etils import epath

from tpu_llm.checkpoint import fence, manifest, resume
from tpu_llm.checkpoint.store import Store
from tpu_llm.config import validate
from tpu_llm.parallel.preemption import Preemption
from tpu_llm.parallel.stall import Stall
from tpu_llm.train.ledger import Ledger
from tpu_llm.train.report import write_report
from tpu_llm.train.run import Run
from tpu_llm.train.session import Session, call_hooks
from tpu_llm.train.setup import open_session, restore_or_create
from tpu_llm.train.state import TrainState
from tpu_llm.train.summary import withdraw_summary, write_summary
from tpu_llm.train.watch import Watch

logger = logging.getLogger('tpu_llm')


def fit(run: Run, workdir: epath.PathLike) -> TrainState:
    """Trains `run` to its end in `workdir`, continuing whatever was begun there. Returns the final state.

    Raises ConfigError for what cannot run, Superseded where a newer start took the workdir over,
    CheckpointError where a save failed. A preemption (SIGTERM) saves and returns early; so does Ctrl-C on a single host
    once a step is done, and raises KeyboardInterrupt then.
    """
    validate(run)
    workdir = epath.Path(workdir)
    changes = resume.check_config(workdir, run)  # before the fence: a refused start must not stop a running one
    token = fence.start(workdir)
    ledger = Ledger(workdir, token=token.token)
    with fence.withdrawn_on_error(token), ledger.phase('init'):
        session = open_session(run, workdir, ledger, token)
    with session.reporter as reporter, closing(session.writers):
        with fence.withdrawn_on_error(token), ledger.phase('restore'), reporter.status('restoring'):
            state, frozen, resumed = restore_or_create(session)
            session = dataclasses.replace(session, frozen=frozen)
        resume.record_config(token, run, changes)
        reporter.print(f'{workdir}: {resumed}')
        if (stages := session.layout.mesh.shape['stage']) > 1:
            reporter.print(session.graph.bind(session.graph.shapes()).stack.bubble(stages))
        ledger.resumed(resumed.step)
        if session.is_main:
            session.writers.cut(resumed.step)
        if resumed.step >= session.steps:
            reporter.print(f"all {session.steps:,} steps are done; raise the run's length to train on")
            _finish(session, Watch(session), session.steps)
            return state
        return _train(session, state, resumed)


def _train(session: Session, state: TrainState, resumed: resume.Resumed) -> TrainState:
    run, ledger = session.run, session.ledger
    if session.is_main:
        withdraw_summary(session)
    feed = session.feed
    if resumed.lanes is not None:
        feed.restore(resumed.lanes)
    train_step = session.train_step
    hooks = [(hook, hook.open(session)) for hook in run.hooks]
    about = manifest.describe(run, mesh=session.layout.mesh.shape, tokenizer=session.tokenizer.fingerprint)
    store = Store(run.checkpoints, session.fence, session.tokenizer.files())
    watch, preemption = Watch(session), Preemption(session.print)
    stall = Stall(ledger, session.workdir, session.print)
    with closing(stall), store, closing(feed), closing(preemption):
        for step in range(resumed.step + 1, session.steps + 1):
            stall.begin(step)
            with ledger.phase('data_wait'):
                batch, lanes, told = feed.next(session, state)
            if not train_step.compiles:
                with ledger.phase('compile'), session.reporter.status('compiling'):
                    train_step.program(state, session.frozen, batch)
            with ledger.phase('step'):
                state, metrics = train_step(state, session.frozen, batch)
                watch.push(step, metrics, batch, state, told)
            stop = step == session.steps or preemption.at(step)
            calls = [(hook, call) for hook, call in hooks if hook.due(step, session.steps)]
            save = stop or step % run.checkpoints.every == 0
            if calls or save:
                with ledger.phase('step'):
                    watch.read(state)
            values, failed = call_hooks(calls, step, session.weights(state))
            if values:
                watch.log(step, values)
            if save:
                watch.flush()  # first, so that no metric of a saved step is ever missing
                with ledger.phase('save'):
                    store.save(step, session.saved.tree(state), lanes=lanes, manifest=about, metrics=values, wait=stop)
            if failed:
                raise failed
            if stop:
                break
        _finish(session, watch, int(state.step), preemption.cause)
    if preemption.cause == 'interrupted':
        raise KeyboardInterrupt  # whatever was to come next does not
    return state


def _finish(session: Session, watch: Watch, step: int, cause: str = '') -> None:
    """Writes the summary and the report; says how to go on where the run was stopped early."""
    watch.flush()
    if not session.is_main:
        return
    if step < session.steps:
        said = 'interrupted: saved' if cause == 'interrupted' else 'preempted: saved'  # launch/pod.py listens for it
        session.reporter.print(f'{said} at step {step:,}/{session.steps:,}; the same command continues')
        return
    write_summary(session)
    if session.run.report:
        report = write_report(session.workdir)
        session.reporter.print(f'report: {report}')
