"""Boxes: what is evaluated but not differentiated, as `nn.Module`s usable in any model."""

from .callable_box import CallableBox
from .onnx_box import OnnxBox
from .onnx_runtime import onnxruntime_report
from .program import ExternalProgram
from .protocol import Box

__all__ = ["Box", "CallableBox", "ExternalProgram", "OnnxBox", "onnxruntime_report"]
