"""Every setting, defined once: flags override `SORTER_*` variables, which override the TOML file and the defaults.

In: the flags that were given, the environment, a TOML file. Out: one frozen `Settings`, or a `ConfigurationError` with
one line per problem. The flags and their help, `config/settings.md` and the completion scripts are generated from
these fields, and a test keeps `config/sorter.toml` in step with them.
"""

import codecs
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pathspec import GitIgnoreSpec
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sorter.errors import ConfigurationError
from sorter.names import IGNORED_FOLDERS, SIDECAR_SUFFIXES, TEMPORARY_NAMES

ENVIRONMENT_PREFIX = "SORTER_"
SHIPPED_MODEL = Path(__file__).parent / "models" / "catdog-resnet50"

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]

NONE = "none"
"""The value of an optional setting that takes back what a weaker source sets."""

MAX_CONFIG_BYTES = 1_000_000
_PATH_TYPE = f"path for {Path}"  # what pydantic calls it


def _not_empty(value: Any) -> Any:
    # Path("") is the current folder: an unset shell variable must not sort whatever happens to be in it.
    if value is None or str(value) == "":
        raise ValueError("must not be empty")
    if "\0" in str(value):
        raise ValueError("should be a path without NUL characters")
    # Paths fold `//` and `/./`, which are parts of an object's key.
    url = re.match(r"[a-z][a-z0-9+.-]*://(.+?)/?$", str(value), re.IGNORECASE | re.DOTALL)
    if url is not None and {"", "."}.intersection(url[1].split("/")):
        raise ValueError("should be a URL without // or /./ in it")
    return value


def _not_bool(value: Any) -> Any:
    # `min_confidence = true` would count as 1.0 and make every photo unsure.
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _listed(value: Any) -> Any:
    # A variable; the TOML file has lists, and a flag is given several times.
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        if not pattern.strip() or ".." in pattern.split("/"):
            raise ValueError(f"'{pattern}' matches nothing: patterns are relative to the inbox")
    GitIgnoreSpec.from_lines(patterns)  # raises a ValueError
    return patterns


def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not name.strip() or "/" in name:
            raise ValueError(f"'{name}' is not part of a file's name")
    return names


def _located(path: Path) -> Path:
    path = Path(os.path.expanduser(path))
    if path.is_absolute():
        return path
    try:
        current = Path.cwd()
    except FileNotFoundError:
        raise ValueError("should be an absolute path, as the current folder is gone") from None
    parents = len(list(itertools.takewhile("..".__eq__, path.parts)))
    if parents == 0:
        return path
    # A running sorter finds `../photos` also after its current folder is gone. Only what comes first may be folded:
    # behind a link, `..` is the parent of where that leads.
    ancestors = [current, *current.parents]
    return Path(ancestors[min(parents, len(ancestors) - 1)], *path.parts[parents:])


Real = Annotated[float, BeforeValidator(_not_bool)]
Integer = Annotated[int, BeforeValidator(_not_bool)]
Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]
Names = Annotated[Strings, AfterValidator(_names)]
Patterns = Annotated[Strings, AfterValidator(_patterns)]
Folder = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_located)]


def _field(default: Any, description: str, *, group: str, metavar: str = "", **constraints: Any) -> Any:
    return Field(
        default, description=description, json_schema_extra={"group": group, "metavar": metavar}, **constraints
    )


def extra(field: FieldInfo, name: Literal["group", "metavar"]) -> str:
    """What a setting's field says about itself besides pydantic's own attributes."""
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra[name])


