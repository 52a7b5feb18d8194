"""Data sets of the Hugging Face hub: what a download takes, and why one failed.

The hub's client resumes and checks downloads; here its failures become one line each.
"""

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from skipnet.data.tables import one_line
from skipnet.errors import UserError

if TYPE_CHECKING:
    import datasets

# By name, as they are of several packages, some of which change between versions of the client.
GATED = {"GatedRepoError"}
UNKNOWN = {"RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"}
CUT_SHORT = {
    "ChecksumVerificationError",
    "ChunkedEncodingError",
    "IncompleteRead",
    "IncompleteSnapshotError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "SplitsVerificationError",
    "XetDownloadError",
}
UNREACHABLE = {"ConnectError", "ConnectionError", "OfflineModeIsEnabled", "TimeoutException"}
DISK_FULL = ("Not enough disk space", os.strerror(errno.ENOSPC))


def hub_table(name: str, subset: str | None, split_name: str) -> "datasets.Dataset":
    """Opens a split of a data set, from the local cache if it is there.

    A download says on stderr how large it is before it starts.

    Args:
        name: Name on the hub.
        subset: Which of its configurations, or None if it has but one.
        split_name: Name of the split.

    Raises:
        UserError: There is no such data set, subset or split, it needs a login, it cannot be
            reached, the download was cut short, or the disk is full.
    """
    import datasets

    try:
        # What load_dataset does, with a look at the size in between.
        builder = datasets.load_dataset_builder(name, subset)
        _announce(name, builder)
        builder.download_and_prepare()
        return builder.as_dataset(split=split_name)
    except Exception as error:  # the hub's client has dozens of unrelated types for its failures
        raise UserError(_explain(error, name, subset, split_name)) from error


def _announce(name: str, builder: "datasets.DatasetBuilder") -> None:
    """Says how large a download will be, if there is to be one; once a machine."""
    if Path(builder.cache_dir).exists() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    sizes = ", ".join(
        f"{_size(size)} {what}"
        for size, what in (
            (builder.info.download_size, "to download"),
            (builder.info.dataset_size, "on the disk besides"),
        )
        if size
    )
    print(
        f"downloading {name} to {Path(builder.cache_dir).parent}: {sizes or 'size unknown'}; "
        "if it is interrupted, the same command goes on with it",
        file=sys.stderr,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _explain(error: BaseException, name: str, subset: str | None, split_name: str) -> str:
    """What went wrong, and what to do about it, in one line."""
    chain = list(_chain(error))
    types = {kind.__name__ for one in chain for kind in type(one).__mro__}
    text = " ".join(str(one) for one in chain)
    detail = one_line(error)
    if types & GATED or "gated dataset" in text:
        return (
            f"{name} needs a login: accept its terms on https://huggingface.co/datasets/{name}, "
            f"log in with `hf auth login`, and try again ({detail})"
        )
    if any(reason in text for reason in DISK_FULL):
        return (
            f"not enough disk space for {name} ({detail}); make room, or set HF_HOME to a folder "
            "on a larger disk"
        )
    if types & CUT_SHORT or "Consistency check failed" in text:
        return (
            f"the download of {name} was cut short ({detail}); run the same command again: it "
            "goes on with what is there"
        )
    if "Unknown split" in text:
        return f"{name} has no split {split_name} ({detail}); correct train_split or test_split"
    if "BuilderConfig" in text or "Config name is missing" in text:
        which = "needs a subset" if subset is None else f"has no subset {subset}"
        return f"{name} {which} ({detail}); set subset to one of those"
    if types & UNREACHABLE:
        return (
            f"cannot reach the Hugging Face hub for {split_name} of {name} ({detail}); connect, "
            "or give a local folder"
        )
    if types & UNKNOWN:
        return (
            f"there is no data set {name} on the Hugging Face hub that you may read ({detail}); "
            "correct the name, or log in with `hf auth login` if it is private"
        )
    return (
        f"cannot load {split_name} of {name} from the Hugging Face hub ({detail}); correct the "
        "name, connect or log in, or give a local folder"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
