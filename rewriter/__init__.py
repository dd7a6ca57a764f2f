"""Says where each gradient of a PyTorch model comes from."""

from rewriter.passes.black_box import BlackBox
from rewriter.passes.checkpoint import Checkpoint
from rewriter.passes.deferred import Deferred
from rewriter.passes.highway import Highway
from rewriter.passes.horizon import Horizon
from rewriter.passes.ulr_cut import UlrCut
from rewriter.runtime.boxes import Box, CallableBox, ExternalProgram, OnnxBox
from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import BoxError, RewriteError, RewriteWarning

from .choose_horizon import alignment, pilot
from .memory_plan import memory_plan
from .plan import Plan
from .rewrite import rewrite
from .rewritten import Rewritten

__all__ = [
    "BlackBox",
    "Box",
    "BoxError",
    "CallableBox",
    "Checkpoint",
    "Deferred",
    "Domain",
    "ExternalProgram",
    "Highway",
    "Horizon",
    "OnnxBox",
    "Plan",
    "RewriteError",
    "RewriteWarning",
    "Rewritten",
    "UlrCut",
    "alignment",
    "memory_plan",
    "pilot",
    "rewrite",
]
