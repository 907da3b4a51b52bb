"""The command lines of mpcache and mptrain; thin, imported only by their entry points."""

import os

# Before torch starts its threads: waiting threads that spin take the cores from those that read and
# write; on two busy cores a pursuit step was several times slower for it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
