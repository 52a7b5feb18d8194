import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from harness import cifar_run, digits_run, quick_and_private  # noqa: F401
