"""The classic logger, on Python's."""

from __future__ import annotations

import logging
from typing import Any

LEVELS = {
    "internal_error": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "verbose": logging.DEBUG,
    "debug": logging.DEBUG,
}


class Logger:
    """Writes to Python's logger ``tensorrt_llm``; nothing below ``warning`` until ``set_level``."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("tensorrt_llm")
        self.level = "warning"

    def set_level(self, min_severity: str) -> None:
        """Write what is at least as severe: one of ``LEVELS``. KeyError for others."""
        self._logger.setLevel(LEVELS[min_severity])
        self.level = min_severity
        if not logging.getLogger().handlers and not self._logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("[%(asctime)s] [TRT-LLM] [%(levelname)s] %(message)s"))
            self._logger.addHandler(handler)

    def log(self, severity: str, *message: Any) -> None:
        """Write parts, separated by spaces."""
        self._logger.log(LEVELS[severity], "%s", " ".join(map(str, message)))

    def critical(self, *message: Any) -> None:
        """As ``log``."""
        self.log("internal_error", *message)

    fatal = critical

    def error(self, *message: Any) -> None:
        """As ``log``."""
        self.log("error", *message)

    def warning(self, *message: Any) -> None:
        """As ``log``."""
        self.log("warning", *message)

    def info(self, *message: Any) -> None:
        """As ``log``."""
        self.log("info", *message)

    def verbose(self, *message: Any) -> None:
        """As ``log``."""
        self.log("verbose", *message)

    def debug(self, *message: Any) -> None:
        """As ``log``."""
        self.log("debug", *message)


logger = Logger()
