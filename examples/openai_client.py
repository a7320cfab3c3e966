"""An ordinary OpenAI script: nothing in it knows of Penstock.

    pip install openai
    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 python openai_client.py

Streams one answer with its reasoning and its tool calls, as any client of vLLM would.
"""

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def main() -> None:
    client = OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0].id
    with client.chat.completions.stream(
        model=model,
        messages=[{"role": "user", "content": "hi"}],
        tools=[WEATHER],
        stream_options={"include_usage": True},
    ) as stream:
        for event in stream:
            if event.type == "content.delta":
                print(event.delta, end="", flush=True)
        answer = stream.get_final_completion()
    message = answer.choices[0].message
    print(f"\nreasoning: {message.model_extra.get('reasoning') if message.model_extra else None!r}")
    for call in message.tool_calls or []:
        print(f"call: {call.function.name}({call.function.arguments})")
    print(f"finish: {answer.choices[0].finish_reason}, usage: {answer.usage}")


if __name__ == "__main__":
    main()
