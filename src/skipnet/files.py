"""Files that are there whole or not at all."""

import contextlib
import os
import threading
from pathlib import Path

from skipnet.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all.

    Raises:
        UserError: When the file cannot be written; an earlier one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kept = "; the previous file is untouched" if path.exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:  # After Ctrl-C too; a file that took its place is no longer under this name.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
