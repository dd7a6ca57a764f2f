"""Says where each gradient of a PyTorch model comes from."""

from rewriter.passes.black_box import BlackBox
from rewriter.passes.deferred import Deferred
from rewriter.passes.ulr_cut import UlrCut
from rewriter.runtime.boxes import Box, CallableBox, ExternalProgram, OnnxBox
from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import BoxError, RewriteError, RewriteWarning

from .plan import Plan
from .rewrite import rewrite
from .rewritten import Rewritten

__all__ = [
    "BlackBox",
    "Box",
    "BoxError",
    "CallableBox",
    "Deferred",
    "Domain",
    "ExternalProgram",
    "OnnxBox",
    "Plan",
    "RewriteError",
    "RewriteWarning",
    "Rewritten",
    "UlrCut",
    "rewrite",
]
