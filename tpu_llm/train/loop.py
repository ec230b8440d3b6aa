"""The training loop: mesh → data → state → step → hooks, then one `for`."""

import contextlib
import json
import logging
from typing import Any

import jax
from etils import epath

from tpu_llm.checkpoint import fence, manifest, resume
from tpu_llm.checkpoint.store import Store
from tpu_llm.config import validate
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.preemption import Preemption
from tpu_llm.train.ledger import Ledger
from tpu_llm.train.metrics import read
from tpu_llm.train.report import write_report
from tpu_llm.train.run import Run
from tpu_llm.train.session import Session
from tpu_llm.train.setup import open_session, restore_or_create
from tpu_llm.train.state import TrainState
from tpu_llm.train.step import StepOptions, make_step
from tpu_llm.train.watch import Watch

logger = logging.getLogger('tpu_llm')


def fit(run: Run, workdir: epath.PathLike) -> TrainState:
    """Trains `run` to its end in `workdir`, continuing whatever was begun there. Returns the final state.

    Raises ConfigError for what cannot run, Superseded where a newer start took the workdir over,
    CheckpointError where a save failed. A preemption (SIGTERM) saves and returns early.
    """
    validate(run)
    workdir = epath.Path(workdir)
    changes = resume.check_config(workdir, run)  # before the fence: a refused start must not stop a running one
    token = fence.start(workdir)
    ledger = Ledger(workdir, token=token.token)
    with ledger.phase('init'):
        session = open_session(run, workdir, ledger, token)
        resume.record_config(token, run, changes)
    with session.reporter as reporter, contextlib.closing(session.writers):
        with ledger.phase('restore'), reporter.status('restoring'):
            state, resumed = restore_or_create(session)
        reporter.print(f'{workdir}: {resumed}')
        ledger.resumed(resumed.step)
        if session.is_main:
            session.writers.cut(resumed.step)
        if resumed.step >= session.steps:
            reporter.print(f"all {session.steps} steps are done; raise the run's length to train on")
            _finish(session, Watch(session), finished=True)
            return state
        return _train(session, state, resumed)


def _train(session: Session, state: TrainState, resumed: resume.Resumed) -> TrainState:
    run, ledger = session.run, session.ledger
    feed = session.feed
    if resumed.lanes is not None:
        feed.loader.restore(resumed.lanes)
    options = StepOptions(seed=run.seed, accumulate=run.accumulate, ema=run.ema, spike=run.spike)
    train_step = Compiled(
        'train step',
        make_step(session.graph, run.objective, session.tx, session.layout, options),
        donate=(0,),
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
        options=run.compiler_options,
    )
    hooks = [(hook, hook.open(session)) for hook in run.hooks]
    about = manifest.describe(run, mesh=session.layout.mesh.shape, tokenizer=session.tokenizer.fingerprint)
    store = Store(run.checkpoints, session.fence, session.tokenizer.files())
    watch, preemption = Watch(session), Preemption()
    with contextlib.closing(store), contextlib.closing(feed.loader), contextlib.closing(preemption):
        for step in range(resumed.step + 1, session.steps + 1):
            with ledger.phase('data_wait'):
                batch, lanes = feed.next()
            if not train_step.compiles:
                with ledger.phase('compile'), session.reporter.status('compiling'):
                    train_step.program(state, None, batch)
            with ledger.phase('step'):
                state, metrics = train_step(state, None, batch)
                watch.push(step, metrics, batch, state)
            stop = step == session.steps or preemption.at(step)
            calls = [(hook, call) for hook, call in hooks if hook.due(step, session.steps)]
            save = stop or step % run.checkpoints.every == 0
            if calls or save:
                with ledger.phase('step'):
                    watch.read(state)
            values = _call(calls, step, state, watch)
            if save:
                watch.flush()  # first, so that no metric of a saved step is ever missing
                with ledger.phase('save'):
                    store.save(step, session.saved.tree(state), lanes=lanes, manifest=about, metrics=values, wait=stop)
            if stop:
                break
        _finish(session, watch, finished=int(state.step) == session.steps)
    return state


def _call(calls: list[Any], step: int, state: TrainState, watch: Watch) -> dict[str, float]:
    """Runs the hooks that are due; their metrics are logged and may choose the best checkpoint."""
    values: dict[str, float] = {}
    weights = state.params if state.ema is None else state.ema
    for _, call in calls:
        values |= call(step, weights)
    if values:
        watch.log(step, values)
    return values


def _finish(session: Session, watch: Watch, *, finished: bool) -> None:
    """Writes the summary and the report; says how to go on where the run was stopped early."""
    watch.flush()
    if not session.is_main:
        return
    if not finished:
        session.reporter.print(f'preempted: saved before step {session.steps}; the same command continues')
        return
    # From the file, since an earlier start of the run may have written some of it.
    latest = {name: value for line in read(session.workdir / 'metrics.jsonl') for name, value in line.items()}
    summary = {'parameters': session.graph.count(), 'seconds': session.ledger.seconds(), **latest}
    (session.workdir / 'summary.json').write_text(json.dumps(summary, indent=1))
    if session.run.report:
        report = write_report(session.workdir)
        session.reporter.print(f'report: {report}')