class Settings(BaseSettings):
    """All settings. Units are part of the names."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    inbox: Folder = _field(Path("inbox"), "folder that photos are dropped into", group="Folders", metavar="DIR")
    output: Folder | None = _field(
        None,
        "folder for cats/, dogs/, unsure/ and failed/ (default: the inbox itself)",
        group="Folders",
        metavar="DIR",
    )
    state_dir: Folder | None = _field(
        None,
        "folder on a local disk for the history and the locks, if the output's file system cannot hold a database "
        "(default: .sorter in the output)",
        group="Folders",
        metavar="DIR",
    )
    recursive: bool = _field(
        False,
        "also sort photos in subfolders of the inbox, into the same subfolders of cats/ and dogs/",
        group="Folders",
    )
    flat: bool = _field(False, "with --recursive, sort photos directly into cats/ and dogs/", group="Folders")

    include: Patterns = _field(
        (),
        "sort only files that match a pattern, as in .gitignore, relative to the inbox (default: every file)",
        group="Files",
        metavar="PATTERN",
    )
    exclude: Patterns = _field(
        (),
        "leave files and folders alone that match a pattern, as in .gitignore, relative to the inbox (default: none)",
        group="Files",
        metavar="PATTERN",
    )
    ignored_folders: Names = _field(
        IGNORED_FOLDERS,
        "with --recursive, names of folders that are never entered, in any case, in place of the default: trash, "
        "thumbnails, photo libraries",
        group="Files",
        metavar="NAME",
    )
    temporary_names: Names = _field(
        TEMPORARY_NAMES,
        "names of incomplete files, in any case, in place of the default; they are left alone and not counted",
        group="Files",
        metavar="NAME",
    )
    sidecar_suffixes: Names = _field(
        SIDECAR_SUFFIXES,
        "endings of files that move with the photo of the same name, after it or in place of its extension; these "
        "replace the default",
        group="Files",
        metavar="SUFFIX",
    )

    once: bool = _field(False, "sort what is in the inbox and exit, instead of watching it", group="Sorting")
    dry_run: bool = _field(False, "report what would happen and change nothing", group="Sorting")
    link: bool = _field(
        False,
        "leave photos where they are, and put hard links into the folders, or copies where there can be no links",
        group="Sorting",
    )
    include_undone: bool = _field(False, "also sort photos that sorter undo has restored", group="Sorting")
    min_confidence: Real = _field(
        0.0,
        "photos with a lower confidence go to unsure/; 0 sorts every photo",
        group="Sorting",
        metavar="P",
        ge=0,
        le=1,
    )
    max_error_rate: Real | None = _field(
        None,
        "accept at most this share of wrong labels; less certain photos go to unsure/ (default: no limit)",
        group="Sorting",
        metavar="R",
        gt=0,
        lt=1,
    )

    catch_neither: bool = _field(
        False, "photos that look like none of the model's classes go to unsure/ as well", group="Sorting"
    )

    model: Folder = _field(
        SHIPPED_MODEL, "model folder (default: the model that ships with sorter)", group="Model", metavar="DIR"
    )
    device: str = _field(
        "auto",
        "auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one",
        group="Model",
        metavar="DEVICE",
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?|mps)$",
    )
    engine: Literal["auto", "openvino", "torch"] = _field(
        "auto",
        "auto, openvino or torch; auto is OpenVINO on a CPU and PyTorch on a GPU",
        group="Model",
        metavar="ENGINE",
    )
    batch_size: Integer = _field(32, "number of photos classified together", group="Model", metavar="N", ge=1, le=1024)

    settle_seconds: Real = _field(
        2.0, "a file that has not changed for this long is complete", group="Watching", metavar="S", ge=0, le=3600
    )
    settle_timeout_seconds: Real = _field(
        60.0,
        "with --once, how long to wait for files that are still changing",
        group="Watching",
        metavar="S",
        ge=0,
        le=86400,
    )
    rescan_seconds: Real = _field(
        60.0,
        "how often to list the entire inbox, regardless of file events",
        group="Watching",
        metavar="S",
        ge=0.1,
        le=86400,
    )
    max_wait_ms: Integer = _field(
        50, "how long a photo may wait for others to fill its batch", group="Watching", metavar="MS", ge=0, le=60000
    )

    max_megapixels: Real = _field(
        100.0, "larger pictures fail with too-many-pixels", group="Limits", metavar="MP", gt=0, le=1000
    )
    max_jpeg_megapixels: Real = _field(
        250.0,
        "the same limit for JPEGs, and for HEICs of tiles, which are decoded at a reduced scale",
        group="Limits",
        metavar="MP",
        gt=0,
        le=4000,
    )
    max_megabytes: Real = _field(500.0, "larger files fail with too-large", group="Limits", metavar="MB", gt=0, le=1e6)
    decode_timeout_seconds: Real = _field(
        20.0,
        "pictures that take longer to decode fail with decoder-timeout",
        group="Limits",
        metavar="S",
        gt=0,
        le=3600,
    )

    on_sorted: str | None = _field(
        None,
        "command to run after each batch, with the moved photos as JSON on its standard input (default: none)",
        group="Integration",
        metavar="COMMAND",
    )
    metrics_port: Integer = _field(
        0,
        "port on 127.0.0.1 for Prometheus metrics (daemon only); 0 disables it",
        group="Integration",
        metavar="PORT",
        ge=0,
        le=65535,
    )

    log_format: LogFormat = _field(
        "auto",
        "auto, json or console; auto is console on a terminal and json elsewhere",
        group="Logging",
        metavar="FORMAT",
    )
    log_level: LogLevel = _field("info", "debug, info, warning or error", group="Logging", metavar="LEVEL")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources, strongest first."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))

    @field_validator("output", "state_dir", "max_error_rate", "on_sorted", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return None if value == NONE else value

    @field_validator("on_sorted")
    @classmethod
    def _no_command(cls, value: str | None) -> str | None:
        return value or None

    @property
    def output_folder(self) -> Path:
        """The folder that contains `cats/`, `dogs/`, `unsure/` and `failed/`."""
        return self.inbox if self.output is None else self.output


def load(flags: Mapping[str, Any]) -> Settings:
    """Merge the sources and check them.

    Args:
        flags: the flags that were given, by field name; `config` names the TOML file, overriding `SORTER_CONFIG`.

    Raises:
        ConfigurationError: an unknown key or variable, a wrong type, a value out of range, an unreadable file.
    """
    given = {field: value for field, value in flags.items() if field != "config"}
    variables = {
        name.upper().removeprefix(ENVIRONMENT_PREFIX).lower(): name
        for name in os.environ
        if name.upper().startswith(ENVIRONMENT_PREFIX)
    }
    named = variables.pop("config", None)
    config = flags.get("config", os.environ[named] if named else None)
    if config == "":
        raise ConfigurationError(f"{'--config' if 'config' in flags else named} is empty: name a file or omit it")
    # pydantic-settings ignores unknown variables and a missing file.
    if unknown := sorted(name for field, name in variables.items() if field not in Settings.model_fields):
        raise ConfigurationError(
            f"unknown environment variable {', '.join(unknown)}: unset it; sorter run --help lists the settings"
        )
    if config is not None:
        config = Path(os.path.expanduser(config))
        _check_file(config)

    # pydantic-settings takes the file's name from the class only.
    class Loaded(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        return _one_threshold(Loaded(**given), given, variables)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_sentence(e, given, variables, config) for e in error.errors())) from None
    except OSError as error:
        raise ConfigurationError(
            f"the configuration file {config} cannot be read ({error.strerror}): check its permissions"
        ) from None
    except (ValueError, RecursionError) as error:  # includes numbers with thousands of digits and deep nesting
        problem = _toml_problem(config, error)
        raise ConfigurationError(f"the configuration file {config} is not valid TOML: {problem}") from None


def _toml_problem(config: Path, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "save it as UTF-8"
    if config.read_bytes().startswith(codecs.BOM_UTF8):
        return "save it as UTF-8 without a byte order mark"
    return str(error)


def _one_threshold(settings: Settings, given: Mapping[str, Any], variables: Mapping[str, str]) -> Settings:
    """Of the two settings for one threshold keep the one from the stronger source, and both if it is the same one."""

    def weakness(name: str) -> int:
        return 0 if name in given else 1 if name in variables else 2

    pair = ("min_confidence", "max_error_rate")
    if not settings.model_fields_set.issuperset(pair):
        return settings
    stronger, weaker = sorted(pair, key=weakness)
    if weakness(stronger) == weakness(weaker):
        return settings
    return settings.model_copy(update={weaker: Settings.model_fields[weaker].default})


def _check_file(config: Path) -> None:
    if not os.path.isfile(config):
        raise ConfigurationError(f"there is no configuration file {config}: check the path given with --config")
    if os.path.getsize(config) > MAX_CONFIG_BYTES:
        raise ConfigurationError(
            f"{config} is too large to be a configuration file: check the path given with --config"
        )


def _sentence(error: ErrorDetails, given: Mapping[str, Any], variables: Mapping[str, str], config: Path | None) -> str:
    """One validation error as a line that names the flag, variable or key to change."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    field = str(error["loc"][0])
    if field in given:
        place = "--" + field.replace("_", "-")
    elif field in variables:
        place = variables[field]
    else:
        place = f"{field if field.isprintable() else ascii(field)} in {config}"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown setting; config/sorter.toml lists all of them"
    if error["type"] == "string_pattern_mismatch":
        message = f"should be {Settings.model_fields[field].description}"
    message = message.removeprefix("Input ").split(", unable")[0].replace(_PATH_TYPE, "path")
    return f"{place}: {message}, not {repr(error['input'])[:100]}"
