"""Logging of `serve`: text for people or JSON lines for machines, with the request's id."""

import logging

from pythonjsonlogger.json import JsonFormatter

from server.middleware import request_id_var

TEXT = "%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s"
FIELDS = ("levelname", "name", "request_id", "message")
RENAMED = {"levelname": "level", "name": "logger"}


def configure_logging(level: str, *, as_json: bool) -> None:
    """Send the records of this process to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    if as_json:
        formatter = JsonFormatter(FIELDS, rename_fields=RENAMED, timestamp="time")
        handler.setFormatter(formatter)
    else:
        handler.setFormatter(logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id_var.get()
    return True
