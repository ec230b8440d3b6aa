"""From a config to a session and a state: everything that happens before the first step."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from tpu_llm.arrays import Array, Batch
from tpu_llm.checkpoint import fence, resume
from tpu_llm.config import ConfigError, dump
from tpu_llm.data.lanes import Table
from tpu_llm.data.length import few_steps, run_steps
from tpu_llm.data.loader import Loader, open_documents, open_tokenizer
from tpu_llm.data.tokenizer import Tokenizer
from tpu_llm.models.decoder_config import DecoderConfig
from tpu_llm.models.graph import ModelGraph
from tpu_llm.models.scalar_head import ScalarConfig
from tpu_llm.objectives.texts import check_kind
from tpu_llm.optim.optimizer import Update
from tpu_llm.optim.params import ParamInfo
from tpu_llm.parallel import hosts
from tpu_llm.parallel.compile import Compiled
from tpu_llm.parallel.rules import BATCH, PRESETS
from tpu_llm.parallel.sharding import Layout
from tpu_llm.train import weights
from tpu_llm.train.frozen import Frozen, start_frozen
from tpu_llm.train.ledger import Ledger
from tpu_llm.train.metrics import JsonLines, TensorBoard, WandB, Writers
from tpu_llm.train.progress import progress
from tpu_llm.train.run import Run
from tpu_llm.train.saved import Saved
from tpu_llm.train.session import Session
from tpu_llm.train.state import TrainState, abstract_state, start_state
from tpu_llm.train.step import StepOptions, make_step
from tpu_llm.train.stored import reads_stored, with_reference
from tpu_llm.train.weights import Graphs


def make_layout(run: Run, devices: Sequence[Any] | None = None) -> Layout:
    """The mesh (over all devices, unless some are given) and rules of a run.

    Raises ConfigError where the batch does not divide over the mesh.
    """
    layout = Layout(run.mesh.make(devices), PRESETS[run.rules])
    shape = layout.mesh.shape
    parts = math.prod(shape[axis] for axis in BATCH)
    rows = run.data.global_batch // run.accumulate
    if rows % parts:
        raise ConfigError(
            f'data.global_batch / accumulate = {rows} rows are not divisible by {" x ".join(BATCH)} = {parts}; '
            f'make the batch a multiple of {parts * run.accumulate}'
        )
    if isinstance(run.model, DecoderConfig):
        run.model.check_split(run.data.seq_len, shape)
    elif shape['stage'] > 1 or shape['seq'] > 1:
        raise ConfigError(
            f'{type(run.model).__name__} is not split by layers or rows: mesh.stage = {shape["stage"]} and mesh.seq = '
            f'{shape["seq"]} must be 1; use fsdp or tensor'
        )
    if shape['stage'] > 1:
        count = run.pipeline.count(shape['stage'])
        share = parts // shape['stage']
        if rows % (share * count):
            over = f' over {share} devices' if share > 1 else ''
            raise ConfigError(
                f'data.global_batch / accumulate = {rows} rows do not divide into {count} equal microbatches{over}; '
                f'make the batch a multiple of {share * count * run.accumulate}, or change pipeline.microbatches'
            )
    return layout


def make_graph(run: Run, layout: Layout) -> ModelGraph:
    """The model on that mesh: its layers in the order of the stages, its vocabulary padded so that every tensor shard
    holds whole lanes of 128; with what `peft` adds.
    """
    graph = _graph(run, run.model, layout)
    if run.peft is None:
        return graph
    model, peft = graph.bind(graph.shapes()), run.peft
    peft.wrap(model)
    heads = {name for name, leaf in graph.leaves.items() if leaf.get_metadata('added')}  # that no weights came with
    return ModelGraph(model, lambda path: peft.trains(path) or path in heads)


def _held(run: Run, layout: Layout) -> ModelGraph:
    """The model that adapters stand on, held as they hold it; without a head that trains with them."""
    assert run.peft is not None
    bare = _graph(run, run.model.plain() if isinstance(run.model, ScalarConfig) else run.model, layout)
    model = bare.bind(bare.shapes())
    run.peft.hold(model)
    return ModelGraph(model)


def _graph(run: Run, config: Any, layout: Layout) -> ModelGraph:
    shape = layout.mesh.shape
    multiple = 128 * shape['tensor']
    if isinstance(config, DecoderConfig):
        return ModelGraph(config.make(vocab_multiple=multiple, stages=shape['stage'], schedule=run.pipeline))
    return ModelGraph(config.make(vocab_multiple=multiple))


def make_graphs(run: Run, layout: Layout) -> Graphs:
    """The models of a run. Raises ConfigError where nothing of the model is adapted."""
    bare = _graph(run, run.model, layout)
    model = make_graph(run, layout)
    reference = None
    if run.reference is not None:
        reference = _graph(run, run.reference.model or run.model, layout)
    elif run.needs_frozen():
        reference = _held(run, layout)
    return Graphs(model=model, bare=bare, reference=reference)


def param_infos(graph: ModelGraph) -> dict[str, ParamInfo]:
    """Of those that train."""
    metas = {name: leaf.get_metadata() for name, leaf in graph.trained.items()}
    fields = ('dims', 'summed', 'padding', 'nudge', 'rate', 'gain')
    return {name: ParamInfo(**{field: meta[field] for field in fields}) for name, meta in metas.items()}


# Where `tensor` splits weights, too, the compiler would hand them round fsdp part by part and add up a product each:
# small matmuls, whose sums pass through HBM in bfloat16. Whole, a layer takes a third of the time.
_WEIGHTS_GATHERED_WHOLE = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


def _compiler_options(run: Run, layout: Layout) -> dict[str, str]:
    """Of the step's compile: those that the mesh asks for, under the run's own."""
    shape = layout.mesh.shape
    split_twice = layout.platform == 'tpu' and shape['fsdp'] > 1 and shape['tensor'] > 1
    return {**(_WEIGHTS_GATHERED_WHOLE if split_twice else {}), **run.compiler_options}


def make_train_step(
    run: Run, graph: ModelGraph, tx: Update, layout: Layout, state: TrainState, reference: ModelGraph | None = None
) -> Compiled:
    """The step of a run, `step(state, frozen, batch)`, to be compiled. Of `state` only shapes and shardings count."""
    options = StepOptions(accumulate=run.accumulate, ema=run.ema, spike=run.spike)
    return Compiled(
        'train step',
        make_step(graph, run.objective, tx, layout, options, reference),
        donate=(0,),
        # Metrics whole on every host: without it, a number a layer may stay split over the stages.
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), layout.replicated),
        options=_compiler_options(run, layout),
    )


def batch_sharding(layout: Layout, shape: Sequence[int]) -> jax.sharding.NamedSharding:
    """Where an array of the global batch lies: [B, T], [B] or [B, T, X]."""
    return layout.named(layout.rules.activations, 'BTX'[: len(shape)], shape, 'the batch')


def abstract_batch(run: Run, layout: Layout) -> Batch:
    """The shapes and shardings of a batch."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(layout, x.shape))

    return jax.tree.map(place, jax.eval_shape(run.empty_batch))


