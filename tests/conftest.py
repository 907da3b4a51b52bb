"""Settings of all tests. Imports no package of ours: the type-checking hook would come too late."""

import os
import signal

# tiny tensors: threads that wait for each other cost many times what they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# a shell starts background jobs with SIGINT ignored, and Python then leaves it so
signal.signal(signal.SIGINT, signal.default_int_handler)
