from __future__ import annotations

import torch

# The tests are made of tiny problems: a second thread only waits, and on a busy machine it makes them ten times slower.
torch.set_num_threads(1)
