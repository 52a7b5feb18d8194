"""Crops of ImageNet's kind, by torchvision: at random for training, the centre for testing."""

import torch
from PIL import Image
from torchvision.transforms import v2

from skipnet.data.decode import Crop


def centre_crop(resize: int, image_size: int) -> Crop:
    """Resizes the shorter side to `resize` pixels and cuts `image_size` pixels out of the centre.

    Bilinear, as the published ImageNet accuracies are measured (with 256 and 224).
    """
    whole = v2.Compose([v2.Resize(resize), v2.CenterCrop(image_size)])

    def crop(image: Image.Image) -> Image.Image:
        cropped: Image.Image = whole(image)
        return cropped

    return crop


def random_resized_crop(image_size: int, seed: int) -> Crop:
    """Cuts out 8 to 100 % of the area in a ratio of 3:4 to 4:3 and resizes it (GoogLeNet's crop).

    Args:
        image_size: Pixels of height and width.
        seed: The crop is a function of it and of the image's size alone; torch's generator is
            as it was afterwards.
    """
    draw = v2.RandomResizedCrop(image_size)

    def crop(image: Image.Image) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            cropped: Image.Image = draw(image)
        return cropped

    return crop
