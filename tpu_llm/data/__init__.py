"""From text to batches: sources → tokenizer → mixture → lanes → packed rows.

The one idea is the order (docs/data.md). Row j of every global batch is lane j. A lane is an endless walk
over documents that depends on the seed, the mixture and j alone, so hosts, workers and interruptions decide
only who walks it and when:

- `sources` (`stdlib`, `files`, `columns`, `tokens`), `streams`: random access to documents, local or gs://
- `tokenizer`: text to ids and back, byte for byte (`bpe` trains one); foreign ones: `tokenizer_json`, `tokenizer_gguf`
  (`pretokenizers`), their `marks`
- `chat`: conversations by a tokenizer's template, which runs in `sandbox`
- `conversations`: records of post-training (`sums` needs no files); `speech` writes them, by `templates`, as `examples`
- `mixture`, `shuffle`, `lanes`: which document a lane reads next, and the table from which every walk goes on
- `packing`: documents into rows with segments and positions; `forms`: what rows become (`corrupted`, `corruption`)
- `cache`: ids of a source on disk, an optimization that changes nothing
- `loader`: batches for this host, read ahead by a thread or by worker processes, through Grain
- `evaluation`: held-out documents, each once, and what gzip makes of them
- `audit`, `show`: `python -m tpu_llm.data audit` prints what is in a batch, `show` what of it is trained on
"""
