"""The kernels of GPUs on a CPU: a coder in Triton's interpreter, against the compiled kernels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mptrain.config.coder import CoderConfig
from mptrain.kernels import triton_support
from mptrain.pursuit import numba_backend
from tests.helpers.trainers import BASE, TRANSCODER, D, make_learner, rows_of

pytest.importorskip("triton", reason="needs Triton, whose interpreter runs the kernels on a CPU")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="here the kernels run on the GPU: test_triton_kernels.py"
)

CONFIGS = [
    replace(BASE, backend="direct"),
    replace(BASE, backend="gram"),
    replace(BASE, backend="gram", select="magnitude"),
    replace(BASE, backend="gram", score_dtype="bfloat16"),
    replace(BASE, backend="shortlist", shortlist_refresh=2),
    replace(BASE, backend="shortlist", shortlist_refresh=2, tolerance=0.3),
    replace(BASE, subtract="predicting", select="signed"),
    replace(BASE, arch="batch-mp"),
    replace(BASE, detach=True),
    replace(TRANSCODER, blocks="both"),
    replace(TRANSCODER, blocks="predicting", subtract="separate"),
    replace(TRANSCODER, per_step_loss=True, kind="skip-transcoder"),
    replace(BASE, arch="topk", dead_rows=1),
    replace(BASE, codes="omp"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_train_step_is_that_of_a_cpu(config: CoderConfig, monkeypatch: pytest.MonkeyPatch):
    expected = gradients(config)
    monkeypatch.setattr(triton_support, "available", lambda _: True)
    monkeypatch.setattr(numba_backend, "applies", lambda _: False)
    actual = gradients(config)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=2e-4, msg=name)


def gradients(config: CoderConfig) -> dict[str, Tensor]:
    """The code, and every parameter's gradient, of one batch."""
    trainer = make_learner(config)
    x_BD, y_BE = rows_of(config, 9, 1)
    code = trainer.coder.encode(x_BD, over_batch=True)
    # correlations of dead atoms with a residual can be rounding noise, and so can their choice
    dead_M = (torch.arange(3 * D) % 2 == 0) & (config.arch == "topk")
    y_hat_BE = trainer.coder.predict(code, x_BD)
    trainer.objective.loss(code, x_BD, y_BE, y_hat_BE, dead_M).backward()
    parameters = dict(trainer.coder.named_parameters())
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    order_BK = code.idx_BK.sort(dim=1)
    return {"idx": order_BK.values, "val": code.val_BK.gather(1, order_BK.indices), **grads}
