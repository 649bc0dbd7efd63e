"""Settings of the service, by flag, environment variable (``IDGEN_SERVE_*``) or TOML file, in this order."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from idgen.errors import BadRequest
from idgen.speed import choose_levers, preset

Words = Annotated[tuple[str, ...], NoDecode]


class ServiceSettings(BaseSettings):
    """Everything that can be set. Lists are separated by commas in environment variables."""

    model_config = SettingsConfigDict(env_prefix="IDGEN_SERVE_", extra="forbid", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    """address to bind; one that others can reach needs an API key"""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one"""
    base: str | None = None
    """base model for all pipelines, see :func:`idgen.load`"""
    device: str = "auto"
    dtype: str = "auto"
    offload: str | None = None
    speed: str = "exact"
    few_step: str | None = None
    """for all requests, see :func:`idgen.speed.choose_levers`"""
    pipelines: Words = ()
    """pipelines that clients may use, the first loaded at start; empty: all whose weights are here"""
    aliases: dict[str, str] = {}
    """other names that clients may give as ``model``, such as ``{"gpt-image-1" = "auto"}``"""
    preload: bool = True
    """load the first pipeline at start rather than at the first request"""
    demo: bool = True
    """mount the web demo at ``/``"""

    queue_size: int = Field(default=64, ge=1, le=100_000)
    """requests that may wait; more are refused with 429"""
    max_batch: int = Field(default=8, ge=1, le=256)
    """images in one UNet call"""
    batching: bool = True
    deadline_s: float = Field(default=600, gt=0, allow_inf_nan=False)
    """seconds after which a request is given up; a request may ask for less, never for more"""
    grace_s: float = Field(default=120, ge=0, allow_inf_nan=False)
    """seconds that running requests get to finish when the server is told to stop"""

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(default=(), repr=False)
    api_key_file: Path | None = None
    """one key a line; empty lines and lines that begin with # are skipped"""
    rate_limit: float = Field(default=0, ge=0, allow_inf_nan=False)
    """requests a minute for each key (for each address when there are no keys); 0 is no limit"""
    metrics_public: bool = False
    """answer ``/metrics`` without a key"""
    cors_origins: Words = ()
    """origins whose pages may call the API from a browser"""
    trusted_hosts: Words = ()
    """host names under which the server may be addressed; empty: any, or loopback names only without a key"""

    max_upload_bytes: int = Field(default=32 * 1024**2, ge=1024)
    """bytes of a whole request"""
    max_pixels: int = Field(default=50_000_000, ge=1, le=100_000_000)
    """width x height of a photo"""
    max_photos: int = Field(default=16, ge=1, le=64)
    """photos in one request"""
    upload_timeout_s: float = Field(default=60, gt=0, allow_inf_nan=False)
    """seconds in which a request must have arrived"""
    picture_urls: bool = True
    """whether pictures may be asked for as URLs, which this process then answers from its memory for an hour"""
    fetch_hosts: Words = ()
    """hosts (``name`` or ``name:port``) from which photos may be fetched by URL; empty: none"""

    max_n: int = Field(default=10, ge=1, le=64)
    """images in one request"""
    max_steps: int = Field(default=150, ge=1, le=1000)
    max_side: int = Field(default=2048, ge=64, le=4096)
    """pixels of a portrait's side"""

    identities_folder: Path | None = None
    """where enrolled identities are kept; ``None``: idgen's data folder"""
    max_identities: int = Field(default=1000, ge=0)
    """identities that one key may enrol"""

    @field_validator("pipelines", "cors_origins", "trusted_hosts", "fetch_hosts", "api_keys", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known_levers(self) -> ServiceSettings:
        choose_levers(preset(self.speed), self.few_step)
        return self

    @field_validator("aliases", mode="after")
    @classmethod
    def _no_chains(cls, value: dict[str, str]) -> dict[str, str]:
        if chained := sorted(set(value) & set(value.values())):
            raise ValueError(f"{chained[0]!r} is an alias and also what an alias stands for")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def read(cls, config: Path | None = None, **flags: Any) -> ServiceSettings:
        """Settings from a TOML file, the environment and flags; flags that are ``None`` or empty were not given.

        Raises:
            BadRequest: names the first wrong setting, never the value of a secret.
        """
        if config is not None and not config.is_file():
            raise BadRequest(f"there is no settings file {config}.", "config")
        given = {name: value for name, value in flags.items() if value is not None and value != []}

        class Configured(cls):  # type: ignore[misc,valid-type]
            model_config = SettingsConfigDict(toml_file=config)

        try:
            settings: ServiceSettings = Configured(**given)
            settings.check_bind()
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise BadRequest(f"setting {field}: {first['msg'].removeprefix('Value error, ')}.", field) from None
        except ValueError as error:  # the TOML reader's
            raise BadRequest(f"{config} is no valid TOML ({error}).", "config") from None
        return settings

    def keys(self) -> list[str]:
        """All API keys, of the settings and of the key file.

        Raises:
            BadRequest: the key file cannot be read or holds no key, or a key is shorter than 8 characters.
        """
        found = [key.get_secret_value() for key in self.api_keys]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise BadRequest(f"{self.api_key_file} cannot be read ({error}).", "api_key_file") from None
            in_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not in_file:
                raise BadRequest(f"{self.api_key_file} holds no key.", "api_key_file")
            found += in_file
        if any(len(key) < 8 for key in found):
            raise BadRequest("an API key needs at least 8 characters.", "api_keys")
        return found

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check_bind(self) -> None:
        """Refuse to serve others without a key.

        Raises:
            BadRequest: the address can be reached from other machines and there is no key.
        """
        if not self.loopback and not self.keys():
            raise BadRequest(
                f"{self.host} can be reached from other machines, so the service needs a key there: "
                "set --api-key-file FILE or IDGEN_SERVE_API_KEYS, or bind to 127.0.0.1.",
                "host",
            )
