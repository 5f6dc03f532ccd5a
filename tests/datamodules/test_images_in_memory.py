"""Views of images in memory are those of torchvision and timm, drawn by (seed, epoch, index) and nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms.v2 import functional

from microtune.datamodules import images_in_memory
from microtune.datamodules.images_in_memory import (
    ImagesInMemory,
    jittered,
    middle_views,
    normalized,
    random_boxes,
    random_views,
    resized_boxes,
)
from microtune.datamodules.reproducible_order import random_fractions

ADJUSTMENTS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
LAST = 1 - 2.0**-53


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def views_of(pixels, seed=0, epoch=1, indices=None, resolution=40):
    indices = np.arange(len(pixels)) if indices is None else np.array(indices)
    return random_views(pixels, np.full(len(pixels), epoch), indices, seed, resolution, white=255)


@pytest.fixture(scope="module")
def pixels():
    return (noise(64, 3, 32, 32) * 256).byte().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("white", [1, 255])
def test_jittered_is_torchvision_in_any_order(white):
    orders = torch.tensor(list(itertools.permutations(range(3))) * 10)
    before, factors = noise(60, 3, 9, 7), 0.6 + 0.8 * noise(60, 3, seed=1)
    after = jittered(before * white, factors, orders, white) / white
    clamped = torch.zeros(2)
    for image, changed, of_image, order in zip(before, after, factors, orders, strict=True):
        for kind in order:
            image = ADJUSTMENTS[kind](image, of_image[kind].item())
        torch.testing.assert_close(changed, image, rtol=0, atol=1e-6)
        clamped += torch.stack([(changed == 0).sum(), (changed == 1).sum()])
    assert clamped.min() > 0


@given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40), resolution=st.integers(1, 70))
def test_resized_boxes_are_torchvisions(data, height, width, resolution):
    images, boxes, mirrored = noise(3, 2, height, width), [], []
    for _ in images:
        tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        boxes.append([data.draw(st.integers(0, height - tall)), data.draw(st.integers(0, width - wide)), tall, wide])
        mirrored.append(data.draw(st.booleans()))
    parts = resized_boxes(images, torch.tensor(boxes), torch.tensor(mirrored), resolution)
    for image, box, flip, part in zip(images, boxes, mirrored, parts, strict=True):
        expected = functional.resized_crop(image, *box, [resolution, resolution])
        torch.testing.assert_close(part, expected.flip(-1) if flip else expected, rtol=0, atol=1e-5)


def box_by_box(draws, side_px):
    """The box of one image, in torchvision's words."""
    for try_ in range(10):
        area = side_px**2 * (0.08 + 0.92 * draws[try_])
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[10 + try_])
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= side_px and 0 < height <= side_px:
            return [int(draws[20] * (side_px - height + 1)), int(draws[21] * (side_px - width + 1)), height, width]
    return [0, 0, side_px, side_px]


@given(seed=st.integers(0, 2**32), side_px=st.integers(1, 64))
def test_random_boxes_are_drawn_as_torchvision_draws_them(seed, side_px):
    draws = random_fractions(seed, 0, np.arange(20), draws=22)
    assert random_boxes(draws, side_px).tolist() == [box_by_box(of_image, side_px) for of_image in draws]


@given(
    draws=st.lists(st.sampled_from([0.0, 0.5, 0.9, LAST]), min_size=22, max_size=22), side_px=st.sampled_from([8, 32])
)
def test_boxes_lie_in_the_image_at_the_edges_of_the_draws(draws, side_px):
    ((top, left, height, width),) = random_boxes(np.array([draws]), side_px)
    assert [top, left, height, width] == box_by_box(draws, side_px)
    assert min(top, left) >= 0
    assert min(height, width) > 0
    assert max(top + height, left + width) <= side_px


def test_box_is_the_whole_image_where_none_of_ten_fits():
    fits = [0.5] * 22
    misfits = [LAST] * 10 + [0.0] * 10 + [LAST] * 2
    only_the_last_fits = [LAST] * 9 + [0.0] + [0.0] * 9 + [0.5] + [0.0] * 2
    boxes = random_boxes(np.array([fits, misfits, only_the_last_fits]), side_px=32)
    assert boxes.tolist() == [[4, 4, 24, 24], [0, 0, 32, 32], [0, 0, 9, 9]]


def test_random_boxes_are_distributed_as_torchvisions():
    count = 3000
    ours = random_boxes(random_fractions(0, 0, np.arange(count), draws=22), side_px=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(3, 32, 32)
        theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    for of_both in (lambda box: box, lambda box: box**2, lambda box: box[:, 2:3] * box[:, 3:]):
        one, other = of_both(ours.astype(float)), of_both(np.array(theirs, dtype=float))
        error = np.sqrt((one.var(axis=0) + other.var(axis=0)) / count)
        assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 4 * error).all()


