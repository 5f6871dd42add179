"""ImageNet-style folders and Parquet files: read lazily and alike, and what is missing or broken is
named."""

import pytest
import torch

import thermo_opt as to
from analysis import tasks
from analysis.images import crop_and_flip, open_images


def test_folders_and_parquet_hold_the_same_images(folders, parquet):
    (folders / "train" / "n0" / "oblong.png").unlink()
    in_folders, in_files = (
        open_images(folders, ("train",), 32, ""),
        open_images(parquet, ("train",), 32, ""),
    )
    assert len(in_folders) == len(in_files) == 48
    assert in_folders.classes == ["n0", "n1", "n2"]
    x, y = in_files.batch(torch.tensor([0, 25, 47]))
    assert y.tolist() == [0, 1, 2]
    assert (x.mean((2, 3)).argmax(1) == y).all()  # the colour that the fixture gave each class
    names = [name.rsplit("/")[-1] for name in in_folders.names]
    rows = torch.tensor([names.index(f"{i:03d}.jpg") for i in (0, 25, 47)])
    assert torch.equal(in_folders.batch(rows)[0], x)


def test_images_of_another_shape_are_scaled_and_cropped_and_grey_ones_get_three_channels(folders):
    images = open_images(folders, ("train",), 16, "")
    row = next(i for i, name in enumerate(images.names) if name.endswith("oblong.png"))
    x, _ = images.batch(torch.tensor([row]))
    assert x.shape == (1, 3, 16, 16)
    assert x.flatten().tolist() == pytest.approx([200 / 255] * 768)


def test_nothing_is_decoded_before_it_is_asked_for(folders):
    broken = folders / "train" / "n1" / "001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    images = open_images(folders, ("train",), 32, "")
    rows = [i for i, name in enumerate(images.names) if name != str(broken)]
    images.batch(torch.tensor(rows))
    with pytest.raises(to.InputError, match=r"n1/001\.jpg is no readable image"):
        images.batch(torch.arange(len(images)))


def test_a_corrupt_image_in_parquet_is_named_by_file_and_row(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [{"bytes": b"no image", "path": "x.jpg"}, {"bytes": None, "path": "y.jpg"}]
    parquet.write_table(arrow.table({"img": rows, "label": [0, 1]}), tmp_path / "train.parquet")
    images = open_images(tmp_path, ("train",), 8, "")
    for row in (0, 1):
        with pytest.raises(
            to.InputError, match=rf"train\.parquet, row group 0, row {row} is no readable image"
        ):
            images.batch(torch.tensor([row]))


@pytest.mark.parametrize("task", ["cifar10", "imagenet"])
def test_a_missing_folder_says_where_to_get_the_data_and_in_which_layout(task, tmp_path):
    with pytest.raises(
        to.InputError,
        match=r"nowhere holds no images.*train/<class>/\*\.jpg.*parquet.*https?://.*--data",
    ):
        getattr(tasks, task)(0, tmp_path / "nowhere")


def test_a_missing_text_says_where_to_get_one(tmp_path):
    with pytest.raises(to.InputError, match=r"does not exist.*https://"):
        tasks.transformer(0, tmp_path / "nowhere.txt")


def test_parquet_that_can_not_serve_is_refused(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    file = tmp_path / "train.parquet"
    parquet.write_table(arrow.table({"picture": [b""], "label": [0]}), file)
    with pytest.raises(to.InputError, match="columns picture, label: it needs image"):
        open_images(tmp_path, ("train",), 8, "")
    parquet.write_table(arrow.table({"image": [{"bytes": b""}], "label": [-1]}), file)
    with pytest.raises(to.InputError, match="class numbers from 0"):
        open_images(tmp_path, ("train",), 8, "")
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(to.InputError, match=r"train\.parquet can't be read as Parquet"):
        open_images(tmp_path, ("train",), 8, "")


def test_a_class_that_is_only_tested_on_is_refused(folders):
    (folders / "val" / "other").mkdir()
    with pytest.raises(to.InputError, match="val/other: no images of this class"):
        tasks.imagenet(0, folders, probe=4, validation=4, width=4, size=32)


def test_augmentation_shifts_and_mirrors_and_depends_on_the_generator_alone():
    x = torch.rand(64, 3, 8, 8)
    once, again = (crop_and_flip(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    unmoved = crop_and_flip(x, torch.Generator().manual_seed(0), padding=0)
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(unmoved, x, strict=True)]
    assert all(bool(torch.equal(a, b)) or m for a, b, m in zip(unmoved, x, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48
    inside = crop_and_flip(torch.ones(32, 3, 8, 8), torch.Generator().manual_seed(1))
    assert inside.sum((1, 2, 3)).min() < 192  # something was shifted out
    assert set(inside.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("layout", ["folders", "parquet"])
def test_the_imagenet_task_trains_on_either_layout_and_keeps_its_parts_apart(layout, request):
    folder = request.getfixturevalue(layout)
    task = tasks.imagenet(0, folder, probe=6, validation=8, width=4, size=32, classes=2)
    assert task.probe[0].shape == (6, 3, 32, 32)
    assert set(task.probe[1].tolist()) <= {0, 1}

    def first(seed):
        return next(task.train(8, torch.Generator().manual_seed(seed)))[0]

    assert task.model(first(0)).shape == (8, 2)
    assert sum(len(labels) for _, labels in task.test()) == 12
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert len(task.validation[1]) == 8


def test_digits_parts_are_drawn_within_each_class_and_do_not_overlap():
    task = tasks.digits(0)
    x, _ = next(task.train(0, torch.Generator().manual_seed(0)))
    assert (len(x), len(task.probe[1]), len(task.validation[1])) == (1257, 360, 180)
    rows = torch.cat([x, task.probe[0], task.validation[0]])
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) > 1790  # the data set has no more than a few twins
    for _, labels in (task.probe, task.validation):
        share = torch.bincount(labels, minlength=10) / len(labels)
        assert (share - 0.1).abs().max() < 0.01
