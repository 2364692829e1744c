"""How a value may be written: sizes and times with a unit, and everything as text, since the environment has nothing else."""

import re
from typing import Annotated

from pydantic import BeforeValidator


def _whole_number(value: object) -> object:
    """Let digits in quotes pass for a whole number: the environment has nothing but text."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d[\d_]*", value) else value


def _number(value: object) -> object:
    """The same for numbers with a fraction."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value) else value


def truth(value: object) -> object:
    """And for yes and no."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


_UNITS = {"B": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate("kMGTP", 1)}
_UNITS |= {"KB": 1000} | {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGTP", 1)}


def _byte_size(value: object) -> object:
    """A number of bytes, or text with a unit: "100GB", "1.5 GiB"."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)", value)):
        factor = _UNITS.get(match[2] or "B")
        if factor is not None:
            return int(float(match[1].replace("_", "")) * factor)
    return value


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
ByteSize = Annotated[int, BeforeValidator(_byte_size)]
Number = Annotated[float, BeforeValidator(_number)]


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _seconds(value: object) -> object:
    """Text such as "10m" for seconds."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd]?)", value)):
        return float(match[1]) * _SECONDS[match[2] or "s"]
    return value


Seconds = Annotated[float, BeforeValidator(_seconds)]
