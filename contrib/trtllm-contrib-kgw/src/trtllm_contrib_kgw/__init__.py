"""The KGW watermark: green lists that generation favours and that a detector counts."""
