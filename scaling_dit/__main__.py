"""`python -m scaling_dit VERB ...` is `scaling-dit VERB ...`."""

import sys

from scaling_dit.cli.main import main

sys.exit(main())
