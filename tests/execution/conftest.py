import functools
from collections.abc import Callable, Iterator

import pytest
from exported import SIZES, Exported, export_to, info_of, lively

from skipnet.execution import native
from skipnet.models.registry import Architecture


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs go to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        native.library.cache_clear()
        yield
    native.library.cache_clear()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """ResNet-20s by gate and name of the size, each exported when first asked for."""

    @functools.cache
    def export(gate: str | None, size: str = "odd") -> Exported:
        # One of them for images of one channel.
        channels, classes = (1, 3) if (gate, size) == ("rnn", "odd") else (3, 10)
        architecture = Architecture(
            name="cifar_resnet20", gate=gate, num_classes=classes, in_channels=channels
        )
        network = lively(architecture, SIZES[size])
        folder = tmp_path_factory.mktemp(f"{gate}-{size.replace(' ', '')}")
        return export_to(folder, network, info_of(architecture, SIZES[size]))

    return export
