"""The shape of a second's spectrogram, which a command line asks for before torchaudio is imported."""

from microtune.modules.user_error import UserError

SAMPLE_RATE_HZ = 16_000
CLIP_SAMPLES = 16_000  # one second
FFT_SAMPLES = 512  # the power of two that holds a window, as a device's FFT wants it


def spectrogram_shape(n_mels: int, hop_ms: int) -> tuple[int, int, int]:
    """Channels, frames and bands of the spectrogram of one second.

    Raises:
        UserError: if an argument is out of its range.

    Example::

        spectrogram_shape(n_mels=40, hop_ms=10)  # (1, 97, 40)
    """
    if not 8 <= n_mels <= 80:
        raise UserError(f"n_mels is {n_mels}: give 8 to 80 bands")
    if not 5 <= hop_ms <= 100:
        raise UserError(f"hop_ms is {hop_ms}: give 5 to 100 milliseconds")
    return 1, 1 + (CLIP_SAMPLES - FFT_SAMPLES) // (hop_ms * SAMPLE_RATE_HZ // 1000), n_mels
