"""Every variant of source lists every image in a fixed order; what is damaged or ambiguous is refused or named."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from image_sets import UNREADABLE, WRITERS, add, encoded, image_files, write_image_shards, write_tree
from npp_ds.errors import UserError
from npp_ds.tokenizer.images import ImageReader, UnreadableImage, decode
from npp_ds.tokenizer.sources import load_images, open_source

IDS = [f"n{label:08d}" for label in range(10)]


@pytest.fixture(scope="module")
def files():
    return image_files()


@pytest.fixture(scope="module")
def sources(files, tmp_path_factory):
    return {variant: write(tmp_path_factory.mktemp(variant), files) for variant, write in WRITERS.items()}


@pytest.mark.parametrize("variant", WRITERS)
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_each_variant_is_found_and_lists_every_image_with_its_class(variant, asked, sources, files):
    source = open_source([sources[variant]], "train", variant=variant if asked == "named" else asked)
    assert source.variant == variant and source.num_classes == 10
    assert source.class_names == ([] if variant == "webdataset" else IDS)
    names = sorted(files)
    assert [item.label for item in source.items] == [int(name[1:9]) for name in names]
    keys = [name.rpartition(".")[0] for name in names]
    keys[names.index("n00000003/same.png")] = "n00000003/same-2"
    assert [item.key for item in source.items] == keys
    assert [item.size for item in source.items] == [len(files[name]) for name in names]
    assert source.bytes == source.describe()["bytes"] == sum(map(len, files.values()))


@pytest.mark.parametrize("variant", WRITERS)
def test_images_are_read_in_any_order_as_they_were_stored(variant, sources, files):
    names = sorted(files)
    order = [i for i in np.random.default_rng(0).permutation(len(names)) if files[names[i]]]
    items = open_source([sources[variant]], "train").items
    reader = ImageReader()
    assert [reader.read(items[i]) for i in order] == [files[names[i]] for i in order]


def test_a_folder_with_the_tar_of_tars_is_enough_whatever_else_is_in_it(sources, files, tmp_path):
    tar = sources["imagenet-tar"]
    for name in ("devkit", "val/n00000000"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / tar.name).symlink_to(tar)
    keys = [item.key for item in open_source([tar], "train").items]
    assert [item.key for item in open_source([tmp_path], "train").items] == keys
    write_tree(tmp_path, {"n00000000/x.png": files[min(files)]})
    assert open_source([tmp_path], "train").variant == "imagefolder"


def test_other_image_formats_in_class_folders_are_not_passed_over(tmp_path):
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    write_tree(tmp_path, {"a/x.BMP": encoded(pixels, "BMP"), "a/y.tif": encoded(pixels, "TIFF")})
    write_tree(tmp_path, {"a/notes.txt": b"text"})
    images, _ = load_images(open_source([tmp_path], "train"), 8)
    assert np.array_equal(images, [pixels, pixels])


def test_unreadable_images_give_reasons_that_are_the_same_each_time(sources):
    items = [item for item in open_source([sources["imagefolder"]], "train").items if item.where.endswith(UNREADABLE)]
    reader, reasons = ImageReader(), []
    for item in items * 2:
        with pytest.raises(UnreadableImage) as error:
            decode(reader.read(item))
        reasons.append(str(error.value))
    assert reasons[:3] == reasons[3:]
    assert "truncated" in reasons[0] and reasons[1] == "empty: 0 bytes" and "b'hello wo'" in reasons[2]
    assert not any("0x" in reason for reason in reasons)


def test_exif_rotation_is_left_alone_and_odd_modes_become_rgb():
    pixels = np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), pixels)
    grey = decode(encoded(pixels, "JPEG", "L"))
    assert grey.mode == "RGB" and (np.ptp(np.asarray(grey), axis=2) == 0).all()
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(buffer, "JPEG")
    assert np.abs(np.asarray(decode(buffer.getvalue()))[4, 4].astype(int) - (0, 255, 255)).max() <= 2


def test_an_image_too_long_to_crop_is_unreadable_and_takes_no_memory():
    buffer = io.BytesIO()
    Image.new("L", (60_000, 1)).save(buffer, "PNG")
    with pytest.raises(UnreadableImage, match="60000 x 1 pixels"):
        decode(buffer.getvalue())


def test_broken_links_are_listed_and_links_to_folders_followed(tmp_path, files):
    write_tree(tmp_path / "there", {"b/x.png": files[sorted(files)[-1]]})
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "b").symlink_to(tmp_path / "there" / "train" / "b")
    (tmp_path / "train" / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    (tmp_path / "train" / ".hidden").mkdir()
    source = open_source([tmp_path], "train")
    assert [(item.key, item.label) for item in source.items] == [("a/lost", 0), ("a/pipe", 0), ("b/x", 1)]
    assert source.class_names == ["a", "b"]
    for item, reason in zip(source.items, ("No such file", "not a plain file"), strict=False):
        with pytest.raises(UnreadableImage, match=reason):
            ImageReader().read(item)


def test_folders_of_other_splits_are_not_taken_for_classes(tmp_path, files):
    write_tree(tmp_path, {"a/x.png": b"1"})
    with pytest.raises(UserError, match="nor class folders, directly or under val/"):
        open_source([tmp_path], "val")
    (tmp_path / "train").rename(tmp_path / "Training")
    (tmp_path / "Valid").mkdir()
    with pytest.raises(UserError, match="nor class folders, directly or under val/"):
        open_source([tmp_path], "val")


def test_a_file_that_changed_after_listing_stops_the_run(tmp_path):
    write_tree(tmp_path, {"a/x.png": b"12345"})
    source = open_source([tmp_path], "train")
    (tmp_path / "train/a/x.png").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"x\.png: not the 5 bytes that were listed"):
        ImageReader().read(source.items[0])
    (tmp_path / "train/a/x.png").unlink()
    with pytest.raises(UserError, match=r"x\.png: could not be read \(No such file"):
        ImageReader().read(source.items[0])


@pytest.mark.parametrize("variant", ["imagenet-tar", "webdataset"])
def test_a_tar_cut_or_damaged_anywhere_is_refused_and_never_silently_shorter(variant, files, tmp_path):
    few = {name: files[name] for name in sorted(files)[:6] + sorted(files)[-4:]}
    path = WRITERS[variant](tmp_path, few)
    path = path if path.is_file() else path / "train-000000.tar"
    whole = path.read_bytes()
    used = len(whole.rstrip(b"\0"))
    for size in range(0, used + 512, 1536):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=path.name):
            open_source([path], "train", variant=variant)
    for at in [at for at in range(0, used, 512) if whole[at + 257 : at + 262] == b"ustar"]:
        path.write_bytes(whole[: at + 1] + bytes([whole[at + 1] ^ 1]) + whole[at + 2 :])
        with pytest.raises(UserError, match=path.name):
            open_source([path], "train", variant=variant)


def test_a_class_tar_that_ends_without_its_end_mark_is_refused(files, tmp_path):
    for content in (b"", tar_of_one(files[min(files)])[:-10_240]):
        with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
            add(outer, "n01.tar", content)
            add(outer, "n02.tar", tar_of_one(files[min(files)]))
        with pytest.raises(UserError, match=r"n01\.tar is cut short: n02\.tar reaches beyond it"):
            open_source([tmp_path], "train")


def tar_of_one(image: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        add(tar, "x.png", image)
    return content.getvalue()


def test_names_without_a_character_that_tar_readers_take_have_keys(tmp_path, files):
    write_tree(tmp_path, {f"猫/{name}.png": files[min(files)] for name in ("写真", "犬", "鳥")})
    assert [item.key for item in open_source([tmp_path], "train").items] == ["image", "image-2", "image-3"]


def test_used_up_memory_is_no_property_of_an_image(files, monkeypatch):
    def convert(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(MemoryError):
        decode(encoded(np.zeros((8, 8), np.uint8)))


def test_a_damaged_gzip_shard_is_refused(tmp_path, files):
    path = write_image_shards(tmp_path, files, shards=1) / "train-000000.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"train-000000\.tar\.gz: damaged"):
        open_source([tmp_path], "train")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    with pytest.raises(UserError, match=r"train-000000\.tar\.gz: (damaged|could not be read)"):
        load_images(open_source([tmp_path], "train"), 8)
    with gzip.open(path, "wb") as file:
        file.write(gzip.decompress(content))
    assert len(open_source([tmp_path], "train").items) == len(files)


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)


def test_repeated_keys_in_a_shard_keep_every_image(tmp_path):
    pair = (("x.png", b"1"), ("x.cls", b"3")), (("x.jpg", b"22"), ("x.cls", b"4")), (("x.jpg", b"333"), ("x.cls", b"4"))
    shard(tmp_path / "train-0.tar", *(member for sample in pair for member in sample))
    items = open_source([tmp_path], "train").items
    assert [(i.key, i.label, i.size) for i in items] == [("x", 3, 1), ("x-2", 4, 2), ("x-3", 4, 3)]


def test_a_sample_with_a_label_and_no_image_is_listed_as_unreadable(tmp_path):
    shard(
        tmp_path / "train-0.tar",
        ("info.json", b"{}"),
        ("x.json", b"{}"),
        ("x.cls", b"3"),
        ("y.webp", b"w"),
        ("y.cls", b"0"),
    )
    first, second = open_source([tmp_path], "train").items
    assert (first.key, first.label, second.key) == ("x", 3, "y")
    with pytest.raises(UnreadableImage, match="only json, cls found, and no image"):
        ImageReader().read(first)


def test_images_beside_the_class_tars_are_refused_because_their_class_is_unknown(tmp_path):
    shard(tmp_path / "ILSVRC2012_img_val.tar", ("ILSVRC2012_val_00000001.JPEG", b"x"))
    with pytest.raises(UserError, match="sort the images into class folders"):
        open_source([tmp_path], "val")


@pytest.mark.parametrize("form", ["{id}", "{id} name {n}, other", "{id}\tname {n}"])
def test_a_class_list_with_ids_gives_names(form, sources, tmp_path):
    text = "\n".join(form.format(id=label, n=n) for n, label in enumerate(IDS))
    (tmp_path / "list.txt").write_text(text)
    for variant in WRITERS:
        names = open_source([sources[variant]], "train", tmp_path / "list.txt").class_names
        assert names == [line[9:].strip() or line for line in text.splitlines()]


@pytest.mark.parametrize(
    "lines, message",
    [
        (IDS[:9], "lacks n00000009"),
        ([*IDS, "n00000010"], "lists n00000010, for which there is no class folder"),
        ([*IDS[1:], IDS[0]], "line 1 is n00000001, expected n00000000"),
        ([*IDS[:9], IDS[0]], "lists n00000000 twice"),
        ([*IDS[:9], "n99999999 odd"], "lists n99999999.*lacks n00000009"),
        (["one", "two"], "2 class names for 10 class folders"),
        ([], "empty"),
    ],
)
def test_a_class_list_that_disagrees_with_the_folders_is_refused_with_the_difference(lines, message, sources, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(lines))
    for variant in ("imagefolder", "imagenet-tar"):
        with pytest.raises(UserError, match=message):
            open_source([sources[variant]], "train", tmp_path / "list.txt")


def test_small_sets_are_loaded_whole_and_name_what_cannot_be_read(tmp_path, files):
    write_tree(tmp_path, files)
    with pytest.raises(UserError, match=r"cut\.JPEG: image file is truncated"):
        load_images(open_source([tmp_path], "train"), 32)
