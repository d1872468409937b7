import os

# Several workers with several threads each would be in each other's way; what the tests start as processes inherits it.
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
matplotlib.use('agg')
