"""One second of speech as the log-mel spectrogram that a microcontroller computes, and its augmentation in training."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchaudio.functional import add_noise
from torchaudio.transforms import MelSpectrogram

from microtune.datamodules.reproducible_order import Key, epochs_and_indices, random_fractions
from microtune.datamodules.spectrogram_shape import CLIP_SAMPLES, FFT_SAMPLES, SAMPLE_RATE_HZ, spectrogram_shape
from microtune.modules.user_error import UserError

WINDOW_MS = 30
LOWEST_HZ, HIGHEST_HZ = 125.0, 7500.0
# of the training clips of Speech Commands, over all time steps and bands: constants, since a device that meets other
# words must not see its input rescaled
LOG_MEL_MEAN, LOG_MEL_STD = -6.4, 4.7
SILENCE_POWER = 1e-6  # what is below 16-bit noise shall not be told apart

# of which each is a whole number below 2**24: that is what float32 holds, and no precision of a Trainer rounds it
DRAW_LIMIT = 2**24
DRAWS = 12  # random numbers per clip: 1 for the shift, 3 for the noise, 2 for each of 4 masks

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class KeywordClips(Dataset):
    """Decoded clips, handed out in whole batches with the random numbers that augment them.

    Args:
        clips: Clips, int16 of shape (clips, 16000), in memory or mapped from disk.
        rows: Which of them are in this split (N,).
        labels: Class of each of these (N,).
        seed: Seed of the augmentation, or None for none.

    Example::

        data = KeywordClips(np.zeros((3, 16000), np.int16), np.array([2, 0]), np.array([5, 6]), seed=0)
        waveforms, labels, draws = data.__getitems__([(0, 1)])  # (1, 16000) int16, (1,) int64, (1, 12) int32
    """

    def __init__(self, clips: np.ndarray, rows: np.ndarray, labels: np.ndarray, seed: int | None = None) -> None:
        self.clips = clips
        self.rows = rows
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Batch:
        return tuple(part[0] for part in self.__getitems__([key]))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        epochs, indices = epochs_and_indices(keys)
        waveforms = torch.from_numpy(self.clips[self.rows[indices]])
        labels = self.labels[torch.from_numpy(indices)]
        if self.seed is None:
            return waveforms, labels
        draws = random_fractions(self.seed, epochs, indices, DRAWS) * DRAW_LIMIT
        return waveforms, labels, torch.from_numpy(draws.astype(np.int32))


class KeywordFrontEnd(nn.Module):
    """Turns batches of clips into normalised log-mel spectrograms, on the device that the batch is on.

    Windows of 30 ms, ``n_mels`` bands of equal width in mel between 125 and 7,500 Hz and the logarithm of their power:
    the front end of TensorFlow Lite Micro's keyword example, from which MLPerf Tiny's differs by a cosine transform
    that a convolution can learn. No frame reaches beyond the clip, as a device has no sound from there.

    Training clips come with random numbers (see ``KeywordClips``) and are moved in time, mixed with background noise
    and masked in time and frequency (SpecAugment, Park et al., 2019, without its warping).

    Args:
        n_mels: Number of mel bands.
        hop_ms: Time from one window to the next, in milliseconds.
        noise: Recordings of background noise, int16 of shape (samples,), of a second or more; or None for none.
        shift_ms: Farthest that a clip is moved, either way, in milliseconds.
        noise_fraction: Fraction of the clips that noise is mixed into.
        snr_db: Lowest and highest signal-to-noise ratio, in decibels.
        masks: Number of masks of each kind, 0 to 2.
        time_mask_ms: Widest mask in time, in milliseconds.
        mel_mask: Widest mask in frequency, in bands.

    Raises:
        UserError: if an argument is out of its range, or the noise is shorter than a second.

    Example::

        front_end = KeywordFrontEnd(noise=recordings)
        spectrograms, labels = front_end((waveforms, labels, draws))  # (N, 1, 97, 40) float32
    """

    def __init__(
        self,
        n_mels: int = 40,
        hop_ms: int = 10,
        noise: np.ndarray | None = None,
        shift_ms: int = 100,
        noise_fraction: float = 0.8,
        snr_db: tuple[float, float] = (5.0, 30.0),
        masks: int = 2,
        time_mask_ms: int = 100,
        mel_mask: int = 5,
    ) -> None:
        super().__init__()
        spectrogram_shape(n_mels, hop_ms)
        _check_augmentation(
            shift_ms=(shift_ms, 0, 1000),
            noise_fraction=(noise_fraction, 0, 1),
            snr_db=(snr_db[0], -100, snr_db[1]),
            masks=(masks, 0, 2),
            time_mask_ms=(time_mask_ms, 0, 1000),
            mel_mask=(mel_mask, 0, n_mels),
        )
        self.mel = MelSpectrogram(
            SAMPLE_RATE_HZ,
            n_fft=FFT_SAMPLES,
            win_length=WINDOW_MS * SAMPLE_RATE_HZ // 1000,
            hop_length=hop_ms * SAMPLE_RATE_HZ // 1000,
            f_min=LOWEST_HZ,
            f_max=HIGHEST_HZ,
            n_mels=n_mels,
            center=False,
        )
        if noise is not None and len(noise) < CLIP_SAMPLES:
            raise UserError(f"the background noise is {len(noise)} samples long: give recordings of a second or more")
        noise = None if noise is None else torch.from_numpy(noise).float() / 32768
        self.register_buffer("noise", noise, persistent=False)
        self.shift_samples = shift_ms * SAMPLE_RATE_HZ // 1000
        self.noise_fraction = noise_fraction
        self.snr_db = snr_db
        self.masks = masks
        self.widest = (time_mask_ms // hop_ms, mel_mask)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Spectrograms of shape (N, 1, frames, n_mels) and labels of shape (N,) of a batch of ``KeywordClips``."""
        waveforms, labels, *rest = batch
        draws = rest[0].float() / DRAW_LIMIT if rest else None
        self.to(waveforms.device)
        waveforms = waveforms.float() / 32768
        if draws is not None:
            waveforms = shifted_in_time(waveforms, draws[:, 0], self.shift_samples)
            if self.noise is not None:
                waveforms = self._noisy(waveforms, draws[:, 1:4])
        log_mels = torch.log(self.mel(waveforms).transpose(1, 2) + SILENCE_POWER)
        log_mels = (log_mels - LOG_MEL_MEAN) / LOG_MEL_STD
        if draws is not None:
            for mask in range(self.masks):
                of_mask = draws[:, 4 + 4 * mask : 8 + 4 * mask]
                log_mels = masked(log_mels, of_mask[:, :2], dim=1, widest=self.widest[0])
                log_mels = masked(log_mels, of_mask[:, 2:], dim=2, widest=self.widest[1])
        return log_mels[:, None], labels

    def _noisy(self, waveforms: Tensor, draws: Tensor) -> Tensor:
        chosen, start, ratio = draws.T
        segments = self.noise.unfold(0, CLIP_SAMPLES, 1)
        noise = segments[(start * len(segments)).long()]
        lowest, highest = self.snr_db
        noisy = add_noise(waveforms, noise, lowest + ratio * (highest - lowest))
        # where there is no sound, or no noise, there is no ratio of the two
        return torch.where(((chosen < self.noise_fraction) & noise.any(dim=1))[:, None], noisy, waveforms)


