"""Models that parameter servers train: what is taken back with them.

Of model NAME servers have NAME.training: weights, what the optimiser keeps of them, and which pushes count. Taken back alone,
the served model would be as it was until the servers serve again what they have. So a rollback of NAME is two: the witness
begins one of NAME.training, for the same moment and at the same time, and lets writers of NAME go on when both are done.
Servers then compare what they have with what is served.

Which pushes count is not taken back (`MARKS_TABLE`): workers go on by their numbers, and what a push changed is gone all the
same.
"""

from dataclasses import replace

from ekko.errors import EkkoError, ModelError
from ekko.model import MARKS_TABLE, STATE_SUFFIX, STEPS_SUFFIX, ModelSpec
from ekko.rollback.scope import KEY_END, Scope


def scope_of(scope: Scope, training: ModelSpec) -> Scope | None:
    """What of a training model is taken back with this of the served one; None: nothing.

    Args:
        scope: of the served model; not of one writer.
        training: the other model.
    """
    ranged = (scope.key_first, scope.key_end) != (0, KEY_END)
    tables = []
    for name in training.tables:
        of = name.removesuffix(STATE_SUFFIX).removesuffix(STEPS_SUFFIX)
        # Counts of steps have keys of their own, which say nothing of rows.
        if name != MARKS_TABLE and scope.has_table(of) and not (ranged and name.endswith(STEPS_SUFFIX)):
            tables.append(name)
    return replace(scope, tables=tuple(tables)) if tables else None


def check_request(model: str, served: str, scope: Scope, *, trained: bool) -> None:
    """Refuse what cannot be asked of a model that servers train.

    Args:
        model: that is to be taken back.
        served: the model that is served of it, if it is a training model that has one; else itself.
        scope: what of it.
        trained: whether servers train it.

    Raises:
        ModelError: in one line what to do instead.
    """
    if served != model:
        raise ModelError(f"model {model!r} is what servers keep of {served!r}: take {served!r} back, and both are")
    if trained and scope.writer:
        raise ModelError(
            f"model {model!r} is trained by servers, whose rows come from the gradients of all workers: leave --writer out"
        )


def nobody_holds(model: str, training: ModelSpec) -> EkkoError:
    """No witness could take both back."""
    return EkkoError(
        f"servers train model {model!r}, and no witness that is alive holds all of {training.name!r}: they would serve what is "
        f'taken back again. Put [models."{training.name}"] with partitions = {training.partitions} into the file of a witness; '
        f"of a model that nobody trains any more, `ekko drop {training.name}`"
    )
