"""A model in this process, run by the library ``transformers``."""

from vllm_unified.hardware.transformers.backend import TransformersBackend

__all__ = ["TransformersBackend"]
