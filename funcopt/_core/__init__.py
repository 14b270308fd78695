"""What everything else stands on: trees, transforms, hyperparameters, arithmetic."""
