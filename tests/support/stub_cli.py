"""`python -m tests.support.stub_cli`: the command `finetune` with the stub trainer in its pods."""

import sys

from finetune_operator.cli.main import main
from tests.local.jobs import STUB

sys.exit(main(program=STUB))
