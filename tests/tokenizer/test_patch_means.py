"""The images of a set that `npp report` shows as patches of codes."""

import numpy as np
import pytest

from image_sets import save_tiny_tokenizer
from npp_ds.data.store import stage
from npp_ds.errors import UserError
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.contents import decode, decode_patch_means, evenly_spaced_codes
from shard_sets import write_set


def test_evenly_spaced_codes_are_center_crops_from_the_shards_or_their_staged_copy(tmp_path):
    codes, _ = write_set(tmp_path / "set", 120, 3)
    for _ in range(2):
        manifest, found = evenly_spaced_codes(tmp_path / "set", tmp_path / "cache", 4)
        assert np.array_equal(found, codes[[0, 39, 79, 119], manifest.crops.center])
        assert len(evenly_spaced_codes(tmp_path / "set", tmp_path / "cache", 500)[1]) == 120
        stage(tmp_path / "set", tmp_path / "cache")
    with pytest.raises(UserError, match="not on this machine"):
        evenly_spaced_codes(tmp_path / "none", tmp_path / "cache", 4)


def test_patch_means_replace_the_vectors_of_a_patch_by_their_mean(tmp_path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path / "vq.safetensors"))
    codes = np.random.default_rng(0).integers(0, 64, (2, 64))
    assert np.array_equal(decode_patch_means(tokenizer, codes, 1), decode(tokenizer, codes))
    alike = np.repeat(np.repeat(codes[:, :16].reshape(2, 4, 4), 2, 1), 2, 2).reshape(2, 64)
    assert np.array_equal(decode_patch_means(tokenizer, alike, 2), decode(tokenizer, alike))
    swapped = codes.reshape(2, 4, 2, 4, 2)[:, :, ::-1, :, ::-1].reshape(2, 64)
    found, same = decode_patch_means(tokenizer, codes, 2), decode_patch_means(tokenizer, swapped, 2)
    assert np.abs(found.astype(int) - same).max() <= 1 and not np.array_equal(found, decode(tokenizer, codes))
