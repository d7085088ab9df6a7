"""open_clip and torch-fidelity, which tests read as references: in a folder beside what is installed, or installed.

Both ask for a torchvision, whose build would have to fit torch's, though what the tests read of them does not need it.
So `make test` puts them, alone, into a folder that nothing but the tests looks into, and `pip check` finds nothing.
"""

import pathlib
import sys

FOLDER = pathlib.Path(sys.prefix) / "references"


def look() -> None:
    """Lets Python find them, after everything that is installed."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
