"""Sources: every layout and column type that is read, and the message for each user's mistake."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from skipnet.data.images import ImageSet
from skipnet.data.sources import DataConfig, load, load_split, normalization
from skipnet.errors import UserError

ANIMALS = ("cat", "dog", "emu")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what datasets caches out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pixels(num_images: int, size: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [N, H, W, C], or [N, H, W] for one channel."""
    shape = (num_images, size, size, channels)[: 4 if channels > 1 else 3]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write(
    file: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    image: str = "img",
    label: str = "label",
    names: Sequence[str] | None = None,
    **more: Sequence[Any],
) -> None:
    """Writes a parquet file with a Hugging Face schema; class names if they are given."""
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=list(names or ()))}
    if names is None:
        features[label] = datasets.Value("string" if isinstance(labels[0], str) else "int64")
    data = {image: [None if i is None else {"bytes": i, "path": None} for i in images]}
    data[label] = list(labels)
    for column, values in more.items():
        data[column] = list(values)
        features[column] = datasets.Value("int64")
    file.parent.mkdir(parents=True, exist_ok=True)
    # The schema is stored by hand, as Dataset.to_parquet shows a progress bar.
    table = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    pq.write_table(table.data.table, file)


def write_plain(file: Path, **columns: Any) -> None:
    """Writes a parquet file without a Hugging Face schema."""
    pq.write_table(pa.table(columns), file)


