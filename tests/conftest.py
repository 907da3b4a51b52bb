"""Settings of all tests. Imports no package of ours: the type-checking hook would come too late."""

import os

# tiny tensors: threads that wait for each other cost many times what they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
