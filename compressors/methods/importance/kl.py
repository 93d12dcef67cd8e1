"""Energy, with key/value groups that were chosen by what the predictions lose without them (`methods.heads_by_kl`)."""

from compressors.methods.importance.energy import channels, heads

__all__ = ["channels", "heads"]
