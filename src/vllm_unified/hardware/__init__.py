"""What this machine has, what fits on it, and any backend behind one call."""

from vllm_unified.hardware.backend import Backend, Capabilities
from vllm_unified.hardware.blocking import BlockingHardwareAbstractionLayer
from vllm_unified.hardware.detect import Hardware, detect
from vllm_unified.hardware.gpus import Gpu
from vllm_unified.hardware.inference import InferenceResult
from vllm_unified.hardware.layer import HardwareAbstractionLayer
from vllm_unified.hardware.local_vllm import LocalVllm
from vllm_unified.hardware.member import BackendStatus
from vllm_unified.hardware.planning import plan
from vllm_unified.hardware.plans import Plan
from vllm_unified.hardware.processors import NumaNode
from vllm_unified.hardware.request import InferenceRequest
from vllm_unified.hardware.selection import Candidate, Selection
from vllm_unified.hardware.statistics import BackendStatistics, LayerStatistics
from vllm_unified.hardware.stream import InferenceStream

__all__ = [
    "Backend",
    "BackendStatistics",
    "BackendStatus",
    "BlockingHardwareAbstractionLayer",
    "Candidate",
    "Capabilities",
    "Gpu",
    "Hardware",
    "HardwareAbstractionLayer",
    "InferenceRequest",
    "InferenceResult",
    "InferenceStream",
    "LayerStatistics",
    "LocalVllm",
    "NumaNode",
    "Plan",
    "Selection",
    "detect",
    "plan",
]
