"""Keeps what other libraries say about themselves off the command line.

Their progress bars, advice and notes on deprecation would tear the run's own bars apart. Errors
still come through: only what is below them is cut, and under `--debug` nothing is.
"""

import logging
import os
import warnings

_ENVIRONMENT = {  # read once, when those libraries are imported
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # unset, it warns once a process forks
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def quiet() -> None:
    """Silences them in this process; what the user set in the environment wins.

    One global threshold rather than a level for each logger: some libraries set their own level
    whenever they are imported or first used.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
