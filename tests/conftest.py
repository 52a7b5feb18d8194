"""One thread a test process: several on few cores, beside other processes, wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Before torch starts its threads; for children too.
