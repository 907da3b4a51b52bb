"""Saves the state of a run between train steps, and resumes from it."""

import warnings

from mptrain.runs.metrics_sink import MetricsSink
from mptrain.runs.pass_context import TrainingPass
from mptrain.runs.saved_state import load_state, save_state
from mptrain.runs.state import gather_state, restore_state_


class Checkpointer:
    """Saves every `save_every` train steps and after the last one."""

    def __init__(self, training_pass: TrainingPass, sink: MetricsSink) -> None:
        self._pass, self._sink = training_pass, sink

    def is_due(self, step: int) -> bool:
        """Whether the state is saved after this train step."""
        return step % self._pass.config.save_every == 0 or step == self._pass.steps

    def save(self, step: int) -> None:
        """Save the state of all processes. A full disk is a warning: the last state is kept."""
        self._sink.write()
        progress = self._pass.progress
        state, tensors = gather_state(progress, self._pass.coder_runs, self._pass.processes)
        if not self._pass.processes.is_first:
            return
        number = progress.pass_index * self._pass.steps + step
        try:
            self._sink.flush()  # a state must not be newer than the lines of its steps
            save_state(self._pass.run.folder, number, state, tensors)
        except OSError as error:
            warnings.warn(
                f"the state after train step {step} is not saved ({error.strerror}); the "
                "previous state is kept, training continues, and the next save tries again",
                RuntimeWarning,
                stacklevel=2,
            )

    def resume(self) -> None:
        """Load the last saved state into the coders, where it is a state of this pass."""
        if self._pass.progress.step:
            saved = load_state(self._pass.run.folder)
            assert saved is not None
            restore_state_(*saved, self._pass.coder_runs)
