"""Data sets of the Hugging Face hub, through the library `datasets`."""

from collections.abc import Sequence

from fastffn.errors import UserError


def hub_split(
    name: str, config: str | None, split: str, columns: Sequence[str]
) -> tuple[dict[str, list], str]:
    """Columns of one split, and a name of it for messages.

    Args:
        columns: which; what the data set has beside them is not read.

    Raises:
        UserError: `datasets` is not installed, the data set, configuration or split cannot be
            had, or a column is not there.
    """
    origin = f"hub data set {name}{'' if config is None else f'/{config}'}, {split}"
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{origin} needs the library datasets: pip install datasets, or give local files"
        ) from None
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of whatever library it stands on
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{origin} cannot be had: {reason} (or give local files)") from error
    for column in columns:
        if column not in data.column_names:
            raise UserError(
                f"{origin} has no column {column}: it has {', '.join(data.column_names)}"
            )
    return {column: list(data[column]) for column in columns}, origin
