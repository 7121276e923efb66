"""ImageNet's class list, and its validation tar with the labels in each of the usual files."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from image_sets import add, encoded, shipped_images
from npp_ds.errors import UserError
from npp_ds.tokenizer.images import decoded_images
from npp_ds.tokenizer.listing import wordnet_ids
from npp_ds.tokenizer.sources import open_source

IDS = ["n02099601", "n01440764", "n15075141", "n01440764"]  # of images 1 to 4
LABELS = {"n01440764": 0, "n02099601": 207, "n15075141": 999}
NAMES = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 5)]


def write_tar(folder: Path) -> Path:
    images, _ = shipped_images(4)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in (2, 0, 3, 1):  # in no particular order
            add(tar, f"{NAMES[i]}.JPEG", encoded(images[i], "JPEG"))
    return folder / "ILSVRC2012_img_val.tar"


def write_labels(folder: Path, form: str) -> Path:
    path = folder / "labels.txt"
    match form:
        case "devkit":
            savemat = pytest.importorskip("scipy.io").savemat
            numbers = {"n01440764": 450, "n02099601": 3, "n15075141": 12}
            rows = [(number, wordnet_id, "name", 0) for wordnet_id, number in numbers.items()]
            fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
            savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=fields)[:, None]})
            lines = [str(numbers[wordnet_id]) for wordnet_id in IDS]
        case "clsloc":
            (folder / "map_clsloc.txt").write_text("n02099601 3 x\nn15075141 12 y_z\nn01440764 450 tench\n")
            lines = ["3", "450", "12", "450"]
        case "ids":
            lines = IDS
        case "kaggle":
            lines = ["ImageId,PredictionString"]
            lines += [f"{n},{w} 85 1 499 272 {w} 3 4 5 6" for n, w in reversed(list(zip(NAMES, IDS, strict=True)))]
        case "valprep":
            lines = [f"mkdir -p {w}" for w in sorted(set(IDS))]
            lines += [f"mv {n}.JPEG {w}/" for n, w in zip(NAMES, IDS, strict=True)]
        case "caffe":
            lines = [f"{n}.JPEG {LABELS[w]}" for n, w in zip(NAMES, IDS, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", ["devkit", "clsloc", "ids", "kaggle", "valprep", "caffe"])
def test_the_validation_tar_is_listed_as_sorted_class_folders_whatever_file_has_its_labels(tmp_path, form):
    tar, labels = write_tar(tmp_path), write_labels(tmp_path, form)
    source = open_source([tar], "val", "imagenet", labels=labels)
    order = sorted(range(4), key=lambda i: (IDS[i], NAMES[i]))
    assert [item.key for item in source.items] == [f"{IDS[i]}/{NAMES[i]}" for i in order]
    assert [item.label for item in source.items] == [LABELS[IDS[i]] for i in order]
    assert (source.num_classes, source.class_names[207], source.variant) == (
        1000,
        "golden retriever",
        "imagenet-val-tar",
    )
    for (_, found), i in zip(decoded_images(source.items), order, strict=True):
        assert np.abs(np.asarray(found).astype(int) - shipped_images(4)[0][i]).mean() < 12
    assert open_source([tmp_path], "val", labels=labels).describe() == source.describe()


def test_labels_that_do_not_fit_are_one_line(tmp_path):
    tar = write_tar(tmp_path)
    for text, message in (
        ("n01440764\n" * 3, "3 lines for 4 images"),
        ("1\n" * 4, r"meta\.mat: reading it needs scipy|put one beside it"),
        ("tench\n" * 4, "begins with 'tench'"),
        (f"{NAMES[0]} n01440764\n", f"has no class for {NAMES[1]} \\(3 such images\\)"),
    ):
        (tmp_path / "labels.txt").write_text(text)
        with pytest.raises(UserError, match=message) as error:
            open_source([tar], "val", labels=tmp_path / "labels.txt")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="give the file of their labels"):
        open_source([tar], "val", variant="imagenet-tar")
    with tarfile.open(tmp_path / "other.tar", "w") as other:
        add(other, "a.JPEG", b"")
    with pytest.raises(UserError, match="--labels is for ILSVRC2012_img_val"):
        open_source([tmp_path / "other.tar"], "val", labels=tmp_path / "labels.txt")


def test_the_class_list_has_a_thousand_sorted_ids_with_different_names():
    ids = wordnet_ids()
    assert len(ids) == 1000 and ids == sorted(set(ids))
    text = (Path(__file__).parents[2] / "npp_ds/assets/imagenet_classes.txt").read_text().splitlines()
    names = [line.split(maxsplit=1)[1] for line in text]
    assert [names[i] for i in (0, 1, 88, 207, 279, 360, 387, 417, 980)] == [
        "tench", "goldfish", "macaw", "golden retriever", "Arctic fox", "otter", "lesser panda", "balloon", "volcano",
    ]  # fmt: skip
    assert [name for name in names if names.count(name) > 1] == ["crane", "crane"], "a bird and a machine"
