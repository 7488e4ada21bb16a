"""The exceptions of the runtime. Each message says what was wrong, the limit, and what fixes it.

HotneuronError
├── InvalidRequest (ValueError; .param, .code)    the caller's request cannot be served as it stands
│   ├── InvalidSampling                            a sampling parameter is out of range
│   └── ContextLengthExceeded                      prompt longer than the context
├── TokenMaskFailed                                 a constraint on an answer's form broke down
├── QueueFull                                      try again later
├── GenerationFailed                               a blocking generate() ended with an error
├── EngineDead                                     the engine thread has ended
├── AcceleratorLost                                the accelerator no longer answers
├── InvalidConfig (ValueError)                     a setting of the engine is out of range
├── UnsupportedModel (ValueError)                  this checkpoint, or this mode of it, cannot run
└── PlacementError (ValueError)                    a placement does not fit its model
"""


class HotneuronError(Exception):
    """Base of everything the runtime raises on purpose."""


class InvalidRequest(HotneuronError, ValueError):
    """The request is wrong. `param` names the field, `code` is a machine-readable word."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidSampling(InvalidRequest):
    """A sampling parameter is out of its range."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt (plus at least one new token) does not fit the context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class TokenMaskFailed(HotneuronError):
    """The request's token mask raised, or allowed nothing; that request ends with this error."""


class QueueFull(HotneuronError):
    """As many requests wait as the queue holds."""


class EngineDead(HotneuronError):
    """The engine thread has stopped; no request will be served any more."""


class AcceleratorLost(HotneuronError):
    """The accelerator no longer answers, or has no memory left in the middle of a step."""


class GenerationFailed(HotneuronError):
    """A blocking generate() ended with an error event."""


class InvalidConfig(HotneuronError, ValueError):
    """A setting of the engine is out of range or contradicts another."""


class UnsupportedModel(HotneuronError, ValueError):
    """The checkpoint cannot be run, or not in the asked mode."""


class PlacementError(HotneuronError, ValueError):
    """A placement is malformed or belongs to another model."""
