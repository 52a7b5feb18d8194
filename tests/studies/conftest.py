import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from harness import quick_and_private  # noqa: F401
