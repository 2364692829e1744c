"""A node's configuration: typed TOML, checked before anything starts.

Every mistake is one line that names the file, the line and the setting, says what was expected and, where there is one, the
remedy. A setting that this version cannot honour is refused, never ignored. Variables `EKKO_<SECTION>__<KEY>` of the
environment (`EKKO_NODE__HTTP=127.0.0.1:7905`) override the file; lists are written as JSON.

What settings there are is in `sections`, how they may be written in `values`, what they must be in `checks`; `places` finds the
line of a mistake.
"""

from ekko.config.reading import load_config
from ekko.config.sections import ModelSection, NodeConfig, NodeSection

__all__ = ["ModelSection", "NodeConfig", "NodeSection", "load_config"]
