"""One Python client for every vLLM server that a team runs, and the hand that runs them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_unified.public import *  # noqa: F403
    from vllm_unified.public import __all__ as __all__
    from vllm_unified.public import __version__ as __version__
else:
    # All names come with the first that is asked for. A command's help, and the processes that look
    # after servers, need none of them, and would wait for all.
    from importlib import import_module

    def __getattr__(name):
        public = import_module("vllm_unified.public")
        globals().update({each: getattr(public, each) for each in (*public.__all__, "__all__")})
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__():
        return sorted({*globals(), *import_module("vllm_unified.public").__all__})
