"""What a run writes about itself, in a bucket: metrics, events, ledger, ends, report, and the doctor's trial."""

import subprocess
import sys
from pathlib import Path

from etils import epath

from tpu_llm.parallel import deaths
from tpu_llm.train import ledger
from tpu_llm.train.metrics import JsonLines, TensorBoard, read
from tpu_llm.train.report import write_report

ROOT = Path(__file__).parents[2]


def test_metrics_appear_at_flush_and_are_cut_to_the_restored_step(bucket):
    path = f'{bucket}/metrics.jsonl'
    writer = JsonLines(path)
    for step in (1, 2, 3):
        writer.write(step, {'loss': 1.0 / step})
    assert not epath.Path(path).exists()
    writer.flush()
    assert [record['step'] for record in read(path)] == [1, 2, 3]
    writer.write(4, {'loss': 0.1})  # lost, as by a kill

    writer = JsonLines(path)
    writer.cut(2)
    writer.write(3, {'loss': 9.0})
    writer.close()
    assert [(record['step'], record['loss']) for record in read(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_events_are_copied_at_flush(bucket):
    events = TensorBoard(f'{bucket}/tensorboard')
    events.write(1, {'loss': 1.0})
    events.close()
    (file,) = epath.Path(f'{bucket}/tensorboard').iterdir()
    assert file.name.startswith('events.out.tfevents.')
    assert file.stat().length > 0


def test_every_start_adds_its_record_and_a_report_can_be_written(bucket):
    for begin, end in ((0, 10), (8, 20)):
        account = ledger.Ledger(bucket)
        account.resumed(begin)
        account.finished(end)
        account.flush()
        account.flush()
    assert ledger.summarize(ledger.load(bucket)).lost_steps == 2
    writer = JsonLines(f'{bucket}/metrics.jsonl')
    writer.write(20, {'loss': 1.0})
    writer.close()
    assert 'steps done twice: 2' in write_report(bucket).read_text()


def test_the_doctor_tries_the_bucket(bucket):
    command = [sys.executable, ROOT / 'launch/doctor.py', f'--workdir={bucket}']
    done = subprocess.run(command, capture_output=True, text=True)
    assert f'✓ workdir {bucket}: a file was written, read and deleted' in done.stdout
    assert not epath.Path(bucket).exists()


def test_hosts_read_how_the_others_ended(bucket):
    folder = deaths.folder(bucket, '20260101T000000-abcdef')
    ends = {host: deaths.end(host, code, 0, b'') for host, code in ((0, deaths.LOST), (1, -9))}
    for end in ends.values():
        deaths.write(folder, end)
    assert deaths.read(folder) == ends
    assert sorted(file.name for file in folder.iterdir()) == ['0.json', '1.json']
