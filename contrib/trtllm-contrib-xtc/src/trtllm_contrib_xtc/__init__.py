"""XTC: sampling that excludes top choices."""
