"""Checkpoints that can be trusted: whole when committed, verified on every restore, local or on gs://.

`store` writes and retires them, `reader` finds and loads them, `resume` decides where a run starts, `fence`
keeps two runs out of one workdir, `python -m tpu_llm.checkpoint list|verify|diff` shows them.
docs/checkpoints.md tells the whole story.
"""
