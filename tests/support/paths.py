"""Where the checkout and its parts lie."""

import pathlib

SUPPORT = pathlib.Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
DOCS = ROOT / "docs"
GOLDEN = ROOT / "tests" / "golden"
