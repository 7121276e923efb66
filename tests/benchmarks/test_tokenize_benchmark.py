"""What is compared does the same work."""

import numpy as np
import torch

from benchmarks import tokenize as benchmark


def test_both_ways_of_tokenizing_give_the_encoder_the_same_crops_in_the_same_order(tmp_path):
    source = benchmark.write_images(tmp_path / "images", 5)
    seen: list[torch.Tensor] = []

    class Recorder(benchmark.NullTokenizer):
        def encode(self, images, precision="fp32"):
            seen.append(images.clone())
            return super().encode(images)

    benchmark.published_way(tmp_path / "images" / "train", tmp_path / "published", Recorder().encode, workers=0)
    published = torch.cat(seen)
    seen.clear()
    benchmark.this_way(source, Recorder(), tmp_path / "here", workers=0, crop_batch_size=20)
    here = torch.cat(seen)[: len(published)]
    assert published.shape == here.shape == (50, 3, 256, 256)
    assert (published - here).abs().max() < 1e-6
    assert len(list((tmp_path / "published").glob("*.npy"))) == 10
    assert np.load(tmp_path / "published" / "0_codes.npy").shape == (1, 10, 256)
