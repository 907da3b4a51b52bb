"""A metrics record for tests."""

from mptrain.runs.metrics_file import Record

RECORD = Record(
    coder="c",
    step=1,
    rows=8,
    train_seconds=0.5,
    wait_seconds=0.1,
    fvu=0.3,
    l0=4.0,
    dead_share=0.0,
    lr=1e-3,
    rows_per_second=16.0,
    peak_memory_bytes=1,
)
