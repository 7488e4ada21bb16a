"""What all clients ask, so that each can check that it got the same answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

QUESTION = "What is the capital of France?"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER = "What is the weather in Paris?"


class Verdict(BaseModel):
    """A form whose every part is bounded, so that a small model cannot run on in it."""

    city: Literal["Paris", "London", "Rome"]
    is_capital: bool
    inhabitants: Annotated[int, Field(ge=0, le=99)]


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "London", "Rome"]
    unit: Literal["celsius", "fahrenheit"]


WEATHER_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "GetWeather",
        "description": GetWeather.__doc__,
        "strict": True,
        "parameters": GetWeather.model_json_schema() | {"additionalProperties": False},
    },
}
