"""`python -m scaling_dit.tpu VERB ...` is `scaling-dit tpu VERB ...`."""

import sys

from scaling_dit.cli.main import main

sys.exit(main(["tpu", *sys.argv[1:]]))
