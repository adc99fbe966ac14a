"""Which servers are reached by which proxy."""

from __future__ import annotations

import base64
import urllib.request
from urllib.parse import unquote, urlsplit

from vllm_unified.settings import proxy_address


class Proxies:
    """Which proxy a server is reached by; the environment is read once for each server."""

    def __init__(self, proxy: str | None) -> None:
        """``proxy`` is for all servers, ``""`` for none; ``None``: as the environment says."""
        self._fixed = proxy
        self._environment = urllib.request.getproxies() if proxy is None else {}

    def of(self, scheme: str, server: str) -> str:
        """The URL of the proxy for a server (``host:port``); ``""`` for none.

        Raises:
            ConfigurationError: the environment names one that cannot be used.
        """
        if self._fixed is not None:
            return self._fixed
        proxy = self._environment.get(scheme, self._environment.get("all"))
        if not proxy or urllib.request.proxy_bypass(server):
            return ""
        return proxy_address(proxy, key=f"{scheme}_proxy in the environment")


def proxy_authorization(proxy: str) -> str:
    """The value of ``Proxy-Authorization``; ``""`` where the proxy's URL has no credentials."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return ""
    credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"
