"""Run by an interpreter that has the official client: python responses_client.py URL.

Prints one JSON line of what it saw of /v1/responses; the proxy's test compares. Not a test module.
"""

import json
import sys

import openai
from pydantic import BaseModel


class Answer(BaseModel):
    answer: int


TOOLS = [
    {
        "type": "function",
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        "strict": False,
    }
]


def error_of(call):
    try:
        call()
    except openai.APIError as error:
        return [type(error).__name__, getattr(error, "param", None), getattr(error, "code", None)]
    return None


def main(url):
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    create = client.responses.create
    first = create(model="m", input="Say hello", instructions="Be kind")
    seen = {
        "text": first.output_text,
        "status": first.status,
        "tokens": first.usage.output_tokens,
        "intentd": first.intentd["model"],
    }
    second = create(model="m", input="recall", previous_response_id=first.id)
    seen["recall"] = second.output_text
    branch = create(model="m", input="recall", previous_response_id=first.id)
    seen["branch"] = branch.output_text
    seen["stateless"] = create(model="m", input="recall", store=False).output_text
    seen["retrieved"] = client.responses.retrieve(second.id).output_text
    items = client.responses.input_items.list(second.id)
    seen["items"] = [item.content[0].text for item in items.data]
    client.responses.delete(second.id)
    seen["deleted"] = error_of(lambda: client.responses.retrieve(second.id))
    seen["unknown"] = error_of(
        lambda: create(model="m", input="x", previous_response_id="resp_nothing")
    )

    with client.responses.stream(model="m", input="Say hello") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    seen["kinds"] = list(dict.fromkeys(kinds))
    seen["stream"] = final.output_text
    seen["after_stream"] = create(
        model="m", input="recall", previous_response_id=final.id
    ).output_text

    called = create(model="m", input="tool", tools=TOOLS)
    call = called.output[0]
    seen["tool"] = [call.type, call.name, call.arguments]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    seen["tool_result"] = create(
        model="m", input=[result], tools=TOOLS, previous_response_id=called.id
    ).output_text
    with client.responses.stream(model="m", input="tool", tools=TOOLS) as stream:
        streamed = [event for event in stream if event.type == "response.output_item.done"]
    seen["tool_stream"] = [streamed[-1].item.name, streamed[-1].item.arguments]
    chat = [{"role": "user", "content": "tool"}, call, result]
    seen["whole_input"] = create(model="m", input=chat, tools=TOOLS, store=False).output_text

    parsed = client.responses.parse(model="m", input="json", text_format=Answer)
    seen["parsed"] = parsed.output_parsed.answer
    seen["service_type"] = create(
        model="auto", input="Say hello", extra_body={"service_type": "cost"}
    ).intentd["service_type"]
    seen["capped"] = create(
        model="m", input="short", max_output_tokens=16
    ).incomplete_details.reason
    seen["hosted"] = error_of(lambda: create(model="m", input="x", tools=[{"type": "web_search"}]))
    broken = list(create(model="m", input="cut", stream=True))
    seen["cut"] = [event.type for event in broken][-2:]
    print(json.dumps(seen))


main(sys.argv[1])
