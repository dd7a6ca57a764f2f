"""Makes tests/support importable (`import zoo`) and keeps every test on one set of threads."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))
torch.set_num_threads(1)
