"""What the recipes on spoken words share."""

from microtune.datamodules.spectrogram_shape import spectrogram_shape
from microtune.modules.user_error import UserError
from microtune.recipes.training.networks import input_shape_of

# for batches of 32; AdamW at 0.003 was some points behind on the validation split
LEARNING_RATE_FROM_SCRATCH = 0.1


def check_spectrograms(weights: str, n_mels: int, hop_ms: int) -> None:
    """Raises ``UserError`` if weights were trained on other spectrograms; images have three channels and may differ."""
    known, wanted = input_shape_of(weights), spectrogram_shape(n_mels, hop_ms)
    if known is not None and known[0] == 1 and known != wanted:
        remedy = "give its n_mels and hop_ms"
        raise UserError(f"{weights} was trained on spectrograms of shape {known}, not {wanted}: {remedy}")