def write_pair(folder: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Six training and three test images with labels 0, 1, 2, 0 …; returns their pixels."""
    train, test = pixels(6), pixels(3, seed=1)
    write(folder / "train.parquet", [png(i) for i in train], [0, 1, 2] * 2, **options)
    write(folder / "test.parquet", [png(i) for i in test], [0, 1, 2], **options)
    return train, test


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(name=str(folder), **options)


# ── digits ──


def test_digits() -> None:
    train, test = load(DataConfig())
    assert train.images.shape == (1437, 1, 8, 8) and test.images.shape == (360, 1, 8, 8)
    assert train.images.min() == 0 and train.images.max() == 255
    assert train.classes == tuple("0123456789")
    assert torch.bincount(test.labels).min() >= 34  # stratified: 34 to 37 of each
    again = load_split(DataConfig(), "test")
    assert torch.equal(again.images, test.images) and torch.equal(again.labels, test.labels)


def test_digits_in_another_shape() -> None:
    test = load_split(DataConfig(channels=3, image_size=12), "test")
    assert test.images.shape == (360, 3, 12, 12)


def test_digits_of_other_classes() -> None:
    with pytest.raises(UserError, match="same classes"):
        load_split(DataConfig(), "test", ANIMALS)


# ── parquet ──


def test_parquet_with_class_names(tmp_path: Path) -> None:
    train_pixels, test_pixels = write_pair(tmp_path, names=ANIMALS)
    train, test = load(config(tmp_path))
    assert torch.equal(train.images, channels_first(train_pixels))
    assert torch.equal(test.images, channels_first(test_pixels))
    assert train.labels.tolist() == [0, 1, 2] * 2 and test.labels.tolist() == [0, 1, 2]
    assert train.classes == test.classes == ANIMALS


def test_parquet_is_read_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path)
    load(config(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def test_integer_labels_name_themselves(tmp_path: Path) -> None:
    write_pair(tmp_path)
    assert load(config(tmp_path))[0].classes == ("0", "1", "2")


def test_classes_of_a_test_split_alone_come_from_the_training_labels(tmp_path: Path) -> None:
    bad = b"not an image"  # would stop the load if the training images were decoded
    write(tmp_path / "train.parquet", [bad] * 5, [0, 1, 2, 3, 4])
    write(tmp_path / "test.parquet", [png(i) for i in pixels(2)], [0, 1])
    assert load_split(config(tmp_path), "test").classes == ("0", "1", "2", "3", "4")


def test_training_split_alone_does_not_need_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [png(i) for i in pixels(2)], [0, 1])
    assert len(load_split(config(tmp_path), "train")) == 2


def test_given_classes_need_no_training_split(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [png(i) for i in pixels(2)], ["emu", "cat"])
    test = load_split(config(tmp_path), "test", ANIMALS)
    assert test.labels.tolist() == [2, 0] and test.classes == ANIMALS


def test_string_labels_are_sorted(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [png(i) for i in pixels(3)], ["emu", "cat", "dog"])
    write(tmp_path / "test.parquet", [png(i) for i in pixels(1)], ["dog"])
    train, test = load(config(tmp_path))
    assert train.classes == ANIMALS
    assert train.labels.tolist() == [2, 0, 1] and test.labels.tolist() == [1]


@pytest.mark.parametrize(
    "files",
    [
        ("train.parquet", "valid.parquet"),
        ("train-00000-of-00001.parquet", "val.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    ],
)
def test_layouts(tmp_path: Path, files: tuple[str, str]) -> None:
    for file in files:
        write(tmp_path / file, [png(i) for i in pixels(2)], [0, 1])
    train, test = load(config(tmp_path))
    assert len(train) == len(test) == 2


def test_several_files_are_one_split(tmp_path: Path) -> None:
    images = pixels(4)
    encoded = [png(i) for i in images]
    write(tmp_path / "train-0.parquet", encoded[:3], [0, 1, 2])
    write(tmp_path / "train-1.parquet", [encoded[3], b"broken"], [1, 1])
    with pytest.warns(UserWarning, match=r"left out 1 of 5 .*row 1 of .*train-1\.parquet"):
        train = load_split(config(tmp_path, on_bad_image="skip"), "train")
    assert torch.equal(train.images, channels_first(images))


def test_plain_columns_without_schema(tmp_path: Path) -> None:
    images = pixels(2)
    encoded = [png(i) for i in images]
    write_plain(tmp_path / "train.parquet", image=encoded, labels=[0, 1])
    nested = [{"bytes": i, "path": "x.png"} for i in encoded]
    write_plain(tmp_path / "test.parquet", image=nested, labels=[0, 1])
    train, test = load(config(tmp_path))
    assert torch.equal(train.images, channels_first(images))
    assert torch.equal(test.images, channels_first(images))


def test_image_given_by_path(tmp_path: Path) -> None:
    image = pixels(1)
    file = tmp_path / "x.png"
    file.write_bytes(png(image[0]))
    nested = [{"bytes": None, "path": str(file)}]
    write_plain(
        tmp_path / "train.parquet",
        image=pa.array(nested, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        label=[0],
    )
    assert torch.equal(load_split(config(tmp_path), "train").images, channels_first(image))


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [png(i) for i in pixels(2)], [0, 1], image="a", coarse=[1, 0])
    chosen = config(tmp_path, image_column="a", label_column="coarse")
    assert load_split(chosen, "train").labels.tolist() == [1, 0]


def test_fine_label_is_found(tmp_path: Path) -> None:
    encoded = [png(i) for i in pixels(2)]
    write(tmp_path / "train.parquet", encoded, [0, 1], label="fine_label", coarse_label=[0, 0])
    assert load_split(config(tmp_path), "train").labels.tolist() == [0, 1]


def test_bad_image_stops(tmp_path: Path) -> None:
    encoded = [png(i) for i in pixels(3)]
    write(tmp_path / "train.parquet", [encoded[0], b"broken", encoded[2]], [0, 1, 2])
    with pytest.raises(UserError, match=r"row 1 of .*train\.parquet: the image cannot be read"):
        load_split(config(tmp_path), "train")


def test_bad_images_are_skipped(tmp_path: Path) -> None:
    images = pixels(4)
    encoded = [png(i) for i in images]
    encoded[0] = b""
    encoded[2] = encoded[2][:-30]  # truncated
    write(tmp_path / "train.parquet", [*encoded, None], [0, 1, 2, 0, 1])
    with pytest.warns(UserWarning, match="left out 3 of 5 images"):
        train = load_split(config(tmp_path, on_bad_image="skip"), "train")
    assert torch.equal(train.images, channels_first(images)[[1, 3]])
    assert train.labels.tolist() == [1, 0]
    assert train.classes == ("0", "1", "2")


def test_sizes_differ(tmp_path: Path) -> None:
    encoded = [png(pixels(1, 6)[0]), png(pixels(1, 9)[0])]
    write(tmp_path / "train.parquet", encoded, [0, 1])
    with pytest.raises(UserError, match=r"row 1 .*9×9.*6×6.*image_size"):
        load_split(config(tmp_path), "train")
    train = load_split(config(tmp_path, image_size=6), "train")
    assert train.images.shape == (2, 3, 6, 6)
    assert torch.equal(train.images[0], channels_first(pixels(1, 6))[0])


def test_splits_of_different_size(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [png(pixels(1, 6)[0])], [0])
    write(tmp_path / "test.parquet", [png(pixels(1, 9)[0])], [0])
    with pytest.raises(UserError, match="training images are 6×6, test images 9×9"):
        load(config(tmp_path))


def test_grey_images(tmp_path: Path) -> None:
    grey = pixels(2, channels=1)
    write(tmp_path / "train.parquet", [png(i) for i in grey], [0, 1])
    write(tmp_path / "test.parquet", [png(i) for i in pixels(2)], [0, 1])
    train, test = load(config(tmp_path))
    assert train.images.shape == test.images.shape == (2, 1, 6, 6)
    assert torch.equal(train.images[:, 0], torch.from_numpy(grey))
    rgb = load_split(config(tmp_path, channels=3), "train")
    assert torch.equal(rgb.images, train.images.expand(2, 3, 6, 6))


def test_grey_image_among_colour_ones(tmp_path: Path) -> None:
    colour, grey = png(pixels(1)[0]), png(pixels(1, channels=1)[0])
    write(tmp_path / "train.parquet", [colour, grey], [0, 1])
    assert load_split(config(tmp_path), "train").images.shape == (2, 3, 6, 6)
    write(tmp_path / "test.parquet", [grey, colour], [0, 1])
    with pytest.raises(UserError, match=r"row 1 .*in colour, the first one is grey; set channels"):
        load_split(config(tmp_path), "test")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 3], ANIMALS, "row 1 of .* has label 3, outside the 3 classes"),
        ([0, None], ANIMALS, "row 1 of .* has no label"),
        ([0, -1], None, "row 1 of .* has label -1, outside the 1 classes"),
        (["a", None], None, "row 1 of .* has no label"),
    ],
)
def test_bad_labels(
    tmp_path: Path, labels: list[Any], names: tuple[str, ...] | None, message: str
) -> None:
    encoded = [png(i) for i in pixels(2)]
    if names and 3 in labels:  # datasets refuses to write such a label, other writers do not
        write(tmp_path / "good.parquet", encoded, [0, 1], names=names)
        table = pq.read_table(tmp_path / "good.parquet")
        table = table.set_column(1, table.schema.field(1), pa.array(labels))
        pq.write_table(table, tmp_path / "train.parquet")
    else:
        write(tmp_path / "train.parquet", encoded, labels, names=names)
    with pytest.raises(UserError, match=message):
        load_split(config(tmp_path), "train")


def test_no_labels_at_all(tmp_path: Path) -> None:
    encoded = [png(i) for i in pixels(2)]
    write_plain(tmp_path / "train.parquet", img=encoded, label=pa.array([None, None], pa.int64()))
    with pytest.raises(UserError, match="no row has a label"):
        load_split(config(tmp_path), "train")


def test_test_label_that_training_lacks(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [png(i) for i in pixels(2)], ["cat", "dog"])
    write(tmp_path / "test.parquet", [png(i) for i in pixels(1)], ["emu"])
    with pytest.raises(UserError, match=r"test\.parquet has label 'emu', outside the 2 classes"):
        load(config(tmp_path))


def test_splits_with_other_class_names(tmp_path: Path) -> None:
    encoded = [png(i) for i in pixels(2)]
    write(tmp_path / "train.parquet", encoded, [0, 1], names=["cat", "dog"])
    write(tmp_path / "test.parquet", encoded, [0, 1], names=["cat", "emu"])
    with pytest.raises(UserError, match="dog is in only one of them"):
        load(config(tmp_path))
    write(tmp_path / "test.parquet", encoded, [0, 1], names=["dog", "cat"])
    with pytest.raises(UserError, match="their order differs"):
        load(config(tmp_path))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [b"1"], "label": [0]}, {}, "no image_column found.*x, label"),
        ({"img": [b"1"], "x": [0]}, {}, "no label_column found.*img, x"),
        ({"img": [b"1"], "image": [b"1"], "label": [0]}, {}, "img, image; set image_column"),
        ({"img": [b"1"], "label": [0], "labels": [0]}, {}, "label, labels; set label_column"),
        ({"img": [b"1"], "label": [0]}, {"image_column": "x"}, "no column x; set image_column"),
        ({"img": [b"1"], "label": [0]}, {"label_column": "x"}, "no column x; set label_column"),
        ({"img": [[0.5]], "label": [0]}, {}, "does not hold encoded images"),
        ({"img": ["a.png"], "label": [0]}, {}, "does not hold encoded images"),
        ({"img": [b"1"], "label": [0.5]}, {}, "holds float64, not labels"),
        ({"img": [b"1"], "label": [[1]]}, {}, "holds .*, not labels"),
    ],
)
def test_wrong_columns(
    tmp_path: Path, columns: dict[str, list[Any]], options: dict[str, str], message: str
) -> None:
    write_plain(tmp_path / "train.parquet", **columns)
    with pytest.raises(UserError, match=message):
        load_split(config(tmp_path, **options), "train")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(content)


@pytest.mark.parametrize("break_file", [truncate, damage])
def test_corrupt_parquet_is_named(tmp_path: Path, break_file: Callable[[Path], None]) -> None:
    encoded = [png(i) for i in pixels(20)]
    write(tmp_path / "train-0.parquet", encoded, [0, 1] * 10)
    write(tmp_path / "train-1.parquet", encoded, [0, 1] * 10)
    break_file(tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet is not a readable parquet file") as e:
        load_split(config(tmp_path), "train")
    assert "\n" not in str(e.value)


def test_files_with_different_columns(tmp_path: Path) -> None:
    encoded = [png(i) for i in pixels(2)]
    write(tmp_path / "train-0.parquet", encoded, [0, 1])
    write(tmp_path / "train-1.parquet", encoded, [0, 1], label="other")
    with pytest.raises(UserError, match="cannot read") as e:
        load_split(config(tmp_path), "train")
    assert "\n" not in str(e.value)


def test_parquet_without_rows(tmp_path: Path) -> None:
    write_plain(
        tmp_path / "train.parquet", img=pa.array([], pa.binary()), label=pa.array([], pa.int64())
    )
    with pytest.raises(UserError, match="has no rows"):
        load_split(config(tmp_path), "train")


def test_ambiguous_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "train-0.parquet", [png(pixels(1)[0])], [0])
    with pytest.raises(UserError, match=r"several folders \(a, b\)"):
        load_split(config(tmp_path), "train")
    assert len(load_split(config(tmp_path / "a"), "train")) == 1


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load(config(tmp_path / "missing"))
    with pytest.raises(UserError, match="has no train split"):
        load(config(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="has neither parquet files nor folders"):
        load(config(tmp_path))
    file = tmp_path / "a.parquet"
    file.touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        load(config(file))
    write(tmp_path / "train.parquet", [png(pixels(1)[0])], [0])
    with pytest.raises(UserError, match="has no test or validation or valid or val split"):
        load(config(tmp_path))


# ── image folders ──


def write_folder(folder: Path, classes: Sequence[str]) -> np.ndarray:
    """Two images a class; returns their pixels in the order of the classes' names."""
    images = pixels(2 * len(classes))
    for index, name in enumerate(sorted(classes)):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            (folder / name / f"{i}.png").write_bytes(png(images[2 * index + i]))
    return images


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
def test_image_folder(tmp_path: Path, test_name: str) -> None:
    images = write_folder(tmp_path / "train", ["dog", "cat"])
    write_folder(tmp_path / test_name, ["cat"])
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / ".0.png").write_bytes(b"hidden")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    train, test = load(config(tmp_path))
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 0]
    assert torch.equal(train.images, channels_first(images))


