"""The head of a search: a study without candidates whose notes tell workers what goes on.

stages       names in order
recipe       as resolved, plain values
directory    the run directory, as the machine of the search sees it
supernets    stage -> [folder in the run directory, fingerprint of the weights]
finished     whether the search has ended
"""

from typing import Any

from .storage import NOTE, Storage, import_optuna, quiet


class Head:
    """Makes the head of the search of that name, where there is none, and writes its notes."""

    def __init__(self, storage: Storage, name: str):
        optuna = import_optuna()
        with quiet(optuna):
            self._study = optuna.create_study(
                storage=storage.backend, study_name=name, load_if_exists=True
            )

    def note(self, **values: Any) -> None:
        """Keeps JSON values, for other processes."""
        for key, value in values.items():
            self._study.set_user_attr(NOTE + key, value)
