"""Options that several commands of `ekko` have."""

from pathlib import Path
from typing import Annotated

import typer

from ekko.errors import ConfigError

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="The node's TOML file.", metavar="FILE")]
HttpOption = Annotated[str | None, typer.Option("--http", help="The node's HTTP address.", metavar="HOST:PORT")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def http_of(config: Path | None, http: str | None) -> str:
    """Where the node answers.

    Raises:
        ConfigError: neither of them, or both, or the file is wrong.
    """
    if (config is None) == (http is None):
        raise ConfigError("give either --config FILE or --http HOST:PORT")
    if config is not None:
        from ekko.config import load_config

        http = load_config(config).node.http
    assert http is not None
    return http
