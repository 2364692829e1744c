"""What `[sinks]` must be beyond its types."""

from typing import NoReturn

from ekko.config.places import Places
from ekko.config.sections import NodeConfig, SinkSection
from ekko.errors import ConfigError, ModelError
from ekko.model import check_name
from ekko.sinks.target import check_target, is_redis

SINKS_MAX = 16  # each is a process


def check_sinks(config: NodeConfig, places: Places) -> None:
    """Everything about `[sinks]` that the types cannot say; whether what they need is installed is seen at the start.

    Raises:
        ConfigError: with one line: file, line, setting, what is wrong, what to do.
    """
    if len(config.sinks) > SINKS_MAX:
        raise places.error(("sinks",), f"there may be {SINKS_MAX}, not {len(config.sinks)}: run others by `ekko sink`")
    named: dict[tuple[str | None, ...], str] = {}
    for name, sink in config.sinks.items():
        _check_sink(name, sink, places)
        who = sink.model, sink.target, sink.feed_name, sink.prefix
        if is_redis(sink.target) and (other := named.setdefault(who, name)) != name:
            message = f"feeds the same model into the same redis as sinks.{other}: give one of them another feed_name or prefix"
            raise places.error(("sinks", name), message)


def _check_sink(name: str, sink: SinkSection, places: Places) -> None:
    def refuse(key: str, message: str) -> NoReturn:
        raise places.error(("sinks", name, key), message)

    try:
        check_name("sink", name)
    except ModelError as error:
        raise places.error(("sinks", name), str(error)) from None
    for key, kind, names in (("model", "model", [sink.model]), ("tables", "table", sink.tables or [])):
        try:
            for one in names:
                check_name(kind, one)
        except ModelError as error:
            refuse(key, str(error))
    if sink.tables == []:
        refuse("tables", "there is none: name some, or leave this out to feed all")
    try:
        check_target(sink.target)
    except ConfigError as error:
        refuse("target", str(error))
    if not is_redis(sink.target):
        for key in ("feed_name", "prefix"):
            if key in sink.model_fields_set:
                refuse(key, "only a redis has one: leave this out")
