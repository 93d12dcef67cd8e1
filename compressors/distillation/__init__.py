"""Train a cut model to predict like the original: settings, loss, the pair of models, training and saved states."""
