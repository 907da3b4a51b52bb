"""The command lines of mpcache and mptrain; thin, imported only by their entry points."""

import os

# Before torch starts its threads: those that wait must not take the cores from the threads that
# read, write and pursue, which are others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
