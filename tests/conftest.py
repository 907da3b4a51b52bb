"""Settings of all tests. Imports no package of ours: the type-checking hook would come too late."""

import os
import signal

import hypothesis
import pytest

# with tiny tensors, threads spend far more time waiting than computing
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# a shell starts background jobs with SIGINT ignored, and Python then leaves it so
signal.signal(signal.SIGINT, signal.default_int_handler)

# no deadline, since a busy machine is no fault; CI uses the same examples every time
hypothesis.settings.register_profile("here", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
# for faults that are known (`make faults`): the first example that fails is enough
hypothesis.settings.register_profile(
    "faults",
    deadline=None,
    max_examples=50,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_configure() -> None:
    """Without a GPU, kernels run in Triton's interpreter: it asks when it is first imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def s3():
    """The URL of a bucket on a server that runs as long as the tests."""
    from tests.helpers.servers import BUCKET, environment, s3_server

    with s3_server() as address, environment(address):
        yield f"s3://{BUCKET}"


@pytest.fixture(autouse=True)
def _same_numbers_whatever_ran_before():
    import torch

    torch.manual_seed(0)
