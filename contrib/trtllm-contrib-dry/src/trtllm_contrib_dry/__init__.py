"""DRY: a penalty on tokens that would go on with a repetition."""
