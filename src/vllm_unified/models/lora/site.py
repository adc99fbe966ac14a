"""The adapters of one server: each operation is done in full, or leaves what was."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from vllm_unified.endpoints.call import Call
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import (
    AdapterError,
    BadRequestError,
    ConfigurationError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    RequestTimeoutError,
    VllmError,
)
from vllm_unified.models.inspection import inspect_model
from vllm_unified.models.lora.adapters import Adapter, loaded_adapters, temporary_name
from vllm_unified.models.lora.fit import SWITCHED_ON, ServerFacts, rank_hint
from vllm_unified.results import ModelCard, ResultMetadata
from vllm_unified.wire.requests import WireRequest, encode, generation_request, get_request
from vllm_unified.wire.responses import decode_generation, decode_models

T = TypeVar("T")

_LOAD = "/v1/load_lora_adapter"
_UNLOAD = "/v1/unload_lora_adapter"
# vLLM resolves a request's adapter when it arrives; from then on its name may go.
_ARRIVAL_SECONDS = 2.0
_UNDO_SECONDS = 5.0
_BUSY_SECONDS = 0.2
_INSPECT_SECONDS = 5.0
_LOOK_SECONDS = 0.01
OTHERS_SECONDS = 15.0
"""How long another client may take to replace an adapter."""


class _TakenError(Exception):
    """Another client has begun to replace the adapter by the same version."""


class Site:
    """One server, however many endpoints of the client are there.

    Operations are to be made one at a time, under :attr:`lock`. None of them takes a slot or waits
    in line, and none is counted in statistics.
    """

    def __init__(self, url: str, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        """``endpoints`` gives those of the client that are this server."""
        self.url = url
        self.lock = asyncio.Lock()
        self.slots: int | None = None
        """How many adapters it computes with at once, where that is known."""
        self.was_asked = False
        self.down_since: float | None = None
        """Since when it has not answered; monotonic seconds."""
        self.adapters: dict[str, str] = {}
        """The adapters that it had when it was looked at last: their paths by their names."""
        self._endpoints = endpoints

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """The endpoints of the client that are this server."""
        return self._endpoints()

    @property
    def id(self) -> str:
        """Id of the first of its endpoints."""
        return next((each.id for each in self.endpoints), self.url)

    async def cards(self, seconds: float = math.inf) -> list[ModelCard]:
        """What it serves; tells its endpoints, so that requests go where their adapter is.

        Raises:
            VllmError: it does not answer.
        """
        cards = await self._ask(get_request("/v1/models"), decode_models, seconds)
        names = {card.id for card in cards}
        self.adapters = {name: card.root or "" for name, card in loaded_adapters(cards).items()}
        for endpoint in self.endpoints:
            for name in [name for name, served in endpoint.aliases.items() if served not in names]:
                del endpoint.aliases[name]  # the server was restarted
            endpoint.serve(cards)
        return cards

    async def facts(self) -> ServerFacts:
        """What can be known of it, of which only the models are always told.

        Raises:
            VllmError: it does not answer.
        """
        cards = await self.cards()
        base = next((card.id for card in cards if card.parent is None), None)
        known = None
        with contextlib.suppress(VllmError):
            known = await inspect_model(self.endpoints[:1], base, timeout=_INSPECT_SECONDS)
        self.was_asked = True
        self.slots = None if known is None else known.lora_slots
        return ServerFacts(
            cards=cards,
            lora_enabled=None if known is None else known.lora_enabled,
            max_lora_rank=None if known is None else known.max_lora_rank,
        )

    async def bring(self, adapter: Adapter) -> bool:
        """Have the adapter loaded and proven, in place of another version; whether it was there.

        Raises:
            AdapterError: the server refuses it, or does not generate with it.
            VllmError: the server does not answer.
        """
        there = loaded_adapters(await self.cards()).get(adapter.name)
        was_there = there is not None and there.root == adapter.path
        while there is not None and there.root != adapter.path:
            if not await self._is_taken(adapter):
                with contextlib.suppress(_TakenError):
                    await self._replace(adapter, old_path=there.root or "")
            there = loaded_adapters(await self.cards()).get(adapter.name)
        if there is None:
            await self._load_proven(adapter.name, adapter.path)
            await self._end_alias(adapter.name)
            await self.cards()
        return was_there

    async def unload(self, name: str) -> bool:
        """Unload an adapter; whether it was there. What runs with it goes on.

        Raises:
            VllmError: the server refuses, or does not answer.
        """
        was_there = await self._unload(name)
        await self._end_alias(name)
        await self.cards()
        return was_there

    async def _replace(self, adapter: Adapter, *, old_path: str) -> None:
        """The new version goes to work under a name of its own, which this client's requests are
        sent with until it has the old one's."""
        name, temporary = adapter.name, temporary_name(adapter)
        still = f"The version at {old_path} still runs as {name!r}."
        try:
            await self._load_proven(temporary, adapter.path, alone=True)
        except VllmError as error:
            error.hint = f"{still} {error.hint}" if error.hint else still
            raise
        for endpoint in self.endpoints:
            endpoint.aliases[name] = temporary
        try:
            await self._take_over(adapter, old_path)
        except BaseException:
            if await self._is_there(name):
                await self._end_alias(name)
            raise
        await self._end_alias(name)

    async def _is_taken(self, adapter: Adapter) -> bool:
        """Whether another client is about to replace it by this version, and has done so, or gave
        up. Who has loaded the temporary name does it; what an earlier try left is unloaded."""
        temporary = temporary_name(adapter)
        if temporary not in self.adapters:
            return False
        deadline = time.monotonic() + OTHERS_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            if temporary not in loaded_adapters(await self.cards()):
                return True
        await self._unload(temporary)
        return False

    async def _take_over(self, adapter: Adapter, old_path: str) -> None:
        """The new version gets the old one's name, or the old one has it back."""
        try:
            await self._unload(adapter.name)
            await self._load_proven(adapter.name, adapter.path)
        except (VllmError, asyncio.CancelledError) as error:
            now = f"The version at {old_path} runs again as {adapter.name!r}."
            try:
                async with asyncio.timeout(_UNDO_SECONDS):
                    await self._load(adapter.name, old_path)
            except (VllmError, TimeoutError):
                if not await self._is_there(adapter.name):
                    now = (
                        f"{adapter.name!r} is not loaded there any more; this client's requests "
                        f"go to the new version, as {temporary_name(adapter)!r}."
                    )
            if isinstance(error, VllmError):
                error.hint = f"{now} {error.hint}" if error.hint else now
            raise

    async def _is_there(self, name: str) -> bool:
        with contextlib.suppress(VllmError):
            return name in loaded_adapters(await self.cards(_UNDO_SECONDS))
        return False

    async def _end_alias(self, name: str) -> None:
        """Requests go by the real name; the temporary one goes when its requests are there."""
        aliases = {endpoint.aliases.pop(name, None) for endpoint in self.endpoints} - {None}
        for temporary in aliases:
            deadline = time.monotonic() + _ARRIVAL_SECONDS
            while any(each.renamed[temporary or ""] for each in self.endpoints):
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(_LOOK_SECONDS)
            await self._undo(temporary or "")

    async def _load_proven(self, name: str, path: str, *, alone: bool = False) -> None:
        """Load it, see it in the list, and generate a token with it; or unload it again.

        Raises:
            _TakenError: with ``alone``: somebody else has loaded the very same.
        """
        try:
            await self._load(name, path, alone=alone)
            await self._prove(name, path)
        except (VllmError, asyncio.CancelledError) as error:
            # What was refused was not loaded; where nothing was said, it may be.
            if not (isinstance(error, AdapterError) and error.status_code):
                await self._undo(name)
            raise

    async def _load(self, name: str, path: str, *, alone: bool = False) -> None:
        request = _post(_LOAD, {"lora_name": name, "lora_path": path})
        try:
            await self._ask(request, _text)
        except BadRequestError as error:
            taken = "already been loaded" in error.message
            if taken and alone:
                raise _TakenError from error
            if not (taken and await self._has(name, path)):
                raise refusal(error, name, path) from error
        except VllmError as error:
            raise refusal(error, name, path) from error

    async def _has(self, name: str, path: str) -> bool:
        """Whether somebody else loaded the very same in this moment."""
        card = loaded_adapters(await self.cards()).get(name)
        return card is not None and card.root == path

    async def _prove(self, name: str, path: str) -> None:
        card = loaded_adapters(await self.cards()).get(name)
        if card is None or card.root != path:
            raise AdapterError(
                f"the server said that it loaded {name!r} from {path}, and does not list it",
                endpoint=self.url,
                hint="Is there one vLLM at this address, or several behind a balancer?",
            )
        try:
            await self._generate(name)
        except ModelNotFoundError as error:
            raise self._unproven(name, error) from error
        except NotFoundError:
            pass  # a model that makes embeddings does not generate
        except VllmError as error:
            raise self._unproven(name, error) from error

    def _unproven(self, name: str, error: VllmError) -> AdapterError:
        return AdapterError(
            f"the server loaded {name!r}, but does not generate with it: {error.message}",
            endpoint=self.url,
            hint="It was unloaded again.",
        )

    async def _generate(self, name: str) -> None:
        """One token; a server that is busy has it later."""
        fields = {"prompt": "1", "max_tokens": 1, "model": name}
        # The name that is meant is this one, whatever the endpoint's requests are sent with.
        request = msgspec.structs.replace(generation_request(fields), model=None)
        while True:
            try:
                await self._ask(request, _token)
            except OverloadedError as error:
                await asyncio.sleep(error.retry_after or _BUSY_SECONDS)
            else:
                return

    async def _unload(self, name: str) -> bool:
        try:
            await self._ask(_post(_UNLOAD, {"lora_name": name}), _text)
        except NotFoundError as error:
            if is_switched_off(error):
                raise refusal(error, name, None) from error
            return False
        return True

    async def _undo(self, name: str) -> None:
        """Unload it if it is there, as far as that can be done."""
        with contextlib.suppress(VllmError, TimeoutError):
            async with asyncio.timeout(_UNDO_SECONDS):
                await self._unload(name)

    async def _ask(
        self, request: WireRequest, decode: Callable[[bytes], T], seconds: float = math.inf
    ) -> T:
        """Send it once; the error is complete, as that of a call."""
        if not self.endpoints:
            raise ConfigurationError(f"the endpoint at {self.url} was removed")
        endpoint = self.endpoints[0]
        settings = endpoint.settings
        call = Call(request, settings)
        call.begin_attempt(endpoint, time.monotonic())
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                return await endpoint.exchange(call, lambda body, _: decode(body))
        except VllmError as error:
            call.end_attempt(error)
            raise call.complete_error(error) from error.__cause__
        except TimeoutError:
            late = RequestTimeoutError(f"no answer to {request.path} within {seconds:g} s")
            call.end_attempt(late)
            raise call.complete_error(late) from None