def test_images_in_subfolders(tmp_path: Path) -> None:
    write_folder(tmp_path / "train" / "cat", ["images"])
    assert load_split(config(tmp_path), "train").classes == ("cat",)


def test_image_folder_with_another_test_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ["cat"])
    write_folder(tmp_path / "test", ["cat", "emu"])
    with pytest.raises(UserError, match=r"emu.0\.png has label 'emu', outside the 1 classes"):
        load(config(tmp_path))


def test_empty_class_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ["cat"])
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(UserError, match="dog has no images"):
        load_split(config(tmp_path), "train")


def test_bad_file_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ["cat"])
    (tmp_path / "train" / "cat" / "2.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2\.jpg: the image cannot be read \(not in an image form"):
        load_split(config(tmp_path), "train")
    with pytest.warns(UserWarning, match=r"left out 1 of 3 .*2\.jpg"):
        assert len(load_split(config(tmp_path, on_bad_image="skip"), "train")) == 2


# ── configuration, sets, normalisation ──


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name is empty"),
        ({"test_split": ""}, "test_split is empty"),
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 2}, "channels is 2"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'"),
        ({"padding": -1}, "padding is -1"),
        ({"mean": (0.5,)}, "only one of mean and std"),
        ({"mean": (0.5,), "std": (1.0, 1.0, 1.0)}, "mean has 1 and std 3 values"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "mean has 2 and std 2 values"),
        ({"mean": (0.5,), "std": (0.0,)}, "above 0"),
    ],
)
def test_invalid_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**options)


