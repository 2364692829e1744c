"""`ekko load`: a file becomes rows of a model at the speed of the file, not as updates.

Each slice of the file is a whole step of this node's writer, with a stamp, applied and claimed like any other (R4, R6), and
sent to nobody: to other replicas it is a step that was lost on its way, which they pull. So their links carry what they ask
for, and nothing waits in queues. A slice takes about a millisecond of the event loop; reading and encoding happen in a thread.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from ekko.codec import LIMIT_BITS, encode, limit_of
from ekko.errors import EkkoError, ModelError
from ekko.local import Opened, PublishStep
from ekko.model import CODEC_DEFAULT, DENSE_TABLE, TensorSpec, table_id
from ekko.snapshots.files import LoadPlan, plan_load, read_keys, read_tensors, slices
from ekko.store.kernels.checks import all_below
from p2p.replica import RowColumns

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What `ekko load` asks for."""

    model: str
    file: Path
    tables: dict[str, str]  # tensor -> table
    codec: str | None = None  # of a model that is new
    keys: dict[str, str] = field(default_factory=dict)  # table -> where its keys are; "": of the only table


@dataclass(frozen=True, slots=True)
class LoadPicture:
    """How far the last load has come."""

    model: str = ""
    file: str = ""
    running: bool = False
    rows: int = 0
    rows_total: int = 0
    stamp: int = 0  # of the last step
    error: str = ""
    finished: int = 0  # loads in this life that ended, well or not


class Loading:
    """One load at a time.

    Args:
        open_model: have the model and these tables; returns its codec and the dims of its tables. Raises EkkoError.
        publish: store a step and send it to nobody; returns its stamp. Raises EkkoError.
    """

    def __init__(
        self,
        open_model: Callable[[LoadRequest, LoadPlan | None], Opened],
        publish: Callable[[PublishStep], Awaitable[int]],
    ) -> None:
        self.picture = LoadPicture()
        self._open_model = open_model
        self._publish = publish
        self._task: asyncio.Task[None] | None = None

    def begin(self, request: LoadRequest) -> None:
        """Begin a load.

        Raises:
            EkkoError: another one runs.
        """
        if self.picture.running:
            raise EkkoError(f"{self.picture.file} is being loaded: wait until that is done")
        finished = self.picture.finished
        self.picture = LoadPicture(request.model, str(request.file), True, finished=finished)
        self._task = asyncio.get_running_loop().create_task(self._run(request))

    def close(self) -> None:
        """Stop; what was loaded so far stays. The node may go on in another life, and load again."""
        if self._task is not None:
            self._task.cancel()
        if self.picture.running:
            error = f"the node stopped while it loaded {self.picture.file}: load it again"
            self.picture = replace(self.picture, running=False, error=error, finished=self.picture.finished + 1)

    async def _run(self, request: LoadRequest) -> None:
        error = ""
        try:
            await self._load(request)
        except EkkoError as failure:
            error = str(failure)
        except Exception as failure:  # noqa: BLE001 - a file can fail in any way; the node lives on
            error = f"{request.file} cannot be loaded: {failure!r}"
        if error and self.picture.rows:
            error += f" ({self.picture.rows} rows before that are loaded, and stay)"
        self.picture = replace(self.picture, running=False, error=error, finished=self.picture.finished + 1)
        if error:
            log.warning("load_failed", model=request.model, file=str(request.file), reason=error)
        else:
            log.info("load_finished", model=request.model, file=str(request.file), rows=self.picture.rows)

    async def _load(self, request: LoadRequest) -> None:
        tensors = await asyncio.to_thread(read_tensors, request.file)
        keys = {table: await asyncio.to_thread(read_keys, tensors, where) for table, where in request.keys.items()}
        plan = plan_load(tensors, self._open_model(request, None).tables, request.tables, keys)
        opened = self._open_model(request, plan)
        codec, incarnation = opened.codec, opened.held.incarnation
        self.picture = replace(self.picture, rows_total=plan.rows)
        specs = tuple(TensorSpec(name, one.shape, "float32") for name, one in plan.dense.items())
        steps = slices(plan)

        def following() -> RowColumns | None:
            for table, keys, rows in steps:
                own = CODEC_DEFAULT if table == DENSE_TABLE else codec
                if not all_below(rows, LIMIT_BITS[own]):
                    raise ModelError(f"table {table!r}: a value is {limit_of(own):g} or more, which {own} has no number for")
                return RowColumns(opened.table_id(table), keys, encode(own, rows))
            return None

        while (columns := await asyncio.to_thread(following)) is not None:
            tensors_of = specs if columns.table == table_id(DENSE_TABLE) else ()
            stamp = await self._publish(
                PublishStep(request.model, (columns,), tensors_of, codec=codec, incarnation=incarnation)
            )
            self.picture = replace(self.picture, rows=self.picture.rows + columns.keys.size, stamp=stamp)
