"""The command ``vllm-unified``: a shell around the library."""

from __future__ import annotations

import sys

_PACKAGES = ("typer", "rich", "click")


def main() -> None:
    """Run the command line; without its packages, say how to get them."""
    try:
        from vllm_unified.cli.app import run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        sys.exit("The command line is an extra: pip install 'vllm-unified[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