def image_set(num_images: int = 4, **changes: Any) -> ImageSet:
    images = channels_first(pixels(num_images))
    values = {"images": images, "labels": torch.arange(num_images) % 3, "classes": ANIMALS}
    return ImageSet(**(values | changes))


def test_image_set() -> None:
    whole = image_set()
    assert len(whole) == 4 and whole.shape == (3, 6, 6)
    assert torch.equal(whole.take(torch.tensor([2, 0])), whole.images[[2, 0]])


@pytest.mark.parametrize("label", [3, -1])
def test_image_set_with_a_label_outside_the_classes(label: int) -> None:
    with pytest.raises(UserError, match=f"row 2 has label {label}, outside the 3 classes"):
        image_set(labels=torch.tensor([0, 1, label, 0]))


def test_image_set_without_images() -> None:
    with pytest.raises(UserError, match="no images"):
        image_set(0)


def test_normalization_is_computed_per_channel() -> None:
    train = image_set(50)
    mean, std = normalization(DataConfig(), train)
    scaled = train.images.double() / 255
    np.testing.assert_allclose(mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std((0, 2, 3), correction=0), rtol=1e-12)


def test_normalization_as_configured() -> None:
    given = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert normalization(given, image_set()) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(UserError, match="mean and std have 1 values, the images 3 channels"):
        normalization(DataConfig(mean=(0.5,), std=(0.5,)), image_set())


def test_normalization_of_constant_images() -> None:
    images = channels_first(pixels(4)).clone()
    images[:, 1] = 77
    with pytest.raises(UserError, match=r"all pixels of channel 1 .* are the same"):
        normalization(DataConfig(), image_set(images=images))
