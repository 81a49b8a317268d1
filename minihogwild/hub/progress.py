"""A progress bar on standard error, for downloads and whatever else takes long."""

import sys

from huggingface_hub.utils import tqdm


class Bar(tqdm):
    """The hub's progress bar, where standard error is a terminal; when closed it leaves nothing behind."""

    def __init__(self, *args, **options):
        options["leave"] = False
        # None is tqdm's word for: where standard error is not a terminal. It may also be closed
        options["disable"] = True if sys.stderr is None else None
        super().__init__(*args, **options)


def close_bars() -> None:
    """Close the bars that the hub leaves open, which would be drawn again at the very end."""
    open_bars = [bar for bar in Bar._instances if isinstance(bar, Bar)]
    for bar in open_bars:
        bar.close()
