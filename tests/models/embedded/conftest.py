"""The recipe's files import one another by bare name, as they do when run as scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "models" / "embedded"))