def open_session(run: Run, workdir: epath.Path, ledger: Ledger, token: fence.Fence) -> Session:
    layout = make_layout(run)
    feed = run.open_feed(layout, workdir)
    check_vocabulary(run, feed.tokenizer)
    steps = run_steps(run.data, feed.documents, steps=run.steps, tokens=run.tokens, epochs=run.epochs)
    graphs = make_graphs(run, layout)
    graph = graphs.model
    tx = run.optimizer.make(param_infos(graph), steps)
    state = abstract_state(graph, tx, layout, ema=run.ema > 0)
    session = Session(
        run=run,
        workdir=workdir,
        fence=token,
        layout=layout,
        graphs=graphs,
        tx=tx,
        train_step=make_train_step(run, graph, tx, layout, state, graphs.reference),
        saved=Saved(graph, state),
        frozen=start_frozen(run.optimizer.schedule.peak, run.seed, layout),
        tokenizer=feed.tokenizer,
        feed=feed,
        steps=steps,
        ledger=ledger,
        writers=open_writers(run, workdir),
        reporter=progress(steps, shown=jax.process_index() == 0),
    )
    for check in filter(None, (getattr(hook, 'check', None) for hook in run.hooks)):
        check(session)
    if said := few_steps(run.data, feed.documents, steps=steps, epochs=run.epochs):
        session.print(said)
    return session


