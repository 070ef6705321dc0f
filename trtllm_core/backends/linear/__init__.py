"""The padded, linear contract: what backends share that run a family's module as an exported graph."""
