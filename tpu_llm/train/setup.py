"""From a config to a session and a state: everything that happens before the first step."""

import dataclasses
import math

import jax
from etils import epath

from tpu_llm.arrays import Batch
from tpu_llm.checkpoint import fence, resume
from tpu_llm.config import ConfigError, dump
from tpu_llm.data.lanes import Table
from tpu_llm.data.length import run_steps
from tpu_llm.data.loader import Loader, open_documents, open_tokenizer
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.decoder import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.optim.optimizer import ParamInfo
from tpu_llm.parallel import hosts
from tpu_llm.parallel.rules import BATCH, PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train.ledger import Ledger
from tpu_llm.train.metrics import JsonLines, TensorBoard, WandB, Writers
from tpu_llm.train.progress import progress
from tpu_llm.train.run import Run
from tpu_llm.train.saved import Saved
from tpu_llm.train.session import Session
from tpu_llm.train.state import TrainState, abstract_state, create_state


def make_layout(run: Run) -> Layout:
    """The mesh and rules of a run. Raises ConfigError where the batch does not divide over the mesh."""
    layout = Layout(run.mesh.make(), PRESETS[run.rules])
    parts = math.prod(layout.mesh.shape[axis] for axis in BATCH)
    rows = run.data.global_batch // run.accumulate
    if rows % parts:
        raise ConfigError(
            f'data.global_batch / accumulate = {rows} rows are not divisible by {" x ".join(BATCH)} = {parts}; '
            f'make the batch a multiple of {parts * run.accumulate}'
        )
    return layout


def make_graph(model: DecoderConfig, layout: Layout) -> ModelGraph:
    """The model on that mesh: its vocabulary padded so that every tensor shard holds whole lanes of 128."""
    return ModelGraph(model.make(vocab_multiple=128 * layout.mesh.shape['tensor']))


def param_infos(graph: ModelGraph) -> dict[str, ParamInfo]:
    metas = {name: leaf.get_metadata() for name, leaf in graph.leaves.items()}
    return {name: ParamInfo(dims=meta['dims'], summed=meta['summed']) for name, meta in metas.items()}


def open_session(run: Run, workdir: epath.Path, ledger: Ledger, token: fence.Fence) -> Session:
    layout = make_layout(run)
    feed = Feed(run, layout, workdir)
    check_vocabulary(run.model, feed.tokenizer)
    steps = run_steps(run.data, feed.documents, steps=run.steps, tokens=run.tokens, epochs=run.epochs)
    graph = make_graph(run.model, layout)
    tx = run.optimizer.make(param_infos(graph), steps)
    return Session(
        run=run,
        workdir=workdir,
        fence=token,
        layout=layout,
        graph=graph,
        tx=tx,
        saved=Saved(graph, abstract_state(graph, tx, layout, ema=run.ema > 0)),
        tokenizer=feed.tokenizer,
        feed=feed,
        steps=steps,
        ledger=ledger,
        writers=open_writers(run, workdir),
        reporter=progress(steps, shown=jax.process_index() == 0),
    )


def open_writers(run: Run, workdir: epath.Path) -> Writers:
    if jax.process_index() != 0:
        return Writers()
    writers = [JsonLines(workdir / 'metrics.jsonl'), TensorBoard(workdir / 'tensorboard')]
    if run.wandb:
        writers.append(WandB(run.wandb, name=workdir.name, config=dump(run)))
    return Writers(*writers)


def check_vocabulary(model: DecoderConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f'the tokenizer has ids up to {tokenizer.vocab_size - 1} but model.vocab_size is {model.vocab_size}; '
            f'set it to at least {tokenizer.vocab_size}'
        )


def restore_or_create(session: Session) -> tuple[TrainState, resume.Resumed]:
    """The state to start from, in the order of `checkpoint.resume`: this run, parent, weights, scratch."""
    run, graph, saved = session.run, session.graph, session.saved
    tokenizer = session.tokenizer.fingerprint
    resumed = resume.resume(session.workdir, saved.shapes(), run.origin, config=run, tokenizer=tokenizer)
    if resumed.kind in ('run', 'parent'):
        return saved.state(resumed.arrays), resumed
    model = graph.bind({name: leaf.get_value() for name, leaf in graph.leaves.items()})
    state = create_state(model, graph, session.tx, session.layout, seed=run.seed, ema=run.ema > 0)
    if resumed.kind == 'weights':
        params = saved.padded(resumed.arrays)['params']
        ema = jax.tree.map(lambda x: x.copy(), params) if run.ema else None
        state = dataclasses.replace(state, params=params, ema=ema)
    return state, resumed


class Feed:
    """Batches of a run as global arrays, each host reading only the rows its devices hold."""

    def __init__(self, run: Run, layout: Layout, workdir: epath.Path):
        self.total = run.data.global_batch
        shape = (self.total, run.data.seq_len)
        self.sharding = layout.named(layout.rules.activations, 'BT', shape, 'the batch')
        self.rows = hosts.local_rows(self.sharding, self.total)
        self.tokenizer = open_tokenizer(run.data, workdir)
        self.documents = open_documents(run.data, self.tokenizer, workdir)
        self.loader = Loader(run.data, self.documents, self.tokenizer, seed=run.seed, owned=self.rows)

    def next(self) -> tuple[Batch, Table]:
        """The next global batch on the devices, and this host's part of the lane table after it."""
        batch, lanes = next(self.loader)
        return jax.tree.map(lambda x: hosts.assemble(x, self.rows, self.total, self.sharding), batch), lanes