def open_writers(run: Run, workdir: epath.Path) -> Writers:
    if jax.process_index() != 0:
        return Writers()
    writers = [JsonLines(workdir / 'metrics.jsonl'), TensorBoard(workdir / 'tensorboard')]
    if run.wandb:
        writers.append(WandB(run.wandb, name=workdir.name, config=dump(run)))
    return Writers(*writers)


def check_vocabulary(run: Run, tokenizer: Tokenizer) -> None:
    form, size = run.data.form, tokenizer.vocab_size
    added = form.added(tokenizer) if form else 0
    if size + added > run.model.vocab_size:
        above = f', and {type(form).__name__} uses {added} above them,' if added else ''
        raise ConfigError(
            f'the tokenizer has ids up to {size - 1}{above} but model.vocab_size is {run.model.vocab_size}; '
            f'set it to at least {size + added}'
        )


def restore_or_create(session: Session) -> tuple[TrainState, Frozen, resume.Resumed]:
    """The state to start from, in the order of `checkpoint.resume`: this run, parent, weights, scratch; and what the
    run holds besides it.
    """
    run, graphs, layout, saved = session.run, session.graphs, session.layout, session.saved
    tokenizer = session.tokenizer.fingerprint
    resumed = resume.resume(session.workdir, saved.shapes(), run.origin, config=run, tokenizer=tokenizer)
    restored = resumed.kind in ('run', 'parent')
    whole = restored and len(graphs.model.trained) == len(graphs.model.leaves)  # the checkpoint has every weight
    start = {} if whole else weights.starting(run, graphs, layout, tokenizer)
    frozen = weights.with_held(session.frozen, run, graphs, layout, tokenizer, start)
    if restored:
        return saved.state(resumed.arrays), frozen, resumed
    params = {name: start[name] for name in graphs.model.trained}
    return start_state(params, graphs.model, session.tx, layout, ema=run.ema > 0), frozen, resumed


class Feed:
    """Batches of a run as global arrays, each host reading only the rows its devices hold."""

    def __init__(self, run: Run, layout: Layout, workdir: epath.Path):
        self.total = run.data.global_batch
        self.layout = layout
        rows = batch_sharding(layout, (self.total, run.data.seq_len))
        self.rows = hosts.local_rows(rows, self.total)
        self.tokenizer = open_tokenizer(run.data, workdir)
        self.documents = open_documents(run.data, self.tokenizer, workdir)
        for name, docs in zip(run.data.mixture.sources, self.documents, strict=True):
            check_kind(run.objective, name, docs.kind)
        if reads_stored(run):
            given = self.tokenizer, _graph(run, run.model, layout), layout, workdir
            self.documents = [with_reference(run, docs, *given) for docs in self.documents]
        self.loader = Loader(run.data, self.documents, self.tokenizer, seed=run.seed, owned=self.rows)

    def next(self, session: Session, state: TrainState) -> tuple[Batch, Table, dict[str, float]]:
        """The next global batch on the devices, this host's part of the lane table after it, and metrics of its own
        (none: what is read does not depend on the state).
        """
        del session, state
        batch, lanes = next(self.loader)
        return jax.tree.map(self._global, batch), lanes, {}

    def restore(self, lanes: Table) -> None:
        self.loader.restore(lanes)

    def close(self) -> None:
        self.loader.close()

    def _global(self, local: np.ndarray) -> Array:
        place = batch_sharding(self.layout, (self.total, *local.shape[1:]))
        return hosts.assemble(local, self.rows, self.total, place)
