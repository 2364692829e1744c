"""The node's ledger as snapshots need it: who is bound to which writer id, who was expelled, what was retired."""

from pathlib import Path

from ekko.errors import StoreError
from ekko.file_ledger import FileLedger
from p2p.errors import LocalProtocolError
from p2p.identity.ledger import NodeRecord


def load_record(run_dir: Path) -> NodeRecord:
    """The node's ledger; empty where there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return NodeRecord.load(FileLedger(run_dir))
    except LocalProtocolError as error:
        raise StoreError(f"{run_dir}: {error}") from None
