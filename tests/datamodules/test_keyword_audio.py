"""Spectrograms are those of a device; their augmentation follows from (seed, epoch, index) and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import melscale_fbanks

from microtune.datamodules.decoded_audio import decode_clips
from microtune.datamodules.keyword_audio import (
    CLIP_SAMPLES,
    DRAW_LIMIT,
    DRAWS,
    LOG_MEL_MEAN,
    LOG_MEL_STD,
    SILENCE_POWER,
    KeywordClips,
    KeywordFrontEnd,
    join_recordings,
    masked,
    shifted_in_time,
)
from microtune.datamodules.reproducible_order import data_loader
from microtune.datamodules.spectrogram_shape import spectrogram_shape
from microtune.modules.user_error import UserError

FRACTIONS = st.floats(0, 1, exclude_max=True, width=32)
LAST = np.nextafter(np.float32(1), np.float32(0))  # the largest that can be drawn


@pytest.fixture(scope="module")
def clips():
    """Seven clips: noise that is louder and louder, and the last one silent."""
    random = np.random.default_rng(0)
    loudness = np.array([3, 30, 300, 1000, 3000, 10_000, 0])[:, None]
    return np.clip(random.normal(size=(7, CLIP_SAMPLES)) * loudness, -32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def recordings():
    """Three seconds of noise."""
    return np.random.default_rng(1).integers(-2000, 2000, 3 * CLIP_SAMPLES).astype(np.int16)


def batch_of(clips, draws=None):
    batch = torch.from_numpy(np.ascontiguousarray(clips)), torch.arange(len(clips))
    if draws is None:
        return batch
    return *batch, torch.as_tensor((np.asarray(draws, np.float64) * DRAW_LIMIT).astype(np.int32))


def uniform(count, seed=0):
    return np.random.default_rng(seed).random((count, DRAWS), np.float32)


def middle(count):
    """Draws that leave a clip in its place, without noise (at a fraction below 0.9) and masks."""
    draws = np.zeros((count, DRAWS), np.float32)
    draws[:, 0] = 0.5
    draws[:, 1] = 0.9
    return draws


def mixed_by(front_end, clips, draws):
    """The waveforms that a front end makes spectrograms of."""
    seen = []
    hook = front_end.mel.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    front_end(batch_of(clips, draws))
    hook.remove()
    return seen[0].numpy()


def slow_spectrogram(clip, n_mels, hop_ms):
    window = np.zeros(512)
    window[16:496] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(480) / 480)
    hop = 16 * hop_ms
    frames = [clip[start : start + 512] / 32768 for start in range(0, CLIP_SAMPLES - 511, hop)]
    power = abs(np.fft.rfft(np.array(frames) * window)) ** 2
    bands = melscale_fbanks(257, 125.0, 7500.0, n_mels, 16_000).double().numpy()
    return (np.log(power @ bands + SILENCE_POWER) - LOG_MEL_MEAN) / LOG_MEL_STD


def slow_stripe(size, draws, widest):
    width = int(np.float32(draws[0]) * np.float32(min(widest, size) + 1))
    start = int(np.float32(draws[1]) * np.float32(size - width + 1))
    return slice(start, start + width)


def test_the_default_is_97_frames_of_40_bands(clips):
    spectrograms, labels = KeywordFrontEnd()(batch_of(clips))
    assert spectrograms.shape == (7, 1, 97, 40)
    assert spectrograms.dtype == torch.float32
    assert labels.tolist() == list(range(7))
    assert spectrogram_shape(40, 10) == (1, 97, 40)


@settings(max_examples=40, deadline=None)
@given(n_mels=st.integers(8, 80), hop_ms=st.integers(5, 100), count=st.integers(1, 3), augmented=st.booleans())
def test_the_shape_that_is_promised_is_the_one_that_is_given(clips, n_mels, hop_ms, count, augmented):
    batch = batch_of(clips[:count], uniform(count) if augmented else None)
    spectrograms, _ = KeywordFrontEnd(n_mels, hop_ms)(batch)
    assert spectrograms.shape == (count, *spectrogram_shape(n_mels, hop_ms))
    assert spectrograms.isfinite().all()


@pytest.mark.filterwarnings("error")
def test_no_band_is_empty():
    for n_mels in range(8, 81):
        assert KeywordFrontEnd(n_mels).mel.mel_scale.fb.any(dim=0).all()


@pytest.mark.parametrize(("n_mels", "hop_ms"), [(40, 10), (8, 20), (80, 5), (49, 100), (23, 7)])
def test_spectrograms_equal_a_slow_computation(clips, n_mels, hop_ms):
    spectrograms, _ = KeywordFrontEnd(n_mels, hop_ms)(batch_of(clips))
    expected = np.stack([slow_spectrogram(clip, n_mels, hop_ms) for clip in clips])
    np.testing.assert_allclose(spectrograms[:, 0].numpy(), expected, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("augmented", [False, True])
def test_spectrograms_on_a_gpu_are_those_of_a_cpu(clips, recordings, augmented):
    batch = batch_of(clips, uniform(7) if augmented else None)
    on_cpu, labels = KeywordFrontEnd(noise=recordings)(batch)
    on_gpu, labels_there = KeywordFrontEnd(noise=recordings)(tuple(part.cuda() for part in batch))
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-3)
    assert torch.equal(labels_there.cpu(), labels)


def test_a_tone_is_in_its_band_at_its_time():
    clip = np.zeros(CLIP_SAMPLES)
    clip[8000:12_000] = 10_000 * np.sin(2 * np.pi * 1000 * np.arange(4000) / 16_000)
    spectrogram = KeywordFrontEnd()(batch_of(clip[None].astype(np.int16)))[0][0, 0]
    centres = 700 * (10 ** (np.linspace(*2595 * np.log10(1 + np.array([125, 7500]) / 700), 42)[1:-1] / 2595) - 1)
    assert (spectrogram[52:72].argmax(dim=1) == abs(centres - 1000).argmin()).all()
    silence = (np.log(SILENCE_POWER) - LOG_MEL_MEAN) / LOG_MEL_STD
    np.testing.assert_allclose(spectrogram[:46], silence, rtol=1e-5)
    np.testing.assert_allclose(spectrogram[76:], silence, rtol=1e-5)


def test_true_speech_is_normalised(shared_data):
    paths = sorted((shared_data / "SpeechCommands/speech_commands_v0.02").glob("[a-z]*/*.wav"))[::20]
    clips, _ = decode_clips(paths)
    spectrograms, _ = KeywordFrontEnd()(batch_of(clips))
    assert abs(spectrograms.mean()) < 0.1
    assert 0.9 < spectrograms.std() < 1.1


def test_evaluation_repeats_itself_whatever_was_trained_on_between(clips, recordings):
    front_end = KeywordFrontEnd(noise=recordings)
    first, _ = front_end(batch_of(clips))
    state = torch.get_rng_state()
    front_end(batch_of(clips, uniform(7)))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(front_end(batch_of(clips))[0], first)
    assert torch.equal(KeywordFrontEnd()(batch_of(clips))[0], first)
    assert torch.equal(front_end.eval()(batch_of(clips))[0], first)


def test_the_batch_is_left_as_it_is(clips, recordings):
    batch = batch_of(clips, uniform(7))
    before = [part.clone() for part in batch]
    KeywordFrontEnd(noise=recordings, noise_fraction=1)(batch)
    assert all(torch.equal(part, was) for part, was in zip(batch, before, strict=True))


def test_nothing_in_it_is_trained(clips):
    front_end = KeywordFrontEnd()
    assert list(front_end.parameters()) == []
    assert not front_end(batch_of(clips))[0].requires_grad


@pytest.mark.parametrize("keys", [[(3, 0), (3, 5)], [(3, 5)], [(0, 1), (3, 5), (4, 5), (3, 2), (3, 5)], None])
def test_augmentation_does_not_depend_on_the_batch(clips, recordings, keys):
    data = KeywordClips(clips, np.arange(7), np.arange(7), seed=5)
    front_end = KeywordFrontEnd(noise=recordings, noise_fraction=1)
    alone = front_end(data.__getitems__([(3, 5)]))[0][0]
    if keys is None:  # asked for by itself
        batch = tuple(part[None] for part in data[3, 5])
        keys = [(3, 5)]
    else:
        batch = data.__getitems__(keys)
    spectrograms, labels = front_end(batch)
    assert labels.tolist() == [index for _, index in keys]
    for key, spectrogram in zip(keys, spectrograms, strict=True):
        assert torch.allclose(spectrogram, alone, atol=1e-4) == (key == (3, 5))


def test_augmentation_differs_in_seed_epoch_and_index(clips, recordings):
    same = np.repeat(clips[4:5], 7, axis=0)
    front_end = KeywordFrontEnd(noise=recordings, noise_fraction=1)
    seen = set()
    for seed in range(3):
        data = KeywordClips(same, np.arange(7), np.arange(7), seed)
        for epoch in range(3):
            spectrograms, _ = front_end(data.__getitems__([(epoch, index) for index in range(7)]))
            seen |= {spectrogram.numpy().tobytes() for spectrogram in spectrograms}
            again, _ = front_end(data.__getitems__([(epoch, index) for index in range(7)]))
            assert torch.equal(spectrograms, again)
    assert len(seen) == 3 * 3 * 7


def test_draws_that_change_nothing(clips, recordings):
    plain, _ = KeywordFrontEnd()(batch_of(clips))
    assert torch.equal(KeywordFrontEnd(noise=recordings)(batch_of(clips, middle(7)))[0], plain)


@settings(max_examples=30, deadline=None)
@given(draws=st.lists(FRACTIONS, min_size=1, max_size=6), samples=st.integers(1, 50), farthest=st.integers(0, 60))
def test_shifted_in_time_equals_a_slow_computation(draws, samples, farthest):
    waveforms = torch.arange(1.0, len(draws) * samples + 1).view(len(draws), samples)
    shifted = shifted_in_time(waveforms, torch.tensor(draws), farthest)
    for draw, before, after in zip(draws, waveforms, shifted, strict=True):
        start = int(np.float32(draw) * np.float32(2 * farthest + 1))
        assert 0 <= start <= 2 * farthest
        padded = [0.0] * farthest + before.tolist() + [0.0] * farthest
        assert after.tolist() == padded[start : start + samples]


def test_silence_enters_from_either_side(clips):
    waveforms = torch.ones(3, CLIP_SAMPLES)
    late, same, early = shifted_in_time(waveforms, torch.tensor([0, 0.5, LAST]), farthest=1600)
    assert not late[:1600].any()
    assert late[1600:].all()
    assert torch.equal(same, waveforms[1])
    assert early[:-1600].all()
    assert not early[-1600:].any()


@pytest.mark.parametrize("shift_ms", [0, 1, 100, 1000])
def test_clips_are_moved_by_no_more_than_shift_ms(clips, shift_ms):
    draws = np.tile(middle(1), (3, 1))
    draws[:, 0] = 0, 0.5, LAST
    waveforms = mixed_by(KeywordFrontEnd(shift_ms=shift_ms), clips[[4, 4, 4]], draws)
    clip, moved = clips[4] / np.float32(32768), 16 * shift_ms
    expected = np.pad(clip, moved)
    assert (waveforms[0] == expected[:CLIP_SAMPLES]).all()
    assert (waveforms[1] == clip).all()
    assert (waveforms[2] == expected[2 * moved :]).all()


@settings(max_examples=50, deadline=None)
@given(
    draws=st.lists(st.tuples(FRACTIONS, FRACTIONS), min_size=1, max_size=5),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dim=st.sampled_from([1, 2]),
    widest=st.integers(0, 14),
)
def test_masked_equals_a_slow_computation(draws, shape, dim, widest):
    spectrograms = torch.arange(1.0, len(draws) * shape[0] * shape[1] + 1).view(len(draws), *shape)
    before = spectrograms.clone()
    after = masked(spectrograms, torch.tensor(draws), dim, widest)
    assert torch.equal(spectrograms, before)
    for pair, was, became in zip(draws, before, after, strict=True):
        stripe = slow_stripe(shape[dim - 1], pair, widest)
        assert 0 <= stripe.start <= stripe.stop <= shape[dim - 1]
        assert stripe.stop - stripe.start <= widest
        expected = was.numpy().copy()
        expected[(stripe, slice(None)) if dim == 1 else (slice(None), stripe)] = 0
        assert (became.numpy() == expected).all()


@pytest.mark.parametrize("dim", [1, 2])
def test_masks_of_every_width_come_everywhere(dim):
    draws = torch.from_numpy(np.random.default_rng(0).random((4000, 2), np.float32))
    after = masked(torch.ones(4000, 10, 10), draws, dim, widest=3)
    stripes = (after == 0).all(dim=3 - dim)
    widths = stripes.sum(dim=1)
    assert abs(widths.bincount() - 1000).max() < 150
    places = stripes[widths == 3].float().argmax(dim=1)
    assert places.unique().tolist() == list(range(8))


@pytest.mark.parametrize("masks", [0, 1, 2])
@pytest.mark.parametrize(("hop_ms", "time_mask_ms", "mel_mask"), [(10, 100, 5), (20, 500, 40), (10, 0, 0), (20, 19, 1)])
def test_masks_of_the_front_end(clips, masks, hop_ms, time_mask_ms, mel_mask):
    draws = uniform(7)
    arguments = {"hop_ms": hop_ms, "time_mask_ms": time_mask_ms, "mel_mask": mel_mask}
    plain, _ = KeywordFrontEnd(masks=0, **arguments)(batch_of(clips, draws))
    expected = plain.numpy().copy()
    for row, spectrogram in zip(draws, expected[:, 0], strict=True):
        for mask in range(masks):
            in_time, in_mel = row[4 + 4 * mask : 6 + 4 * mask], row[6 + 4 * mask : 8 + 4 * mask]
            spectrogram[slow_stripe(len(spectrogram), in_time, time_mask_ms // hop_ms)] = 0
            spectrogram[:, slow_stripe(40, in_mel, mel_mask)] = 0
    augmented, _ = KeywordFrontEnd(masks=masks, **arguments)(batch_of(clips, draws))
    assert (augmented.numpy() == expected).all()


@pytest.mark.parametrize("snr_db", [(0.0, 20.0), (-10.0, 5.0), (10.0, 10.0)])
def test_noise_has_the_ratio_and_the_place_that_are_drawn(clips, recordings, snr_db):
    draws = middle(6)
    draws[:, 2:4] = uniform(6)[:, 2:4]
    draws[0, 2:4], draws[1, 2:4] = 0, LAST
    front_end = KeywordFrontEnd(noise=recordings, noise_fraction=1, snr_db=snr_db)
    loud = np.repeat(clips[5:6], 6, axis=0)
    clean = loud / 32768.0
    added = mixed_by(front_end, loud, draws) - clean
    ratios = 10 * np.log10((clean**2).sum(axis=1) / (added**2).sum(axis=1))
    lowest, highest = snr_db
    np.testing.assert_allclose(ratios, lowest + draws[:, 3] * (highest - lowest), atol=1e-3)
    for row, noise in zip(draws, added, strict=True):
        start = int(row[2] * np.float32(len(recordings) - CLIP_SAMPLES + 1))
        segment = recordings[start : start + CLIP_SAMPLES] / 32768
        np.testing.assert_allclose(noise, segment * (noise @ segment) / (segment @ segment), atol=1e-6)


@pytest.mark.parametrize(("fraction", "mixed"), [(0.0, 0), (0.25, 2), (1.0, 6)])
def test_noise_is_mixed_into_the_fraction_that_is_asked_for(clips, recordings, fraction, mixed):
    draws = middle(6)
    draws[:, 1] = 0, 0.1, 0.25, 0.5, 0.9, LAST
    waveforms = mixed_by(KeywordFrontEnd(noise=recordings, noise_fraction=fraction), clips[:6], draws)
    changed = (waveforms != clips[:6] / np.float32(32768)).any(axis=1)
    assert changed.tolist() == [True] * mixed + [False] * (6 - mixed)


@pytest.mark.parametrize("noise", [np.zeros(CLIP_SAMPLES, np.int16), np.full(CLIP_SAMPLES, -32768, np.int16)])
def test_silence_gives_numbers(clips, noise):
    draws = middle(7)
    draws[:, 1] = 0
    front_end = KeywordFrontEnd(noise=noise, noise_fraction=1)
    waveforms = mixed_by(front_end, clips, draws)
    assert np.isfinite(waveforms).all()
    assert not waveforms[6].any()
    assert (waveforms[:6] == clips[:6] / np.float32(32768)).all() == (not noise.any())
    assert front_end(batch_of(clips, draws))[0].isfinite().all()


def test_partly_silent_noise(clips, recordings):
    noise = np.concatenate([np.zeros(CLIP_SAMPLES, np.int16), recordings])
    draws = middle(2)
    draws[:, 1] = 0
    draws[1, 2] = LAST
    waveforms = mixed_by(KeywordFrontEnd(noise=noise, noise_fraction=1), clips[4:6], draws)
    assert (waveforms == clips[4:6] / np.float32(32768)).all(axis=1).tolist() == [True, False]


@pytest.mark.parametrize("samples", [CLIP_SAMPLES, CLIP_SAMPLES + 1])
def test_a_second_of_noise_suffices(clips, samples):
    draws = uniform(7)
    draws[:, :4] = 0.5, 0, LAST, 0.5
    noise = np.ones(samples, np.int16)
    assert KeywordFrontEnd(noise=noise)(batch_of(clips, draws))[0].isfinite().all()


def test_noise_shorter_than_a_second_is_refused():
    with pytest.raises(UserError, match="background noise is 15999 samples long: give recordings of a second or more"):
        KeywordFrontEnd(noise=np.ones(CLIP_SAMPLES - 1, np.int16))


def test_recordings_are_joined_in_their_order():
    first, second = np.array([1, 2], np.int16), np.array([3], np.int16)
    joined = join_recordings([first, second])
    assert joined.tolist() == [1, 2, 3]
    assert joined.dtype == np.int16
    assert join_recordings([]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_mels": 7}, "n_mels is 7: give 8 to 80 bands"),
        ({"n_mels": 81}, "n_mels is 81: give 8 to 80 bands"),
        ({"hop_ms": 4}, "hop_ms is 4: give 5 to 100 milliseconds"),
        ({"hop_ms": 101}, "hop_ms is 101: give 5 to 100 milliseconds"),
    ],
)
def test_shapes_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        KeywordFrontEnd(**arguments)
    with pytest.raises(UserError, match=message):
        spectrogram_shape(**{"n_mels": 40, "hop_ms": 10, **arguments})


# Unchecked, masks=3 and shift_ms=-1 would be errors of torch's in the first batch, the others would train otherwise.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("masks", 3),
        ("masks", -1),
        ("shift_ms", -1),
        ("noise_fraction", -0.1),
        ("noise_fraction", 1.1),
        ("time_mask_ms", -10),
        ("mel_mask", -1),
        ("snr_db", (20.0, 0.0)),
    ],
)
def test_augmentation_out_of_range_is_refused(name, value):
    with pytest.raises(UserError, match=name):
        KeywordFrontEnd(**{name: value})


def test_clips_come_in_whole_batches(clips):
    rows, labels = np.array([4, 0, 6]), np.array([7, 8, 9])
    data = KeywordClips(clips, rows, labels)
    assert len(data) == 3
    waveforms, found = data.__getitems__([2, 0, (5, 0)])
    assert waveforms.dtype == torch.int16
    assert waveforms.numpy().tolist() == clips[[6, 4, 4]].tolist()
    assert found.dtype == torch.int64
    assert found.tolist() == [9, 7, 7]
    waveform, label = data[1]
    assert waveform.tolist() == clips[0].tolist()
    assert label.item() == 8


def test_training_clips_come_with_draws(clips):
    data = KeywordClips(clips, np.array([4, 0, 6]), np.array([7, 8, 9], np.int32), seed=-3)
    waveforms, labels, draws = data.__getitems__([(0, 1), (0, 0)])
    assert waveforms.shape == (2, CLIP_SAMPLES)
    assert labels.dtype == torch.int64
    assert draws.shape == (2, DRAWS)
    assert draws.dtype == torch.int32
    assert torch.equal(data[0, 0][2], draws[1])
    assert torch.equal(data[0][2], draws[1])  # a plain index is of epoch 0
    assert not torch.equal(data[1, 0][2], draws[1])


# Fractions close to 1 would round to 1 in float32, one draw in 2**25; with 85,000 clips, one in 33 epochs.
@pytest.mark.parametrize("key", [(1, 77, 55_719), (0, 56, 39_059), (0, 46, 2704), (0, 4, 79_404)])
def test_draws_are_below_1(clips, key):
    seed, epoch, index = key
    data = KeywordClips(clips, np.zeros(85_000, int), np.zeros(85_000, int), seed)
    draws = data[epoch, index][2]
    assert draws.max() < DRAW_LIMIT
    assert draws.min() >= 0
    assert (draws.float() / DRAW_LIMIT).max() < 1


# Rounded so, its place would be out of bounds, and a resumed run would fail there again.
def test_a_clip_is_moved_by_the_largest_draw(clips):
    data = KeywordClips(clips, np.zeros(85_000, int), np.zeros(85_000, int), seed=1)
    spectrograms, _ = KeywordFrontEnd()(data.__getitems__([(77, 55_719)]))
    assert spectrograms.shape == (1, 1, 97, 40)


def test_clips_from_disk_and_from_workers_are_those_in_memory(clips, tmp_path):
    np.save(tmp_path / "clips.npy", clips)
    on_disk = np.load(tmp_path / "clips.npy", mmap_mode="r")
    rows, labels = np.array([5, 3, 1, 6, 0, 2]), np.arange(6)

    def loaded(clips, num_workers):
        data = KeywordClips(clips, rows, labels, seed=2)
        batches = list(data_loader(data, batch_size=2, shuffle_seed=2, num_workers=num_workers))
        assert [len(batch) for batch in batches] == [3, 3, 3]
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    expected = loaded(clips, num_workers=0)
    assert sorted(expected[1].tolist()) == [0, 1, 2, 3, 4, 5]
    for found in (loaded(on_disk, num_workers=0), loaded(on_disk, num_workers=2)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("error")
def test_batches_of_a_read_only_file_can_be_written_to(clips, tmp_path):
    np.save(tmp_path / "clips.npy", clips)
    on_disk = np.load(tmp_path / "clips.npy", mmap_mode="r")
    waveforms, _ = KeywordClips(on_disk, np.arange(7), np.arange(7)).__getitems__([0, 1])
    waveforms.zero_()
    assert (on_disk == clips).all()
