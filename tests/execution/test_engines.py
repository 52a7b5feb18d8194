"""The portable file and the engine decide and compute as masked execution does."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import skipnet
from skipnet.models.registry import Architecture

pytestmark = pytest.mark.slow


def test_portable_and_optimized_agree_with_masked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = Architecture(name="cifar_resnet20", gate="ff2")
    network = architecture.build().eval()
    info = skipnet.ModelInfo(
        architecture=architecture,
        classes=tuple("0123456789"),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        image_size=(16, 16),
    )
    skipnet.export(network, tmp_path / "model.onnx", info)
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        expected, routing = network(images)
    for optimize in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Without a C compiler the portable file is run.
            session = skipnet.InferenceSession(
                tmp_path / "model.onnx", threads=2, optimize=optimize
            )
        logits, decided = session.run(images.numpy())
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4, rtol=1e-4)
        assert np.array_equal(decided.decisions, routing.executed.numpy())
