"""The head of a search: a study without candidates whose notes tell workers what goes on.

begun        made anew with each start over: a worker then forgets what it knows
options      of the recipe, flat: another recipe of the same name is refused
stages       names in order
recipe       as resolved, plain values
directory    the run directory, as the machine of the search sees it
supernets    stage -> [folder in the run directory, fingerprint of the weights]
finished     whether the search has ended
"""

from typing import Any

from ..errors import UserError
from .storage import NOTE, SPACE, Storage, import_optuna, quiet


class Head:
    """Makes the head of the search of that name, where there is none, and writes its notes.

    Raises:
        UserError: the name is that of a study of somebody else.
    """

    def __init__(self, storage: Storage, name: str):
        optuna = import_optuna()
        with quiet(optuna):
            self._study = optuna.create_study(
                storage=storage.backend, study_name=name, load_if_exists=True
            )
        if self._study.get_trials(deepcopy=False) or SPACE in self._study.user_attrs:
            raise UserError(
                f"{storage.place} has a study called {name} that is no search's: give the search "
                "another name=..."
            )

    def note(self, **values: Any) -> None:
        """Keeps JSON values, for other processes."""
        for key, value in values.items():
            self._study.set_user_attr(NOTE + key, value)