def refusal(error: VllmError, name: str, path: str | None) -> VllmError:
    """What a server's answer to loading or unloading an adapter means; errors that are not about
    the adapter stay as they are."""
    words = error.message
    if is_switched_off(error):
        words = "this server does not load or unload adapters while it runs"
        hint = SWITCHED_ON
    elif "LoRA is not enabled" in words:
        words, hint = "this server has no LoRA", SWITCHED_ON
    elif (found := re.search(r"rank (\d+) is greater than max_lora_rank", words)) is not None:
        hint = rank_hint(int(found[1]))
    elif isinstance(error, NotFoundError):
        words = f"the server finds no adapter at {path}"
        hint = "It must be a folder where the server runs, or a repository that it can reach."
    elif error.status_code is not None and error.status_code in (400, 422, 500):
        hint = "The server's log has more."
    else:
        return error
    return AdapterError(
        f"{name!r} cannot be loaded: {words}" if path is not None else words,
        hint=hint,
        status_code=error.status_code,
        endpoint=error.endpoint,
    )


def is_switched_off(error: VllmError) -> bool:
    """Whether the server has no such address."""
    return isinstance(error, NotFoundError) and error.message.startswith("the server has no ")


def _post(path: str, fields: dict[str, str]) -> WireRequest:
    return WireRequest(method="POST", path=path, body=encode(fields))


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _token(body: bytes) -> None:
    decode_generation(body, ResultMetadata())
