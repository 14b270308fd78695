"""What everything else stands on: types and traits, trees, transforms, arithmetic on tensors."""
