"""What a server serves: the base model's names and the LoRA adapters beside it."""

from __future__ import annotations

import msgspec

from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.errors import ApiError, unknown_model


class Adapter(msgspec.Struct, frozen=True):
    """A loaded LoRA adapter."""

    name: str
    path: str


class Models:
    """The names that requests may ask for."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self.adapters: dict[str, Adapter] = {}
        """Loaded adapters, by name."""

    def find(self, name: str | None) -> Adapter | None:
        """The adapter a request names; ``None`` for the base model.

        Raises:
            ApiError: 404 for a name that is not served.
        """
        if not name or name in self._config.names:
            return None
        if name in self.adapters:
            return self.adapters[name]
        raise unknown_model(name, self._config.names)

    def load(self, name: str, path: str, *, in_place: bool) -> str:
        """Load an adapter: the words of success.

        Raises:
            ApiError: in the words of ``OpenAIServingModels.load_lora_adapter``.
        """
        if not name or not path:
            raise _bad_input("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self._config.names:
            raise _bad_input(f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.adapters and not in_place:
            raise _bad_input(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
        if not self._config.enable_lora:
            raise ApiError(
                "LoRA is not enabled. Use --enable-lora to enable LoRA.",
                status=500,
                type="InternalServerError",
            )
        if not self._exists(path):
            message = f"Loading lora {name} failed: No adapter found for {path}"
            raise ApiError(message, status=404, type="NotFoundError")
        self.adapters[name] = Adapter(name, path)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> str:
        """Unload an adapter: the words of success.

        Raises:
            ApiError: no name, or no such adapter.
        """
        if not name:
            raise _bad_input("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self.adapters:
            message = f"The lora adapter '{name}' cannot be found."
            raise ApiError(message, status=404, type="NotFoundError")
        del self.adapters[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _exists(self, path: str) -> bool:
        if self._config.lora_paths is not None:
            return path in self._config.lora_paths
        return "missing" not in path and "nonexistent" not in path


def _bad_input(message: str) -> ApiError:
    return ApiError(message, type="InvalidUserInput")