def test_random_views_do_not_depend_on_the_batch(pixels):
    together = views_of(pixels)
    chosen = [63, 5, 17]
    for indices in (chosen, [17], list(range(40))):
        assert torch.equal(views_of(pixels[indices], indices=indices), together[indices])


def test_random_views_differ_in_seed_epoch_and_index(pixels):
    same = pixels[:1].expand(8, -1, -1, -1)
    views = [*views_of(same), *views_of(same, seed=1), *views_of(same, epoch=2)]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 24
    assert torch.equal(views_of(same), torch.stack(views[:8]))


def test_random_views_have_the_range_of_pixels(pixels):
    views = views_of(pixels, resolution=128)
    assert (views.shape, views.dtype) == ((64, 3, 128, 128), torch.float32)
    assert views.min() >= 0
    assert views.max() <= 255 * (1 + 1e-6)


def test_random_views_draw_everything_as_often_as_timm(monkeypatch):
    """Half are mirrored, the factors uniform from 0.6 to 1.4, the orders equally frequent, and all independent."""
    seen = {}

    def note_colors(pixels, factors, order, white):
        seen.update(factors=factors, order=order, white=white)
        return pixels

    def note_boxes(pixels, boxes, mirrored, resolution):
        seen.update(boxes=boxes, mirrored=mirrored, resolution=resolution)
        return pixels

    monkeypatch.setattr(images_in_memory, "jittered", note_colors)
    monkeypatch.setattr(images_in_memory, "resized_boxes", note_boxes)
    count = 30_000
    views_of(torch.zeros(1, 3, 32, 32).expand(count, -1, -1, -1))
    assert (seen["white"], seen["resolution"]) == (255, 40)
    factors = seen["factors"].numpy()
    assert factors.min() >= 0.6 - 1e-6
    assert factors.max() <= 1.4 + 1e-6
    for column in factors.T:
        assert np.abs(np.histogram(column, 8, (0.6, 1.4))[0] - count / 8).max() < 4 * math.sqrt(count / 8)
    _, often = np.unique(seen["order"].numpy(), axis=0, return_counts=True)
    assert len(often) == 6
    assert np.abs(often - count / 6).max() < 4 * math.sqrt(count / 6)
    assert set(map(tuple, np.sort(seen["order"].numpy(), axis=1))) == {(0, 1, 2)}
    assert abs(seen["mirrored"].float().mean() - 0.5) < 4 * 0.5 / math.sqrt(count)
    boxes = random_boxes(random_fractions(0, 1, np.arange(count), draws=22), side_px=32)
    assert np.array_equal(seen["boxes"].numpy(), boxes)
    drawn = np.column_stack([factors, seen["order"][:, 0] == 0, seen["mirrored"], boxes[:, 0] - (32 - boxes[:, 2]) / 2])
    assert np.abs(np.corrcoef(drawn, rowvar=False) - np.eye(6)).max() < 4.5 / math.sqrt(count)


@pytest.mark.parametrize("resolution", [16, 32, 96, 128, 129, 224])
def test_middle_views_are_resize_and_center_crop(pixels, resolution):
    size = math.ceil(resolution / 0.875)
    views = middle_views(pixels[:4], np.zeros(4), np.arange(4), resolution)
    expected = functional.center_crop(functional.resize(pixels[:4].float(), [size]), [resolution])
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-3)
    # Pillow rounds to whole numbers after either axis
    for view, image in zip(views, pixels, strict=False):
        scaled = CenterCrop(resolution)(Resize(size)(Image.fromarray(image.permute(1, 2, 0).numpy())))
        assert (view.permute(1, 2, 0) - torch.from_numpy(np.array(scaled))).abs().max() <= 1.05


def test_view_takes_the_place_of_the_augmentation(pixels):
    """It is handed the epochs and the indices, and what it returns is normalised and, where it must, resized."""
    calls = []

    def view(images, epochs, indices):
        calls.append((epochs.tolist(), indices.tolist()))
        return 255 - images[:, :, :20, :20].float()

    half = ((0.5,), (0.5,))
    data = ImagesInMemory(pixels, torch.arange(64), 20, 255, half, view=view)
    images, labels = data.__getitems__([(3, 7), 5])
    assert calls == [([3, 0], [7, 5])]
    assert torch.equal(images, normalized(255 - pixels[[7, 5], :, :20, :20].float(), 255, half))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [7, 5]
    data.resolution = 40
    assert data[3, 7][0].shape == (3, 40, 40)


def test_views_leave_the_pixels_that_are_held_alone(pixels):
    held = pixels.float()
    before = held.clone()
    views_of(held)
    middle_views(held, np.zeros(64), np.arange(64), 40)
    assert torch.equal(held, before)
