"""What an operator asks for, as it comes over HTTP."""

from dataclasses import dataclass
from typing import Any

from ekko.model import check_name
from ekko.rollback.scope import KEY_END, WHOLE, Scope


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """Take a model back. The writer of its scope is a node; its ids are looked up by who gets the request."""

    model: str
    to_ms: int  # Unix milliseconds; 0: the newest moment at which it was healthy
    scope: Scope = WHOLE
    dry: bool = False
    force: bool = False


def rollback_request(body: dict[str, Any]) -> RollbackRequest | None:
    """The request in the body of `POST /rollback`; None: that is none.

    Raises:
        ModelError: a name is unusable.
    """
    match body:
        case {"model": str(model), "to_ms": int(to_ms), "tables": list(tables), "writer": str(writer), "keys": keys}:
            flags = [body.get(name, False) for name in ("dry_run", "force")]
            if (
                type(to_ms) is not int
                or to_ms < 0
                or not all(isinstance(one, bool) for one in flags)
                or not all(isinstance(one, str) for one in tables)
            ):
                return None
            match keys:
                case None:
                    first, end = 0, KEY_END
                case [str(low), str(high)] if low.isdecimal() and high.isdecimal() and len(low) <= 20 and len(high) <= 20:
                    first, end = int(low), int(high)
                    if not first < end <= KEY_END:
                        return None
                case _:
                    return None
            names = tuple(check_name("table", table) for table in tables)
            return RollbackRequest(check_name("model", model), to_ms, Scope(names, writer, (), first, end), *flags)
    return None
