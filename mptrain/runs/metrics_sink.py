"""Where the records of a pass go: `metrics.jsonl`, and the loggers that the user asked for."""

from dataclasses import asdict

from mptrain.runs.loggers import MetricLoggers
from mptrain.runs.metrics_file import MetricsFile, Record, rewind
from mptrain.runs.pass_context import TrainingPass


class MetricsSink:
    """Collects records and writes those of all processes, in the order of a single process."""

    def __init__(self, training_pass: TrainingPass) -> None:
        self._progress, self._processes = training_pass.progress, training_pass.processes
        self._pending: list[Record] = []
        self._path = training_pass.run.metrics
        self._file = MetricsFile(self._path)
        config = training_pass.config
        self._loggers = MetricLoggers(
            config.log if self._processes.is_first else (),
            training_pass.run.folder,
            [coder for coder in config.coders() if coder.name in self._progress.names],
        )

    def rewind(self) -> None:
        """Drop the lines after the last saved state; the loggers get the lines that are left."""
        if self._processes.is_first:
            rewind(self._path, self._is_before_state)
            self._loggers.catch_up(self._path)

    def _is_before_state(self, record: Record) -> bool:
        if record.coder in self._progress.finished_names:
            return True
        return record.coder in self._progress.names and record.step <= self._progress.step

    def add(self, record: Record) -> None:
        """Keep a record until the next `write`."""
        self._pending.append(record)

    def write(self) -> None:
        """Write the records of all processes. A full disk is a warning: the lines are kept."""
        gathered = self._processes.gather([asdict(record) for record in self._pending])
        self._pending = []
        if self._processes.is_first:
            order = {name: index for index, name in enumerate(self._progress.names)}
            records = [Record(**values) for values in gathered]
            for record in sorted(records, key=lambda record: (record.step, order[record.coder])):
                self._file.add(record)
                self._loggers.add(record)

    def flush(self) -> None:
        """Bring all written lines to the disk.

        Raises:
            OSError: the disk does not take them.
        """
        self._file.flush()

    def close(self) -> None:
        """End the loggers."""
        self._loggers.close()
