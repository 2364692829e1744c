"""From a file, and the environment, to a checked configuration."""

import os
import re
import tomllib
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings.exceptions import SettingsError

from ekko.config.checks import check, check_formulas
from ekko.config.places import Places
from ekko.config.sections import ENVIRONMENT_PREFIX, ModelSection, NodeConfig
from ekko.errors import ConfigError
from ekko.priority.functions import MODULE_SUFFIXES

CONFIG_BYTES_MAX = 1 << 20  # a node's file has some dozens of lines; anything near this is not a configuration


def load_config(path: Path | str) -> NodeConfig:
    """Read and check one configuration file.

    Relative paths are taken from the folder of the file.

    Raises:
        ConfigError: with one line: file, line, setting, what is wrong, what to do.
    """
    path = Path(path)
    text = _read(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line = _syntax_error(str(error), text)
        raise ConfigError(f"{path}:{line}: not valid TOML: {message}") from None
    places = Places(path, text)
    _check_environment_names()
    try:
        config = NodeConfig(**values)
    except ValidationError as error:
        raise places.error_of(error) from None
    except SettingsError as error:
        raise ConfigError(f"environment: {_one_line(error)}; lists and tables are written as JSON there") from None
    check(config, places)

    def absolute(relative: Path) -> Path:
        return (path.parent / relative.expanduser()).absolute()

    def formula(model: ModelSection) -> str:
        named = model.priority.formula
        return str(absolute(Path(named))) if named.endswith(MODULE_SUFFIXES) else named

    changed: dict[str, object] = {"node": config.node.model_copy(update={"run_dir": absolute(config.node.run_dir)})}
    if config.models:
        changed["models"] = {
            name: model.model_copy(update={"priority": model.priority.model_copy(update={"formula": formula(model)})})
            for name, model in config.models.items()
        }
    if (security := config.security) is not None:
        paths = {"key_file": absolute(security.key_file), "allow": absolute(security.allow)}
        changed["security"] = security.model_copy(update=paths)
    if (snapshots := config.snapshots) is not None:
        urls = {"url": snapshots.url, "seed": snapshots.seed}
        urls = {
            key: url if url is None or "://" in url or "::" in url else str(absolute(Path(url))) for key, url in urls.items()
        }
        changed["snapshots"] = snapshots.model_copy(update=urls)
    config = config.model_copy(update=changed)
    check_formulas(config, places)
    return config


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise ConfigError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes: this is not a node's configuration")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def _syntax_error(message: str, text: str) -> tuple[str, int]:
    """Split tomllib's "... (at line 3, column 5)" into what and where."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if match is None:
        return message, 1
    last_line = max(1, len(text.splitlines()))
    return message[: match.start()], int(match[1]) if match[1] else last_line


def _check_environment_names() -> None:
    """Refuse a variable that looks like a setting of ours and would have no effect."""
    for name in sorted(os.environ):
        upper = name.upper()
        for section in NodeConfig.model_fields:
            stem = f"{ENVIRONMENT_PREFIX}{section.upper()}_"
            if upper.startswith(stem) and not upper.startswith(stem + "_"):
                hint = f"{stem}_{upper.removeprefix(stem)}"
                raise ConfigError(
                    f"environment variable {name} has no effect: section and key are joined by two underscores, as in {hint}"
                )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
