"""Files of statistics or images that are empty, damaged or huge are refused in one line."""

import io
import os
import zipfile

import numpy as np
import pytest

from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import recorded_extractor
from npp_ds.evaluation.images import open_images


def archive(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as members:
        members.writestr(name, content)
    return file.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def claims(size: int, content: bytes) -> bytes:
    """An archive whose directory says that its only member has `size` bytes."""
    at = content.rindex(b"PK\x01\x02") + 24
    return content[:at] + size.to_bytes(4, "little") + content[at + 4 :]


CASES = {
    "empty": b"",
    "no archive": b"PK\x05\x06",
    "empty member": archive("arr_0.npy", b""),
    "huge shape": archive("arr_0.npy", header("(10**30, 1, 1, 3)")),
    "huge length": archive("arr_0.npy", header("(1000000000000, 256, 256, 3)")),
    "negative shape": archive("arr_0.npy", header("(-1, 2, 2, 3)") + bytes(12)),
    "deep header": archive("arr_0.npy", header("(" * 4000)),
    "pickle": archive("arr_0.npy", header("(1,)").replace(b"|u1", b"|O ")),
    "compressed": archive("arr_0.npy", header("(9999999999, 1, 1, 3)"), zipfile.ZIP_DEFLATED),
    "other compression": archive("arr_0.npy", b"1" * 99, zipfile.ZIP_DEFLATED).replace(b"\x08\x00", b"\x63\x00"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_archive_is_a_user_error(tmp_path, case):
    path = tmp_path / "bad.npz"
    path.write_bytes(CASES[case])
    with pytest.raises(UserError, match=f"^{path}: "):
        open_images(path)


@pytest.mark.parametrize("name", ["mu", "metadata"])
def test_statistics_that_are_no_arrays_are_a_user_error(tmp_path, name):
    path = tmp_path / "bad.npz"
    for content in (b"", archive(f"{name}.npy", b"")[:-3], archive("metadata.npy", header("(9999999999,)"))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: no readable .npz file"):
            recorded_extractor(path)
    path.write_bytes(claims(0xFFFFFFF0, archive("metadata.npy", header("(1,)"), zipfile.ZIP_DEFLATED)))
    with pytest.raises(UserError, match=r"metadata has 4,294,967,280 bytes, expected at most 1,073,741,824"):
        recorded_extractor(path)
    path.unlink()
    os.mkfifo(path)
    for read in (recorded_extractor, open_images):
        with pytest.raises(UserError, match=r"[Nn]ot a regular file|a pipe or a device"):
            read(path)


def test_compressed_images_are_read_as_before(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    np.testing.assert_array_equal(next(open_images(tmp_path / "images.npz").batches(3)), images)
