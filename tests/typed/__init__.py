"""What a user's type checker finds."""