def _check_augmentation(**ranges: tuple[float, float, float]) -> None:
    for name, (value, lowest, highest) in ranges.items():
        if not lowest <= value <= highest:
            raise UserError(f"{name} is {value}: give {lowest} to {highest}")


def shifted_in_time(waveforms: Tensor, draws: Tensor, farthest: int) -> Tensor:
    """Waveforms (N, samples), each moved by up to ``farthest`` samples either way over silence, as ``draws`` (N,) say.

    Example::

        shifted_in_time(torch.ones(1, 16000), torch.tensor([0.5]), farthest=1600)  # in the middle: as it was
    """
    starts = (draws * (2 * farthest + 1)).long()
    padded = nn.functional.pad(waveforms, (farthest, farthest))
    return padded.unfold(1, waveforms.shape[1], 1)[torch.arange(len(waveforms), device=starts.device), starts]


def masked(spectrograms: Tensor, draws: Tensor, dim: int, widest: int) -> Tensor:
    """Spectrograms (N, frames, bands), in each a stripe of at most ``widest`` set to 0, which is their mean.

    torchaudio's masks draw from the global random numbers, these from what belongs to (seed, epoch, index).

    Args:
        spectrograms: Spectrograms of shape (N, frames, bands).
        draws: Width and place of each stripe, as fractions (N, 2).
        dim: Dimension that is masked: 1 masks frames, 2 masks bands.
        widest: Widest stripe, in frames or bands.

    Example::

        masked(torch.ones(4, 97, 40), torch.rand(4, 2), dim=2, widest=5)
    """
    size = spectrograms.shape[dim]
    widths = (draws[:, 0] * (min(widest, size) + 1)).long()
    starts = (draws[:, 1] * (size - widths + 1)).long()
    places = torch.arange(size, device=spectrograms.device)
    stripe = (places >= starts[:, None]) & (places < (starts + widths)[:, None])
    return spectrograms.masked_fill(stripe.unsqueeze(3 - dim), 0)


def generated_noise(seconds: int = 20) -> np.ndarray:
    """Background noise for want of recordings: white, pink and brown, ``seconds`` of each; int16, always the same.

    Of frequency f these have the power f^0, f^-1 and f^-2, above 20 Hz.

    Example::

        front_end = KeywordFrontEnd(noise=generated_noise())
    """
    samples = seconds * SAMPLE_RATE_HZ
    frequencies = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE_HZ), 20.0)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(samples))
    colours = [np.fft.irfft(spectrum * frequencies ** (-exponent / 2), samples) for exponent in (0, 1, 2)]
    return np.concatenate([np.int16(3000 * colour / colour.std()) for colour in colours])


def join_recordings(recordings: Sequence[np.ndarray]) -> np.ndarray | None:
    """Background noise for ``KeywordFrontEnd``: recordings (int16) one after another, or None if there are none."""
    return np.concatenate(recordings) if recordings else None
