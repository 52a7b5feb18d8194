"""Networks kept in files and shared on the Hugging Face hub."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download

from skipnet.errors import UserError

if TYPE_CHECKING:
    from skipnet.models.weights import ModelInfo
    from skipnet.routing.network import SkipNet

FILE = "model.safetensors"
# Where runs are, and what other libraries' networks are called.
_NOT_ON_THE_HUB = ("runs", "torchvision", "timm", "transformers")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_CARD = """\
---
{data}
---

# {title}

A [SkipNet](https://arxiv.org/abs/1711.09485): a residual network with gates that decide, image by
image, which of its blocks run.

- Network: `{name}`, gate `{gate}`, {num_classes} classes ({classes})
- Images: {channels}×{height}×{width}, normalised by mean {mean} and standard deviation {std}
- {measured}

```python
import skipnet

network, info = skipnet.load("{repo}")  # or the file's path
logits, routing = network(images, execute="compacted")
```
"""


class Shareable(
    ModelHubMixin,
    library_name="skipnet",
    tags=["skipnet", "dynamic-routing"],
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/1711.09485",
):
    """What a network can do to be kept and shared; a mixin of `huggingface_hub`.

    `push_to_hub("owner/name")` uploads the model file and a card, `from_pretrained("owner/name")`
    reads them, as does `skipnet.load`. Nothing is pickled.

    Attributes:
        info: What a model file says beside the weights; set by `skipnet.load`, None for a network
            that was built.
    """

    info: "ModelInfo | None" = None
    _measured: int | None = None

    def save(self, path: str | os.PathLike[str], info: "ModelInfo | None" = None) -> None:
        """Write a model file, see `skipnet.save`.

        Args:
            path: Where to; an earlier file survives any failure.
            info: What the file is to say; `self.info` if not given, without results that were
                measured with other weights.

        Raises:
            UserError: When there is nothing to say, or the file cannot be written.
        """
        from skipnet.models import weights

        weights.save(self._network(), path, info or self._current_info())

    def _network(self) -> "SkipNet":
        """Return this, as what it is: the mixin knows nothing of networks."""
        return cast("SkipNet", self)

    def _current_info(self) -> "ModelInfo":
        """Return `info` without results that were measured with other weights."""
        from skipnet.models import weights

        if self.info is None:
            raise UserError(
                "a file has to say how to build this network, its classes and how its images are "
                "normalised: set network.info to a skipnet.ModelInfo, or give one to save"
            )
        if self._measured == weights.fingerprint(self._network().state_dict()):
            return self.info
        return replace(self.info, results={})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model file and a card; see `huggingface_hub.ModelHubMixin.push_to_hub`.

        Raises:
            UserError: When the hub cannot be reached or does not let you.
        """
        card = {"repo_id": repo_id} | (kwargs.pop("model_card_kwargs", None) or {})
        with _hub_errors(_explain_push):
            return str(super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs))

    def _save_pretrained(self, save_directory: Path) -> None:
        info = self._current_info()
        self.save(save_directory / FILE, info)
        self._hub_mixin_config = info.to_dict()

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> Any:
        from skipnet.models import weights

        path = Path(model_id) / FILE
        if not path.exists():
            path = download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return weights.load(path)[0]

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        info = self._current_info()
        results, architecture = info.results, info.architecture
        measured = "Not measured"
        if {"accuracy", "macs_fraction"} <= results.keys():
            measured = (
                f"As measured: {results['accuracy']:.2f} % on test images at "
                f"{100 * results['macs_fraction']:.1f} % of the dense multiply-adds"
            )
        height, width = info.image_size
        return ModelCard(
            _CARD.format(
                data=self._hub_mixin_info.model_card_data.to_yaml(),
                title=f"{architecture.name}, {architecture.gate or 'no'} gates",
                name=architecture.name,
                gate=architecture.gate,
                num_classes=architecture.num_classes,
                classes=", ".join(info.classes[:10]) + (" …" if len(info.classes) > 10 else ""),
                channels=architecture.in_channels,
                height=height,
                width=width,
                mean=_rounded(info.mean),
                std=_rounded(info.std),
                measured=measured,
                repo=kwargs.get("repo_id", "owner/name"),
            )
        )


def is_hub_id(name: str) -> bool:
    """Whether a name may be `owner/name` on the hub, and nothing in `runs` or a folder here."""
    owner = name.split("/")[0]
    return (
        bool(_HUB_ID.fullmatch(name)) and owner not in _NOT_ON_THE_HUB and not Path(owner).exists()
    )


def download(name: str, **options: Any) -> Path:
    """Fetch a model file from the hub, or from the local cache if it is there.

    Raises:
        UserError: When there is no such repository or file, it needs a login, or the hub cannot be
            reached.
    """
    with _hub_errors(lambda error: _explain(error, name)):
        return Path(hf_hub_download(name, FILE, **options))


@contextmanager
def _hub_errors(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Say what an error of the hub's client means; a defect of ours keeps its traceback.

    The client has dozens of unrelated types for its failures, and those of the library beneath it,
    which is another one before its version 1.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        client = type(error).__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests")
        if not client and not isinstance(error, OSError | ValueError):
            raise
        raise UserError(explain(error)) from error


def _explain_push(error: Exception) -> str:
    detail = " ".join(str(error).split())[:200]
    return f"nothing was pushed to the Hugging Face hub: {detail} (log in with `hf auth login`)"


def _explain(error: Exception, name: str) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    detail = " ".join(str(error).split())[:200]
    if "GatedRepoError" in kinds:
        return (
            f"{name} needs a login: accept its terms on its page, and log in with `hf auth login`"
        )
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return (
            f"there is no run or model file {name} here, and no model on the Hugging Face hub that "
            "you may read (skipnet list runs and skipnet list weights show what is here; log in "
            "with `hf auth login` if it is private)"
        )
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds:
        return (
            f"there is no run or model file {name} here, and the Hugging Face hub cannot be "
            "reached (skipnet list runs and skipnet list weights show what there is)"
        )
    if "EntryNotFoundError" in kinds:
        return f"{name} on the Hugging Face hub has no {FILE}: it is no network of skipnet's"
    if "RevisionNotFoundError" in kinds:
        return f"{name} on the Hugging Face hub has no such revision ({detail})"
    return f"{name} could not be downloaded from the Hugging Face hub: {detail}"


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
